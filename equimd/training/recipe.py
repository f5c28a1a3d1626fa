"""Recipes: everything that decides a training, typed; a typo is refused with the nearest name.

Paths are relative to the recipe's file. The resolved recipe travels with the weights, in the checkpoint's header.
"""

import difflib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, Field, PrivateAttr, ValidationError, field_validator, model_validator

from equimd.errors import InputError
from equimd.models.auxiliary import lacking
from equimd.models.checkpoint import MODEL_FILE, ModelSettings, find_potential, read_header
from equimd.models.transformer import TransformerSettings
from equimd.training.sections import (
    MANY,
    AugmentationSection,
    BatchSection,
    CheckpointSection,
    DataSection,
    DenoisingSection,
    EarlyStoppingSection,
    EMASection,
    InitSection,
    LoggingSection,
    LossSection,
    OptimizerSection,
    PretrainingSection,
    ScheduleSection,
    Section,
    ValidationSection,
)

_MOST_BYTES = 1 << 22


class Recipe(Section):
    """A training; see the classes of its sections."""

    name: str = Field(min_length=1)
    seed: int = Field(default=0, ge=0, lt=2**63)
    model: ModelSettings
    data: DataSection
    init_from: InitSection | None = Field(None, description="a checkpoint; its name is enough")
    loss: LossSection = LossSection()
    augmentation: AugmentationSection = AugmentationSection()
    denoising: DenoisingSection | None = None
    pretraining: PretrainingSection | None = None
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    ema: EMASection = EMASection()
    batch: BatchSection = BatchSection(n_frames=16)
    epochs: int | None = Field(default=None, ge=1, le=MANY, description="the length; or steps, or max_minutes alone")
    steps: int | None = Field(default=None, ge=1, le=MANY)
    max_minutes: float | None = Field(
        None, gt=0, description="budget: the schedule ends when it is spent (then no two runs are equal bit for bit)"
    )
    validation: ValidationSection = ValidationSection()
    early_stopping: EarlyStoppingSection | None = None
    checkpoint: CheckpointSection = CheckpointSection()
    logging: LoggingSection = LoggingSection()
    dtype: Literal["float32", "float64"] = "float32"
    precision: Literal["float32", "tf32", "bf16"] = Field(
        default="float32", description="of matrix products in training steps; see precision.py"
    )
    device: str = Field(default="auto", description="of several processes, each takes a GPU of its own")
    n_threads: int | None = Field(
        default=None, ge=1, le=1024, description="of each process; None leaves torch's setting"
    )

    _folder: Path = PrivateAttr(default_factory=Path)

    @field_validator("init_from", mode="before")
    @classmethod
    def _name_is_enough(cls, value: Any) -> Any:
        return {"checkpoint": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _length(self) -> "Recipe":
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs is {self.epochs} and steps is {self.steps}; one of them is accepted")
        if self.epochs is None and self.steps is None and self.max_minutes is None:
            raise ValueError("nothing says how long it is; accepted are epochs, steps or max_minutes")
        if self.early_stopping and self.schedule.kind == "plateau":
            patience, wait = self.early_stopping.patience, self.schedule.patience
            if patience <= wait:
                raise ValueError(
                    f"early_stopping.patience is {patience}, schedule.patience {wait}: it would stop before lr is"
                    f" reduced; more than {wait} is accepted"
                )
        return self

    @model_validator(mode="after")
    def _something_to_learn(self) -> "Recipe":
        start = self.loss.start_without_weights
        if start is not None and self.denoising is None:
            raise ValueError(
                f"loss: energy, forces and stress all weigh 0 from {start:g} of the training on, so that nothing is"
                " learned; one weight above 0 is accepted"
            )
        return self

    @model_validator(mode="after")
    def _auxiliary(self) -> "Recipe":
        for name in ("denoising", "pretraining"):
            if getattr(self, name) is not None and (problem := lacking(self.model, told=name == "denoising")):
                raise ValueError(f"{name}: {problem}")
        if self.pretraining is not None and isinstance(self.model, TransformerSettings) and self.model.direct_forces:
            raise ValueError("pretraining: model.direct_forces is true; false is accepted, forces are a gradient then")
        if self.precision != "float32" and self.dtype != "float32":
            raise ValueError(f"precision {self.precision} is for dtype float32; dtype is {self.dtype}")
        return self

    @property
    def rotates(self) -> bool:
        """Whether training frames are rotated."""
        rotate = self.augmentation.rotate
        return self.model.family == "transformer" if rotate == "auto" else rotate

    def path(self, relative: str) -> Path:
        """A path of this recipe, from where we are."""
        return self._folder / relative

    def isolated_atom_energies(self) -> dict[int, float] | None:
        """Energies of isolated atoms in eV by atomic number; None where the recipe leaves them to the data."""
        from ase.data import atomic_numbers

        table = self.data.isolated_atom_energies
        if table is None:
            return None
        if isinstance(table, str):
            path = self.path(table)
            try:
                table = json.loads(_read(path))["isolated_atom_energies"]
                table = {str(symbol): float(energy) for symbol, energy in table.items()}
            except OSError as error:
                raise InputError(f"data.isolated_atom_energies: cannot read {path}: {error.strerror}") from error
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise InputError(
                    f"data.isolated_atom_energies: {path} holds no table 'isolated_atom_energies' of eV by symbol"
                ) from error
        endless = [symbol for symbol, energy in table.items() if not math.isfinite(energy)]
        if endless:
            raise InputError(
                f"data.isolated_atom_energies of {endless[0]} is {table[endless[0]]}; accepted are finite numbers of eV"
            )
        unknown = [symbol for symbol in table if symbol not in atomic_numbers]
        if unknown:
            raise InputError(f"data.isolated_atom_energies names {unknown[0]!r}, which is no chemical symbol")
        return {atomic_numbers[symbol]: energy for symbol, energy in table.items()}

    def isolated_atom_energies_of_parent(self) -> dict[int, float]:
        """Those of the checkpoint of ``init_from``, in eV by atomic number; none without one."""
        if self.init_from is None:
            return {}
        header = read_header(parent_file(self.init_from.checkpoint, self._folder))
        return {int(z): float(energy) for z, energy in header["isolated_atom_energies"].items()}


def make_recipe(values: Mapping[str, Any], folder: str | Path = ".", source: str = "recipe") -> Recipe:
    """A recipe from nested mappings, its paths relative to ``folder``.

    Raises:
        InputError: one line for the first problem: an unknown key with the nearest one, a value out of range.
    """
    values = _with_values_of_parent(dict(values), Path(folder))
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{source}: {_explain(error)}") from error
    recipe._folder = Path(folder)
    return recipe


def parent_file(checkpoint: str, folder: Path) -> Path:
    """The file of a potential that is shipped under this name, or that lies at this path, relative to ``folder``."""
    found = find_potential(checkpoint, folder)
    return found / MODEL_FILE if found.is_dir() else found


def _with_values_of_parent(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Recipe values that take from the checkpoint of ``init_from`` the settings of the model that they do not say."""
    parent, model = values.get("init_from"), values.get("model") or {}
    if isinstance(parent, Mapping):
        parent = parent.get("checkpoint")
    if not isinstance(parent, str) or not parent or not isinstance(model, Mapping):
        return values
    header = read_header(parent_file(parent, folder))
    settings = header["settings"]
    if model.get("family", settings.get("family")) == settings.get("family"):
        model = {**settings, **model}
    return {**values, "model": dict(model)}


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, with overrides such as ``optimizer.lr=1e-3``."""
    import yaml

    path = Path(path)
    try:
        values = yaml.safe_load(_read(path))
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


def _read(path: Path) -> str:
    """The text of a small file; a device that never ends is refused.

    Raises:
        InputError: if it is longer than any recipe.
        OSError, UnicodeDecodeError: if it cannot be read.
    """
    with open(path, "rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise InputError(f"{path} has more than {_MOST_BYTES >> 20} MiB; accepted is a text that a person writes")
    return content.decode("utf-8")


def _override(values: dict[str, Any], override: str) -> None:
    import yaml

    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise InputError(f"override is {override!r}; accepted is key=value, such as optimizer.lr=1e-3")
    *sections, last = key.strip().split(".")
    for section in sections:
        inner = values.get(section)
        if section == "init_from" and isinstance(inner, str):
            inner = {"checkpoint": inner}
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
