"""The loss: energy, forces and stress, each a mean over the labels that are there.

    L = w_E ⟨ρ((E − Ê)/D)⟩ + w_F ⟨ρ(F − F̂)⟩ + w_σ ⟨ρ(σ − σ̂)⟩,   in eV, eV/Å, eV/Å³;

D is the number of atoms N, or √N or 1 where loss.energy_per_atom says so. By loss.kind, ρ is

    mse     x², of each of 3N force components and 9 stress components
    huber   x² for |x| ≤ δ and δ (2|x| − δ) beyond: a squared error for small errors
    mae     |x|; of forces and stress the length ‖F_i − F̂_i‖ and ‖σ − σ̂‖, which no rotation changes (as in EquiformerV2)

A label that is NaN is missing, component by component: nothing is learned from it, and its gradient is zero. A stress
counts for structures with a volume only, as others have none.

Weights may change along a training: with loss.stages [{start: 0.5, energy: 10}] the energy's is another one from half
of the training on, and loss.last is the last of the stages. With loss.ramp r weights move there linearly, from each
stage's start to start + r. Forces first, energies later is {energy: 0, stages: [{start: 0.3, energy: 10}], ramp: 0.3}.

Structures that are denoised add w_d ⟨ρ(ε − ε̂)⟩ + w_e w_E ⟨ρ((E − Ê)/D)⟩, with ε the noise in units of its standard
deviation, and x² for Huber's ρ(ε − ε̂), as δ is in other units.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from equimd.graph import AtomGraph
from equimd.models.potential import Prediction
from equimd.rotations import rotate_back_tensor
from equimd.training.sections import LossSection, LossWeights


class LossTerms(NamedTuple):
    """The weighted sum, and mean squared errors per atom or component to report, each a scalar.

    Of a term without weight or labels, the error is zero.
    """

    total: Tensor
    energy: Tensor
    forces: Tensor
    stress: Tensor
    noise: Tensor


class Denoised(NamedTuple):
    """Errors of the structures that are denoised, and the weights of their squares.

    noise_error (n, 3) at atoms with noise, in units of its standard deviation; energy_error (K,) in eV per atom of
    n_atoms (K,), NaN without a label.
    """

    noise_error: Tensor
    energy_error: Tensor
    n_atoms: Tensor
    weight: float
    energy_weight: float


def active_weights(section: LossSection, progress: float) -> LossWeights:
    """The weights at ``progress`` (0 to 1) of the training."""
    weights = {"energy": section.energy, "forces": section.forces, "stress": section.stress}
    for stage in section.all_stages:
        done = progress - stage.start
        share = float(done >= 0) if section.ramp == 0 else min(1.0, max(0.0, done / section.ramp))
        for term, before in weights.items():
            target = getattr(stage, term)
            if target is not None:
                weights[term] = before + share * (target - before)
    return LossWeights(**weights)


def loss_terms(
    prediction: Prediction,
    graph: AtomGraph,
    weights: LossWeights,
    section: LossSection,
    denoised: Denoised | None = None,
) -> LossTerms:
    """The loss of a batch; ``denoised`` adds structures that are not in ``graph``, whose energies are not reported."""
    zero = prediction.forces.new_zeros(())
    total, squares = zero, {"energy": zero, "forces": zero, "stress": zero, "noise": zero}
    if weights.energy > 0:
        n_atoms = torch.bincount(graph.batch, minlength=graph.n_systems).unsqueeze(1)
        label = graph.energy.unsqueeze(1)
        error = (prediction.energy.unsqueeze(1) - label) / n_atoms
        squares["energy"] = _mean(error.detach(), label).to(zero.dtype)
        scaled = error * n_atoms ** _POWERS[section.energy_per_atom]
        total = total + weights.energy * _mean(scaled, label, section).to(zero.dtype)
    if weights.forces > 0:
        error = prediction.forces - graph.forces.to(zero.dtype)
        term, squares["forces"] = _term(error, graph.forces, section)
        total = total + weights.forces * term
    if weights.stress > 0 and prediction.stress is not None:
        predicted, label = prediction.stress, stress_labels(graph)
        if "unrotated_stress" in graph:
            predicted = rotate_back_tensor(predicted, graph.rotations.to(zero.dtype))
        error = (predicted - label.to(zero.dtype)).flatten(1)
        term, squares["stress"] = _term(error, label.flatten(1), section)
        total = total + weights.stress * term
    if denoised is not None:
        error = denoised.noise_error
        squares["noise"] = _mean(error.detach(), error)
        total = total + denoised.weight * _mean(error, error, section if section.kind == "mae" else None)
        if denoised.energy_weight > 0:
            error = denoised.energy_error.unsqueeze(1)
            scaled = error * denoised.n_atoms.unsqueeze(1) ** _POWERS[section.energy_per_atom]
            total = total + denoised.energy_weight * _mean(scaled, error, section).to(zero.dtype)
    return LossTerms(total, **squares)


_POWERS = {True: 0.0, "sqrt": 0.5, False: 1.0}
"""Of N, which the error per atom is multiplied with."""


def label_counts(graph: AtomGraph, section: LossSection) -> Tensor:
    """How many terms the means of energy, forces and stress are over, (3,), on the CPU: for parts of a batch."""
    labels = (graph.energy.unsqueeze(1), graph.forces, stress_labels(graph).flatten(1))
    known = [~torch.isnan(label) for label in labels]
    return torch.stack([(k.any(dim=1) if section.kind == "mae" else k).sum() for k in known]).to("cpu", torch.float64)


def shared(weights: LossWeights, shares: Tensor) -> LossWeights:
    """Weights that turn means over some of a batch's labels into their share of the means over all of them.

    ``shares`` (≥ 3,) are n/N, labels of energies, forces and stress here and in all: w · (n/N) · (1/n) Σ = w · (1/N) Σ,
    so that the losses of all parts of a batch, and their gradients, add up to those of the batch as a whole.
    """
    energy, forces, stress = shares[:3].tolist()
    return LossWeights(energy=weights.energy * energy, forces=weights.forces * forces, stress=weights.stress * stress)


def stress_labels(graph: AtomGraph) -> Tensor:
    """Stress labels (S, 3, 3), NaN where there is no volume; in the axes of the data where ``rotate_graph`` says so."""
    label = graph.unrotated_stress if "unrotated_stress" in graph else graph.stress
    return torch.where(graph.volume[:, None, None] > 0, label, torch.nan)


def _term(error: Tensor, label: Tensor, section: LossSection) -> tuple[Tensor, Tensor]:
    """Means of ρ and of squares."""
    term = _mean(error, label, section)
    return term, term.detach() if section.kind == "mse" else _mean(error.detach(), label)


def _mean(error: Tensor, label: Tensor, section: LossSection | None = None) -> Tensor:
    """Mean of ρ over known labels, of errors (n, components); of squares without ``section``."""
    kind = "mse" if section is None else section.kind
    known = ~torch.isnan(label)
    if not bool(known.all()):
        if not bool(known.any()):
            return error.new_zeros(())
        rows = known.any(dim=1)
        # What is not known is zero in a length, and left out elsewhere.
        error = torch.where(known, error, 0.0)[rows] if kind == "mae" else error[known]
    if error.numel() == 0:
        return error.new_zeros(())
    if kind == "mae":
        return torch.linalg.vector_norm(error, dim=1).mean()
    if section is None or kind == "mse":
        return error.square().mean()
    size, delta = error.abs(), section.huber_delta
    return torch.where(size <= delta, size.square(), delta * (2 * size - delta)).mean()
