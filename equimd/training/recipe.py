"""Recipes: everything that decides a training, typed; a typo is refused with the nearest name.

Paths are relative to the recipe's file. The resolved recipe travels with the weights, in the checkpoint's header.
"""

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from equimd.errors import InputError
from equimd.models.checkpoint import ModelSettings


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """Labelled frames."""

    train: str
    valid: str
    test: str | None = None
    n_train: int | None = Field(default=None, ge=1, description="take this many training frames, drawn with the seed")
    isolated_atom_energies: dict[str, float] | str = Field(
        description="eV by chemical symbol, or the path of a JSON file with such a table under this name"
    )
    units: dict[str, str] | None = Field(default=None, description="energy, length, stress units of the files")
    keys: dict[str, str] | None = Field(default=None, description="names of energy, forces, stress in the files")
    reference: str | None = Field(default=None, description="level of theory of the labels")
    charge: int = 0
    multiplicity: int = Field(default=1, ge=1)


class LossWeights(Section):
    """Weights of the mean squared (or Huber) errors in eV/atom, eV/Å and eV/Å³."""

    energy: float = Field(default=1.0, ge=0)
    forces: float = Field(default=1.0, ge=0)
    stress: float = Field(default=0.0, ge=0)


class LastWeights(LossWeights):
    """Weights for the last part of a training."""

    fraction: float = Field(default=0.2, gt=0, lt=1, description="the part of the training that is the last one")


class LossSection(LossWeights):
    """The loss; see loss.py."""

    kind: Literal["mse", "huber"] = "mse"
    huber_delta: float = Field(default=0.01, gt=0, description="in the units of the error")
    last: LastWeights | None = None


class AugmentationSection(Section):
    """Random rotations of training frames."""

    rotate: bool | Literal["auto"] = Field(default="auto", description="auto: on for the transformer")
    inversion: bool = Field(default=True, description="improper rotations as well: O(3) instead of SO(3)")
    copies: int = Field(default=1, ge=1, description="differently rotated copies of a frame in its batch")


class OptimizerSection(Section):
    """The optimiser."""

    name: Literal["adamw", "muon"] = "adamw"
    lr: float = Field(default=2e-3, gt=0)
    muon_lr: float | None = Field(default=None, gt=0, description="for matrices under Muon; None takes lr")
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0)
    gradient_clip: float | None = Field(default=10.0, gt=0, description="largest norm of the gradient")


class ScheduleSection(Section):
    """Linear warm-up, then a cosine from lr down to final · lr."""

    warmup_steps: int = Field(default=100, ge=0)
    final: float = Field(default=0.01, ge=0, le=1)


class EMASection(Section):
    """Exponential moving average of the weights; it is what is validated and saved."""

    decay: float = Field(default=0.999, ge=0, lt=1)


class BatchSection(Section):
    """Size of a batch: by frames, by edges, or both."""

    n_frames: int | None = Field(default=None, ge=1)
    max_edges: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one(self) -> "BatchSection":
        if self.n_frames is None and self.max_edges is None:
            raise ValueError("give n_frames, max_edges or both")
        return self


class ValidationSection(Section):
    """When and how the average of the weights is validated."""

    every: int = Field(default=1, ge=1, description="epochs between validations")
    metric: Literal["force_mae", "force_rmse", "energy_mae", "energy_rmse"] = "force_mae"
    symmetry_frames: int = Field(default=16, ge=0, description="frames for L_mean and L_equiv; 0 leaves them out")
    n_rotations: int = Field(default=8, ge=2, description="random rotations of each, the same at every validation")
    degree: int | None = Field(
        default=None, ge=1, description="a quadrature of this degree instead of random rotations"
    )
    inversion: bool = True


class EarlyStoppingSection(Section):
    """Stop when the metric has not improved for this many validations."""

    patience: int = Field(ge=1)


class CheckpointSection(Section):
    """How often the state for a resume is written; at the end it always is."""

    minutes: float | None = Field(default=2.0, gt=0)
    steps: int | None = Field(default=None, ge=1)


class Recipe(Section):
    """A training; see the classes of its sections."""

    name: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0)
    model: ModelSettings
    data: DataSection
    loss: LossSection = LossSection()
    augmentation: AugmentationSection = AugmentationSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    ema: EMASection = EMASection()
    batch: BatchSection = BatchSection(n_frames=16)
    epochs: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    max_minutes: float | None = Field(
        None, gt=0, description="budget: the schedule ends when it is spent (then no two runs are equal bit for bit)"
    )
    validation: ValidationSection = ValidationSection()
    early_stopping: EarlyStoppingSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    dtype: Literal["float32", "float64"] = "float32"
    device: str = "auto"
    n_threads: int | None = Field(default=None, ge=1, description="None leaves torch's setting")

    _folder: Path = PrivateAttr(default_factory=Path)

    @model_validator(mode="after")
    def _length(self) -> "Recipe":
        if (self.epochs is None) == (self.steps is None):
            raise ValueError("give either epochs or steps")
        return self

    @property
    def rotates(self) -> bool:
        """Whether training frames are rotated."""
        rotate = self.augmentation.rotate
        return self.model.family == "transformer" if rotate == "auto" else rotate

    def path(self, relative: str) -> Path:
        """A path of this recipe, from where we are."""
        return self._folder / relative

    def isolated_atom_energies(self) -> dict[int, float]:
        """Energies of isolated atoms in eV by atomic number."""
        from ase.data import atomic_numbers

        table = self.data.isolated_atom_energies
        if isinstance(table, str):
            path = self.path(table)
            try:
                table = json.loads(path.read_text(encoding="utf-8"))["isolated_atom_energies"]
                table = {str(symbol): float(energy) for symbol, energy in table.items()}
            except OSError as error:
                raise InputError(f"data.isolated_atom_energies: cannot read {path}: {error.strerror}") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"data.isolated_atom_energies: {path} holds no table 'isolated_atom_energies' of eV by symbol"
                ) from error
        unknown = [symbol for symbol in table if symbol not in atomic_numbers]
        if unknown:
            raise InputError(f"data.isolated_atom_energies names {unknown[0]!r}, which is no chemical symbol")
        return {atomic_numbers[symbol]: energy for symbol, energy in table.items()}

    def isolated_atom_energies_by_symbol(self) -> dict[str, float]:
        """The same by chemical symbol, as a recipe may state them."""
        from ase.data import chemical_symbols

        return {chemical_symbols[z]: energy for z, energy in self.isolated_atom_energies().items()}


def make_recipe(values: Mapping[str, Any], folder: str | Path = ".", source: str = "recipe") -> Recipe:
    """A recipe from nested mappings, its paths relative to ``folder``.

    Raises:
        InputError: one line for the first problem: an unknown key with the nearest one, a value out of range.
    """
    try:
        recipe = Recipe.model_validate(dict(values))
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(error)}") from error
    recipe._folder = Path(folder)
    return recipe


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, with overrides such as ``optimizer.lr=1e-3``."""
    import yaml

    path = Path(path)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise InputError(f"cannot read the recipe {path}: {reason}") from error
    except yaml.YAMLError as error:
        raise InputError(f"the recipe {path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"the recipe {path} is a {type(values).__name__}; accepted is a mapping of keys to values")
    for override in overrides:
        _override(values, override)
    return make_recipe(values, path.parent, str(path))


def _override(values: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override is {override!r}; accepted is key=value, such as optimizer.lr=1e-3")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = values.get(section)
        values[section] = values = dict(inner) if isinstance(inner, dict) else {}
    try:
        values[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InputError(f"override {override!r} has a value that is no YAML") from error


def _explain(error: ValidationError) -> str:
    problems = error.errors()
    # A typo comes before the key that is missing because of it.
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), problems[0])
    *parents, last = first["loc"] or ("",)
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        names = _field_names(Recipe, parents)
        near = difflib.get_close_matches(str(last), names, n=1, cutoff=0.0)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"unknown key {where!r}; {hint}accepted are {', '.join(sorted(names))}"
    if first["type"] == "missing":
        return f"the key {where!r} is missing"
    value = "" if isinstance(first["input"], dict) else f" is {first['input']!r}"
    message = first["msg"].removeprefix("Value error, ")
    return f"{where}{value}: {message}" if where else message


def _field_names(model: Any, location: Iterable[int | str]) -> list[str]:
    """Names of the fields of the (nested) model at ``location`` in a recipe."""
    candidates: list[Any] = [model]
    for part in location:
        inner = [_models(c.model_fields[part].annotation) for c in candidates if part in c.model_fields]
        tagged = [c for c in candidates if _tag(c) == part]  # the location names the tag of a discriminated union
        candidates = inner[0] if inner else tagged or candidates
    return [name for c in candidates for name in c.model_fields]


def _models(annotation: Any) -> list[Any]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [model for argument in get_args(annotation) for model in _models(argument)]


def _tag(model: Any) -> str | None:
    field = model.model_fields.get("family")
    return None if field is None else field.default
