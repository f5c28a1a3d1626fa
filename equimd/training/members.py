"""Ensembles: members that differ in the seed of their weights, of the order of their data and of its rotations."""

import json
import math
import shutil
from pathlib import Path

import torch
from torch import Tensor

from equimd.errors import InputError
from equimd.models.checkpoint import ENSEMBLE_FILE, load_potential
from equimd.models.ensemble import EnsemblePotential
from equimd.models.header import seal
from equimd.results import Number, Result, provenance, write_text_atomically
from equimd.training.distributed import World
from equimd.training.files import MEMBER, START_FILE, check_folder, explaining_a_full_disk
from equimd.training.loop import train
from equimd.training.recipe import Recipe
from equimd.training.result import TrainingResult
from equimd.training.setup import prepare
from equimd.training.validation import Errors, evaluate, graph_batches

MOST_MEMBERS = 100


class EnsembleResult(Result):
    """A trained ensemble; ``members`` are folders beside this file, which make it a potential.

    Errors are on the frames of ``split``: those of each member, and of the mean of all. spread_rms is the root mean
    square over force components of the members' standard deviation (eV/Å); correlation is Pearson's, over atoms,
    between the length of that deviation and the length of the mean's force error; NaN without force labels.
    """

    name: str
    members: list[str]
    seeds: list[int]
    bagging: bool
    split: str
    errors: list[Errors]
    mean: Errors
    spread_rms: float
    correlation: Number
    device_hours: float
    cpu_hours: float | None = None
    shared: bool | None = None
    versions: dict[str, str]


def train_members(
    recipe: Recipe,
    folder: str | Path,
    n_members: int,
    bagging: bool = False,
    resume: bool = False,
    progress: bool = True,
    world: World | None = None,
) -> EnsembleResult:
    """Train ``n_members`` ≥ 2 one after another into member-1, member-2, ... of ``folder``, then evaluate their mean.

    Member k has the recipe's seed + k − 1. All train on the same frames; with ``bagging`` each draws data.n_train of
    them itself (without replacement: Bühlmann and Yu, Ann. Stat. 30, 927 (2002)). With ``resume``, what is
    finished is only tested again, and there may be more members than before. The folder can be loaded as a potential.

    Raises:
        InputError: fewer than two members, bagging without data.n_train, and what ``train`` refuses.
    """
    world = world or World()
    folder = Path(folder)
    with world.together():
        if not 2 <= n_members <= MOST_MEMBERS:
            raise InputError(f"--members is {n_members}; accepted are 2 to {MOST_MEMBERS}, which have a spread")
        if bagging and recipe.data.n_train is None:
            raise InputError("--bagging needs data.n_train, the number of frames that each member draws; it is not set")
        if world.is_first:
            check_folder(folder, resume, ensemble=True)
    results = []
    for number in range(1, n_members + 1):
        own = member_recipe(recipe, number, bagging)
        results.append(train(own, folder / MEMBER.format(number), resume, progress, world))
    result = _evaluate(recipe, folder, results, bagging, world)
    with world.together(), explaining_a_full_disk():
        if world.is_first:
            shutil.copyfile(folder / MEMBER.format(1) / START_FILE, folder / START_FILE)
            sealed = seal(json.loads(result.to_json()), "sha256")
            write_text_atomically(folder / ENSEMBLE_FILE, json.dumps(sealed, indent=2, ensure_ascii=False) + "\n")
    return result


def member_recipe(recipe: Recipe, number: int, bagging: bool) -> Recipe:
    """The recipe of member ``number``, from 1."""
    seed = recipe.seed + number - 1
    base = recipe.seed if recipe.data.seed is None else recipe.data.seed
    data = recipe.data.model_copy(update={"seed": base + number - 1 if bagging else base})
    return recipe.model_copy(update={"seed": seed, "data": data, "name": f"{recipe.name}-{number}"})


def _evaluate(
    recipe: Recipe, folder: Path, results: list[TrainingResult], bagging: bool, world: World
) -> EnsembleResult:
    names = [MEMBER.format(number) for number in range(1, len(results) + 1)]
    with world.together():
        device = world.use_device(recipe.device)
        members = [load_potential(folder / name, device, recipe.dtype).requires_grad_(False) for name in names]
        ensemble = EnsemblePotential(members)
    setup = world.first_then_others(lambda: prepare(recipe, device))
    split, frames = ("valid", setup.valid) if setup.test is None else ("test", setup.test)
    mean = evaluate(ensemble, frames, setup.stress, world, recipe.validation.max_edges)
    sums = torch.zeros(8, dtype=torch.float64)
    with world.together():
        for graph in graph_batches(frames, recipe.validation.max_edges, world):
            error = ensemble(graph).forces.to(torch.float64) - graph.forces
            sums += _moments(ensemble.spread(graph).forces.to(torch.float64), error)
    *moments, squares, n_components = world.sum(sums).tolist()
    cpu = [result.cpu_hours for result in results]
    return EnsembleResult(
        name=recipe.name,
        members=names,
        seeds=[recipe.seed + k for k in range(len(names))],
        bagging=bagging,
        split=split,
        errors=[(result.test or result.valid) for result in results],
        mean=mean,
        spread_rms=math.sqrt(squares / n_components),
        correlation=_correlation(*moments),
        device_hours=sum(result.device_hours for result in results),
        cpu_hours=None if None in cpu else sum(map(float, filter(None, cpu))),
        shared=any(result.shared for result in results),
        versions=provenance().versions,
    )


def _moments(spread: Tensor, error: Tensor) -> Tensor:
    """Sums over labelled atoms of 1, x, y, x², y², xy, for lengths x of spread, y of error; Σ spread², 3N of all."""
    known = ~torch.isnan(error).any(dim=1)
    x, y = spread[known].norm(dim=1), error[known].norm(dim=1)
    sums = [torch.ones_like(x), x, y, x * x, y * y, x * y]
    return torch.stack([*(s.sum() for s in sums), spread.square().sum(), spread.new_tensor(spread.numel())]).cpu()


def _correlation(n: float, x: float, y: float, xx: float, yy: float, xy: float) -> float:
    if n < 2:
        return math.nan
    variances = (xx - x * x / n) * (yy - y * y / n)
    return (xy - x * y / n) / math.sqrt(variances) if variances > 0 else math.nan
