"""What is asked of the potential in a step, of which frame: the seam between the loop and the losses.

As a rule: energies, forces and stress of every frame. A recipe's sections change that.

denoising: a part of the frames is corrupted instead. With their forces told, the noise is to be found and, with
denoising.energy above 0, the energy of the clean structure, which DeNS (arXiv:2403.09549) asks for. That takes first
derivatives only, so such a frame costs a fraction of another. Forces of atoms without noise are not asked for: with
vectors told, they would take second derivatives.

pretraining: at first, forces are read by a head, which takes first derivatives only, as PET-MAD, Orb and eSEN are
trained (Bigi et al., arXiv:2412.11569; Fu et al., arXiv:2502.12147); then they are the gradient of the energy, of the
same network. The forces read are whole forces, with those of the repulsion at short distances; stress is left out.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from equimd.graph import AtomGraph, edge_vectors, select_systems
from equimd.models.auxiliary import Auxiliary, make_auxiliary
from equimd.models.potential import Potential, Prediction
from equimd.training.denoising import Corrupted, chosen_structures, corrupt
from equimd.training.loss import Denoised, LossTerms, active_weights, label_counts, loss_terms, shared
from equimd.training.optim import make_optimizers
from equimd.training.recipe import Recipe
from equimd.training.sections import LossWeights

_STREAM = 0x0707  # of the heads' first weights


class Tasks(NamedTuple):
    """A batch shared out: structures for the usual task, which may be none, and those to be denoised."""

    usual: AtomGraph
    corrupted: Corrupted | None

    @property
    def graphs(self) -> list[AtomGraph]:
        """What is in memory at once."""
        return [self.usual] if self.corrupted is None else [self.usual, self.corrupted.graph]


class Objective:
    """The loss of a batch; ``auxiliary`` holds the heads that only training has, None where the recipe needs none."""

    def __init__(self, recipe: Recipe, potential: Potential) -> None:
        self.recipe, self.potential = recipe, potential
        self.vectors = [name for name in ("pretraining", "denoising") if getattr(recipe, name) is not None]
        self.auxiliary: Auxiliary | None = None
        if self.vectors:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(np.random.SeedSequence([_STREAM, recipe.seed]).generate_state(1)[0]))
                self.auxiliary = make_auxiliary(potential, len(self.vectors))

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a resume needs besides the potential."""
        return {} if self.auxiliary is None else {"auxiliary": self.auxiliary}

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The weights of the heads."""
        return [] if self.auxiliary is None else list(self.auxiliary.parameters())

    def make_optimizers(self) -> list[Optimizer]:
        """AdamW for the heads."""
        if self.auxiliary is None:
            return []
        return make_optimizers(self.auxiliary, self.recipe.optimizer.model_copy(update={"name": "adamw"}))

    def pretrains(self, fraction: float) -> bool:
        """Whether forces are read by a head at this fraction (0 to 1) of the training."""
        section = self.recipe.pretraining
        return section is not None and fraction < section.fraction

    def learning_rate_factor(self, fraction: float) -> float:
        """What multiplies the schedule's: it rises from zero once more when the forces become the gradient."""
        section = self.recipe.pretraining
        if section is None or section.warmup == 0 or fraction < section.fraction:
            return 1.0
        return min(1.0, (fraction - section.fraction) / section.warmup)

    def tasks(self, graph: AtomGraph, frames: np.ndarray, epoch: int, step: int) -> Tasks:
        """What becomes of the structures of a batch, or of a part of it; none is corrupted that lacks a force.

        ``graph`` holds equally many copies of each of the training set's ``frames`` (B,), one after another, rotated
        or not: noise is drawn in its frame of reference, forces are told in it.
        """
        section = self.recipe.denoising
        if section is None:
            return Tasks(graph, None)
        copies = graph.n_systems // len(frames)
        generators = chosen_structures(section, frames, copies, self.recipe.seed, epoch, step)
        for place in graph.batch[torch.isnan(graph.forces).any(dim=1)].unique().tolist():
            generators.pop(place, None)
        if not generators:
            return Tasks(graph, None)
        device = graph.positions.device
        chosen = torch.tensor(list(generators), device=device)
        others = torch.ones(graph.n_systems, dtype=torch.bool, device=device).index_fill(0, chosen, False).nonzero()
        corrupted = corrupt(select_systems(graph, chosen), section, list(generators.values()))
        return Tasks(select_systems(graph, others.squeeze(1)), corrupted)

    def counts(self, tasks: Tasks) -> Tensor:
        """How many terms each mean is over (5,): energies, forces, stress, noise, energies of what is denoised."""
        usual, corrupted = label_counts(tasks.usual, self.recipe.loss), tasks.corrupted
        if corrupted is None:
            return torch.cat([usual, usual.new_zeros(2)])
        denoised = torch.stack([corrupted.moved.sum(), (~torch.isnan(corrupted.clean.energy)).sum()])
        return torch.cat([usual, denoised.to(usual)])

    def loss(self, tasks: Tasks, fraction: float, shares: Tensor) -> LossTerms:
        """The loss of what ``tasks`` says, at ``fraction`` (0 to 1) of the training.

        ``shares`` (5,): how much of the ``counts`` of the whole batch is here, 1 where all is.
        """
        recipe, graph = self.recipe, tasks.usual
        weights = active_weights(recipe.loss, fraction)
        denoised = None if tasks.corrupted is None else self._denoise(tasks.corrupted, fraction, weights, shares)
        weights = shared(weights, shares)
        if graph.n_systems == 0:
            prediction = _of_nothing(graph)
        elif self.pretrains(fraction):
            prediction = self._read_forces(graph)
        else:
            prediction = self.potential.predict_trainable(graph, stress=weights.stress > 0)
        terms = loss_terms(prediction, graph, weights, recipe.loss, denoised)
        if recipe.denoising is not None and denoised is None:
            # A gradient of zero rather than none: the optimiser's steps are then the same in every process.
            terms = terms._replace(total=terms.total + 0.0 * sum(p.sum() for p in self.parameters))
        return terms

    def _read_forces(self, graph: AtomGraph) -> Prediction:
        vectors = edge_vectors(graph, torch.float64)
        output, read = self.potential.network_and_vectors(graph, vectors, self.auxiliary)
        energy, energies = self.potential.energies_of(graph, vectors, output)
        scale = self.potential.scale[self.potential.species_of(graph)]
        forces = read[:, self.vectors.index("pretraining")] * scale.unsqueeze(1)
        return Prediction(energy, energies, forces, None)

    def _denoise(self, corrupted: Corrupted, fraction: float, weights: LossWeights, shares: Tensor) -> Denoised:
        section, clean, graph = self.recipe.denoising, corrupted.clean, corrupted.graph
        assert section is not None
        scale = self.potential.scale[self.potential.species_of(graph)]
        told = clean.forces / scale.unsqueeze(1) * corrupted.moved.unsqueeze(1)
        output, read = self.potential.network_and_vectors(
            graph, edge_vectors(graph, torch.float64), self.auxiliary, told
        )
        noise = read[:, self.vectors.index("denoising")]
        # The repulsion is that of the clean structure, whose energy may be asked for.
        energy, _ = self.potential.energies_of(clean, edge_vectors(clean, torch.float64), output)
        n_atoms = torch.bincount(clean.batch, minlength=clean.n_systems)
        return Denoised(
            noise_error=(noise - corrupted.noise.to(noise.dtype))[corrupted.moved],
            energy_error=(energy - clean.energy) / n_atoms,
            n_atoms=n_atoms,
            weight=section.weight * (1.0 - (1.0 - section.final) * fraction) * float(shares[3]),
            energy_weight=section.energy * weights.energy * float(shares[4]),
        )


def _of_nothing(graph: AtomGraph) -> Prediction:
    """The prediction of a batch without structures."""
    empty = graph.positions.new_zeros(0)
    return Prediction(empty, empty, graph.positions.new_zeros(0, 3), None)
