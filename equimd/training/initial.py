"""The potential that a training starts from: a new one, or the weights of a checkpoint (recipe section ``init_from``).

From a checkpoint (fine-tuning) the architecture, mean number of neighbours included, is the parent's: the weights mean
nothing without it. Elements are those of the training set, and with ``keep_elements`` the parent's too. Known elements
keep their rows of the tables; new ones begin with the mean of the known rows, plus noise of a tenth of their size that
tells them apart. Energies are

    E = Σ_i E₀[Z_i] + scale[Z_i] · output_i + shift[Z_i]

where E₀, the energies of isolated atoms, are the recipe's or those of isolated atoms among the training frames: they
say which level of theory the labels have. Without either they are the parent's, so that the level is the parent's too;
where energies then start far off the labels, it is not, and the training is refused. The scale is the parent's, for new
elements its mean: it gives the weights of the last layer their meaning. Of the shift, ``shift: auto`` keeps the
parent's, except that the least squares of E − Ê on training frames correct that of new elements, and that of every
element where E₀ of a known one differs from the parent's, which is another level of theory. ``refit`` corrects all,
``keep`` none. So, without new elements and on the same level, training starts with what the parent predicts.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equimd.errors import InputError
from equimd.graph import AtomGraph
from equimd.models.checkpoint import build_potential, load_checkpoint
from equimd.models.equivariant import EquivariantSettings
from equimd.models.potential import Potential
from equimd.training.cache import file_sha256
from equimd.training.data import FrameSet
from equimd.training.recipe import Recipe, parent_file
from equimd.training.sections import InitSection
from equimd.training.statistics import Statistics

_NOISE = 0.1  # of the size of a table's entries, for rows of new elements
_SAME_ENERGY = 1e-6  # eV
_MOST_FRAMES = 1000  # that a shift is fitted on
_EDGES_PER_BATCH = 12_000
_FAR = 1.0  # eV/atom; levels of theory are tens of eV apart, and energies of a parent that fits the data far less
_FRAMES_TO_CHECK = 100


def make_potential(
    recipe: Recipe, train: FrameSet, energies: Mapping[int, float], numbers: Statistics
) -> tuple[Potential, list[dict[str, Any]]]:
    """The potential, its frozen parameters without gradients, and its ancestors, the oldest first.

    Raises:
        InputError: for a checkpoint of another family or with other settings, a pattern that freezes nothing, energies
            that are far off the labels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        if recipe.init_from is None:
            return _new(recipe, train, energies, numbers), []
        return _from_parent(recipe, recipe.init_from, train, energies)


def _new(recipe: Recipe, train: FrameSet, energies: Mapping[int, float], numbers: Statistics) -> Potential:
    settings = recipe.model
    if isinstance(settings, EquivariantSettings) and settings.avg_num_neighbors is None:
        settings = settings.model_copy(update={"avg_num_neighbors": round(max(numbers.mean_neighbors, 1e-3), 6)})
    potential = build_potential(settings, train.species, {z: energies[z] for z in train.species})
    potential.set_scale_shift({z: numbers.force_rms for z in train.species}, numbers.shift)
    return potential.to(dtype=getattr(torch, recipe.dtype))


def _from_parent(
    recipe: Recipe, section: InitSection, train: FrameSet, energies: Mapping[int, float]
) -> tuple[Potential, list[dict[str, Any]]]:
    file = parent_file(section.checkpoint, recipe.path("."))
    parent, header = load_checkpoint(file, "cpu", recipe.dtype)
    _check_architecture(recipe, parent, section.checkpoint)
    species = set(train.species) | (set(parent.species) if section.keep_elements else set())
    table = parent.isolated_atom_energies | dict(energies)
    potential = build_potential(parent.settings, tuple(sorted(species)), {z: table[z] for z in species})  # type: ignore
    potential = potential.to(dtype=parent.dtype).requires_grad_(False)
    _inherit(potential, parent)
    fitted = _species_to_fit(section, potential, parent)
    if fitted:
        for z, correction in zip(fitted, residual_shifts(potential, train, fitted), strict=True):
            potential.shift[potential.species.index(z)] += correction
    if section.shift == "auto" and recipe.loss.largest("energy") > 0:
        _check_level(potential, train, section.checkpoint)
    potential.requires_grad_(True)
    frozen = freeze(potential, section.freeze)
    new = sorted(species - set(parent.species))
    if new and frozen & set(potential.species_tables):
        raise InputError(
            f"init_from.freeze holds {sorted(frozen & set(potential.species_tables))[0]!r}, but {section.checkpoint}"
            f" has no atomic number {new[0]}, whose row is to be trained; leave it out of freeze"
        )
    own = {"name": header.get("name"), "sha256": file_sha256(file)}
    return potential, [*header.get("ancestry", []), own]


def _check_architecture(recipe: Recipe, parent: Potential, name: str) -> None:
    own, other = recipe.model.model_dump(), parent.settings.model_dump()
    if own["family"] != other["family"]:
        raise InputError(
            f"init_from: {name} is of the {other['family']} family, model.family is {own['family']!r};"
            " leave the section model out to take the checkpoint's"
        )
    for key, value in own.items():
        if value != other[key] and not (key == "avg_num_neighbors" and value is None):
            raise InputError(
                f"init_from: {name} has {key} {other[key]!r}, model.{key} is {value!r};"
                " leave it out to take the checkpoint's"
            )


def _inherit(potential: Potential, parent: Potential) -> None:
    """Give ``potential`` the weights of ``parent``, by element where they belong to one."""
    rows = [parent.species.index(z) if z in parent.species else None for z in potential.species]
    weights = parent.state_dict()
    for name, n_axes in potential.species_tables.items():
        weights[name] = _for_species(weights[name], n_axes, len(parent.species), rows, _NOISE)
    for name in ("scale", "shift"):
        weights[name] = _for_species(weights[name], 1, len(parent.species), rows, 0.0)
    potential.load_state_dict(weights)


def _for_species(table: Tensor, n_axes: int, n_before: int, rows: Sequence[int | None], noise: float) -> Tensor:
    """A table by species (S, …), or by pairs of them (S², …), for other species; ``rows`` says where each was."""
    size = table.square().mean().sqrt()
    table = table.unflatten(0, (n_before,) * n_axes)
    for axis in range(n_axes):
        mean = table.mean(axis)
        parts = [
            mean + noise * size * torch.randn_like(mean) if row is None else table.select(axis, row) for row in rows
        ]
        table = torch.stack(parts, axis)
    return table.flatten(0, n_axes - 1)


def _species_to_fit(section: InitSection, potential: Potential, parent: Potential) -> list[int]:
    if section.shift != "auto":
        return list(potential.species) if section.shift == "refit" else []
    before, now = parent.isolated_atom_energies, potential.isolated_atom_energies
    moved = any(abs(now[z] - before[z]) > _SAME_ENERGY for z in now if z in before)
    return [z for z in potential.species if moved or z not in before]


def residual_shifts(potential: Potential, frames: FrameSet, species: Sequence[int]) -> list[float]:
    """Energies in eV by ``species`` that, added to every atom, bring predictions closest to the labels.

    Least squares of energies per atom over up to 1,000 frames, spread evenly; of smallest norm if the counts of atoms
    do not tell.
    """
    counts, residuals = [], []
    for graph in _labelled(frames, _MOST_FRAMES):
        residuals.append(graph.energy - potential(graph).energy)
        of = [torch.bincount(graph.batch[graph.atomic_numbers == z], minlength=graph.n_systems) for z in species]
        counts.append(torch.stack(of, dim=1))
    if not counts:
        return [0.0] * len(species)
    a, b = torch.cat(counts).double().numpy(), torch.cat(residuals).numpy()
    n_atoms = np.maximum(a.sum(axis=1), 1.0)
    a, b = a / n_atoms[:, None], b / n_atoms
    return np.linalg.lstsq(a, b, rcond=1e-8)[0].tolist()


def _labelled(frames: FrameSet, most: int) -> Iterator[AtomGraph]:
    """Up to ``most`` frames with energies, spread evenly, in batches."""
    which = torch.nonzero(~torch.isnan(frames.energy)).squeeze(1)
    which = which[torch.linspace(0, len(which) - 1, min(most, len(which))).round().long()]
    place = torch.div(frames.n_edges[which].cumsum(0), _EDGES_PER_BATCH, rounding_mode="floor")
    for value in place.unique():
        yield frames.batch(which[place == value])


def _check_level(potential: Potential, frames: FrameSet, name: str) -> None:
    """Refuse energies so far off the labels that these are of another level of theory."""
    errors = [
        (potential(graph).energy - graph.energy).abs() / torch.bincount(graph.batch, minlength=graph.n_systems)
        for graph in _labelled(frames, _FRAMES_TO_CHECK)
    ]
    median = float(torch.cat(errors).median()) if errors else 0.0
    if median > _FAR:
        raise InputError(
            f"init_from: energies of {name} are {median:.3g} eV/atom off the labels (median of training frames), as at"
            " another level of theory; set init_from.shift: refit (or keep, to start from there), or give"
            " data.isolated_atom_energies of the labels' level"
        )


def freeze(potential: Potential, patterns: Sequence[str]) -> set[str]:
    """Take the gradients from parameters: parts such as "embedding", or patterns of names such as "layers.0.*".

    Returns the names of what is frozen. A pattern also means everything below a name that it fits.

    Raises:
        InputError: for a pattern that fits nothing, or where nothing is left to train.
    """
    parameters = dict(potential.named_parameters())
    frozen: set[str] = set()
    for pattern in patterns:
        globs = potential.parts.get(pattern, (pattern,))
        found = {n for n in parameters for g in globs if fnmatch.fnmatchcase(n, g) or fnmatch.fnmatchcase(n, f"{g}.*")}
        if not found:
            raise InputError(
                f"init_from.freeze: {pattern!r} is no parameter; accepted are {', '.join(potential.parts)}, and names"
                f" or patterns such as {min(parameters, key=lambda name: (-name.count('.'), name))!r}"
            )
        frozen |= found
    if len(frozen) == len(parameters):
        raise InputError(f"init_from.freeze is {list(patterns)}, which is every parameter; nothing is left to train")
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen
