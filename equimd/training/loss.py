"""The loss: energy per atom, forces and stress, each a mean over the labels that are there.

    L = w_E ⟨ρ((E − Ê)/N)⟩ + w_F ⟨ρ(F − F̂)⟩ + w_σ ⟨ρ(σ − σ̂)⟩,   ρ(x) = x² or Huber's, in eV/atom, eV/Å, eV/Å³;

means over structures, over 3N force components and over 9 stress components. Huber: ρ(x) = x² for |x| ≤ δ and
δ (2|x| − δ) beyond, which is a squared error for small errors.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from equimd.graph import AtomGraph
from equimd.models.potential import Prediction
from equimd.training.sections import LossSection, LossWeights


class LossTerms(NamedTuple):
    """The weighted sum and its unweighted terms, each a scalar; a term without labels is zero."""

    total: Tensor
    energy: Tensor
    forces: Tensor
    stress: Tensor


def active_weights(section: LossSection, progress: float) -> LossWeights:
    """The weights at ``progress`` (0 to 1) of the training."""
    if section.last is not None and progress >= 1.0 - section.last.fraction:
        return section.last
    return section


def loss_terms(prediction: Prediction, graph: AtomGraph, weights: LossWeights, section: LossSection) -> LossTerms:
    """The loss of a batch; labels that are NaN are left out, so no gradient comes from them."""
    n_atoms = torch.bincount(graph.batch, minlength=graph.n_systems)
    zero = prediction.forces.new_zeros(())
    energy = forces = stress = zero
    if weights.energy > 0:
        energy = _mean((prediction.energy - graph.energy) / n_atoms, graph.energy, section).to(zero.dtype)
    if weights.forces > 0:
        forces = _mean(prediction.forces - graph.forces.to(zero.dtype), graph.forces, section)
    if weights.stress > 0 and prediction.stress is not None:
        stress = _mean(prediction.stress - graph.stress.to(zero.dtype), graph.stress, section)
    total = weights.energy * energy + weights.forces * forces + weights.stress * stress
    return LossTerms(total, energy.detach(), forces.detach(), stress.detach())


def label_counts(graph: AtomGraph) -> Tensor:
    """How many labels a batch has (3,): energies, force components, stress components; on the CPU."""
    known = [(~torch.isnan(label)).sum() for label in (graph.energy, graph.forces, graph.stress)]
    return torch.stack(known).to("cpu", torch.float64)


def global_share(weights: LossWeights, counts: Tensor, totals: Tensor) -> tuple[LossWeights, Tensor]:
    """Weights that turn the means over some labels into their share of the mean over all, and these shares (3,).

    ``counts`` (3,) of the ``totals`` (3,) labels of a batch are here: w · (n/N) · (1/n) Σ = w · (1/N) Σ, so that the
    losses of all parts of a batch, and their gradients, add up to those of the batch as a whole.
    """
    shares = torch.where(totals > 0, counts / totals.clamp(min=1), 0.0)
    energy, forces, stress = shares.tolist()
    update = {
        "energy": weights.energy * energy,
        "forces": weights.forces * forces,
        "stress": weights.stress * stress,
    }
    return weights.model_copy(update=update), shares


def _mean(error: Tensor, label: Tensor, section: LossSection) -> Tensor:
    known = ~torch.isnan(label)
    if not bool(known.all()):
        error = error[known]
        if error.numel() == 0:
            return error.new_zeros(())
    if section.kind == "mse":
        return error.square().mean()
    size, delta = error.abs(), section.huber_delta
    return torch.where(size <= delta, size.square(), delta * (2 * size - delta)).mean()
