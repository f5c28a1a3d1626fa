"""The sections of a recipe: one class for each thing that decides a training, with its units and its defaults."""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from equimd.results import Checked


class Section(Checked):
    """A part of a recipe; unknown keys are refused, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _refuse_settings_of_others(section: Section, choice: str, users: dict[str, str]) -> None:
    """Refuse a setting that is not its default where ``choice`` is not the one that uses it."""
    chosen = getattr(section, choice)
    for name, user in users.items():
        value = getattr(section, name)
        if user != chosen and value != type(section).model_fields[name].default:
            raise ValueError(f"{name} is {value!r}, which is for {choice} {user!r}; {choice} is {chosen!r}")


Files = str | Annotated[list[str], Field(min_length=1)]
"""One file or folder of labelled frames, or several, one after another."""


MANY = 10**9
"""More steps, frames or edges than any training has: larger numbers are typos, and overflow."""
ADAMW_LR = 2e-3
Beta = Annotated[float, Field(ge=0, lt=1)]


class UnitsSection(Section):
    """Units of the files; forces are in energy/length unless they have others."""

    energy: str = "eV"
    length: str = "Å"
    stress: str = "eV/Å³"
    force_energy: str | None = None
    force_length: str | None = None


class KeysSection(Section):
    """Names of labels in the files, None for the usual ones; order and sign of the stress (VASP's are vasp and -1)."""

    energy: str | None = None
    forces: str | None = None
    stress: str | None = None
    virial: str | None = None
    voigt: Literal["ase", "vasp"] = "ase"
    stress_sign: Literal[1, -1] = 1


class DataSection(Section):
    """Labelled frames."""

    train: Files
    valid: Files
    test: Files | None = None
    n_train: int | None = Field(
        default=None, ge=1, le=MANY, description="take this many training frames, drawn with the seed"
    )
    seed: int | None = Field(
        default=None, ge=0, lt=2**63, description="of the draw of n_train; None takes the recipe's"
    )
    isolated_atom_energies: dict[str, float] | str | None = Field(
        default=None,
        description="eV by chemical symbol, or the path of a JSON file with such a table under this name; None takes"
        " those of isolated atoms among the training frames (config_type=IsolatedAtom), then those of the checkpoint of"
        " init_from, and fits the others",
    )
    units: UnitsSection | None = Field(
        default=None, description="of the files; numbers that look wrong are then accepted"
    )
    duplicates: Literal["error", "warn", "allow"] = Field(
        default="error", description="what to do about validation or test frames that are in the training set as well"
    )
    keys: KeysSection | None = None
    reference: str | None = Field(default=None, description="level of theory of the labels")
    accept_predictions: bool = Field(
        default=False, description="train on results that a potential predicted, as distillation does"
    )
    charge: int = Field(default=0, ge=-1000, le=1000, description="of every frame, in e")
    multiplicity: int = Field(default=1, ge=1, le=1000, description="2S + 1 of every frame")

    def files(self, split: str) -> list[str]:
        """The files of train, valid or test."""
        named = getattr(self, split)
        return [named] if isinstance(named, str) else list(named or ())


class LossWeights(Section):
    """Weights of the mean errors, in the units that loss.py states."""

    energy: float = Field(default=1.0, ge=0)
    forces: float = Field(default=1.0, ge=0)
    stress: float = Field(default=0.0, ge=0)


class LastWeights(Section):
    """Weights for the last part of a training; one that is not given stays what it was."""

    fraction: float = Field(default=0.2, gt=0, lt=1, description="the part of the training that is the last one")
    energy: float | None = Field(default=None, ge=0)
    forces: float | None = Field(default=None, ge=0)
    stress: float | None = Field(default=None, ge=0)


class LossStage(Section):
    """Weights from ``start`` on; one that is not given stays what it was."""

    start: float = Field(ge=0, lt=1, description="fraction of the training that is done")
    energy: float | None = Field(default=None, ge=0)
    forces: float | None = Field(default=None, ge=0)
    stress: float | None = Field(default=None, ge=0)


class LossSection(LossWeights):
    """The loss; see loss.py. Its own weights are those of the beginning, ``stages`` and ``last`` change them."""

    kind: Literal["mse", "huber", "mae"] = Field(
        default="mae",
        description="mae: what shipped potentials are trained with, as frames with large forces lead squares",
    )
    huber_delta: float = Field(default=0.01, gt=0, description="in the units of the error")
    energy_per_atom: bool | Literal["sqrt"] = Field(
        default=True, description="what divides the error of an energy: N (true), 1 (false) or √N"
    )
    stages: list[LossStage] = []
    last: LastWeights | None = None
    ramp: float = Field(default=0.0, ge=0, le=1, description="part of the training in which weights move to a stage's")

    @model_validator(mode="after")
    def _in_order(self) -> "LossSection":
        starts = [stage.start for stage in self.all_stages]
        if starts != sorted(set(starts)):
            listed = ", ".join(f"{start:g}" for start in starts)
            raise ValueError(f"stages (last included) start at {listed}; accepted are starts that ascend")
        return self

    @property
    def all_stages(self) -> list[LossStage]:
        """``stages``, then ``last`` as one of them."""
        if self.last is None:
            return self.stages
        weights = self.last.model_dump(exclude={"fraction"})
        return [*self.stages, LossStage(start=1.0 - self.last.fraction, **weights)]

    @property
    def start_without_weights(self) -> float | None:
        """Fraction of the training from which on all weights are zero, until the next stage; None without any."""
        weights = {term: getattr(self, term) for term in ("energy", "forces", "stress")}
        start = 0.0
        for stage in self.all_stages:
            if stage.start > start and not any(weights.values()):
                return start
            given = {term: getattr(stage, term) for term in weights}
            weights |= {term: weight for term, weight in given.items() if weight is not None}
            start = stage.start
        return None if any(weights.values()) else start

    def largest(self, term: str) -> float:
        """The largest weight that a term ever has."""
        return max([getattr(self, term), *(getattr(stage, term) or 0.0 for stage in self.all_stages)])


class AugmentationSection(Section):
    """Random rotations of training frames."""

    rotate: bool | Literal["auto"] = Field(default="auto", description="auto: on for the transformer")
    inversion: bool = Field(default=True, description="improper rotations as well: O(3) instead of SO(3)")
    copies: int = Field(default=1, ge=1, le=1000, description="differently rotated copies of a frame in its batch")


class OptimizerSection(Section):
    """The optimiser.

    Muon is the default of both families: at equal steps AdamW leaves two to three times the error (docs/ablation.md).
    The learning rate is what the smaller shipped networks take; that of AdamW is 2e-3 unless it is given.
    """

    name: Literal["adamw", "muon"] = "muon"
    lr: float = Field(default=8e-3, gt=0, le=10, description="2e-3 for adamw if none is given")
    muon_lr: float | None = Field(default=None, gt=0, le=10, description="for matrices under Muon; None takes lr")
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    muon_split: bool = Field(default=True, description="orthogonalise queries, keys, gates, paths each by themselves")
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    weight_decay: float = Field(default=0.0, ge=0, description="of matrices; neither of biases nor of embeddings")
    gradient_clip: float | None = Field(default=10.0, gt=0, description="largest norm of the gradient")

    @model_validator(mode="after")
    def _of_its_name(self) -> "OptimizerSection":
        _refuse_settings_of_others(self, "name", dict.fromkeys(("muon_lr", "muon_momentum", "muon_split"), "muon"))
        if self.name == "adamw" and "lr" not in self.model_fields_set:
            object.__setattr__(self, "lr", ADAMW_LR)
        return self


class ScheduleSection(Section):
    """The learning rate: linear warm-up, then as ``kind`` says; see schedule.py."""

    kind: Literal["cosine", "linear", "constant", "wsd", "plateau"] = "cosine"
    warmup_steps: int = Field(default=100, ge=0, le=MANY)
    final: float = Field(default=0.01, ge=0, le=1, description="of lr: at the end, or at the least for plateau")
    decay_fraction: float = Field(default=0.2, gt=0, le=1, description="wsd: the last part, in which lr decays")
    factor: float = Field(default=0.5, gt=0, lt=1, description="plateau: what lr is multiplied with")
    patience: int = Field(
        default=5, ge=1, le=MANY, description="plateau: validations without a better metric before that"
    )

    @model_validator(mode="after")
    def _of_its_kind(self) -> "ScheduleSection":
        users = {"decay_fraction": "wsd", "factor": "plateau", "patience": "plateau"}
        _refuse_settings_of_others(self, "kind", users)
        return self


class DenoisingSection(Section):
    """A part of the frames is denoised instead of fitted (DeNS); see objective.py."""

    probability: float = Field(default=0.25, gt=0, lt=1, description="that a frame is denoised instead")
    per: Literal["batch", "frame"] = Field(
        default="batch", description="whole batches, at less cost where they are small, or frames one by one"
    )
    sigma: float = Field(default=0.05, gt=0, le=1, description="standard deviation of the noise in Å")
    atoms: float = Field(default=1.0, gt=0, le=1, description="the part of a frame's atoms that gets noise")
    weight: float = Field(default=0.1, gt=0, description="of the mean squared error of noise / sigma")
    energy: float = Field(
        default=0.0, ge=0, description="of the error of the clean structure's energy, times loss.energy"
    )
    final: float = Field(default=0.0, ge=0, le=1, description="part of the weight at the end, to which it falls evenly")


class PretrainingSection(Section):
    """Forces come from a head at first, from the gradient of the energy then; see objective.py."""

    fraction: float = Field(default=0.3, gt=0, lt=1, description="the part of the training that is the first one")
    warmup: float = Field(default=0.02, ge=0, lt=1, description="the part after it in which lr rises once more")


class EMASection(Section):
    """Average of the weights; it is what is validated and saved. decay 0 switches it off."""

    decay: float = Field(default=0.999, ge=0, lt=1)
    fraction: float | None = Field(
        default=None,
        gt=0,
        lt=0.5,
        description="instead of decay: mean age of the averaged weights, as a fraction of the steps done so far",
    )


class InitSection(Section):
    """Start from the weights of a checkpoint; see initial.py."""

    checkpoint: str = Field(min_length=1, description="name of a potential, or path of its folder or file")
    freeze: list[str] = Field(default=[], description="embedding, layers, readout, or patterns of parameters' names")
    keep_elements: bool = Field(default=False, description="keep elements that the training set lacks")
    shift: Literal["auto", "refit", "keep"] = "auto"


class BatchSection(Section):
    """Size of a batch: by frames, by edges, or both; over all processes, however many there are."""

    n_frames: int | None = Field(default=None, ge=1, le=MANY)
    max_edges: int | None = Field(default=None, ge=1, le=MANY)
    max_edges_per_pass: int | None = Field(
        default=None,
        ge=1,
        le=MANY,
        description="most edges of a process in memory at once; gradients of such passes are added",
    )

    @model_validator(mode="after")
    def _one(self) -> "BatchSection":
        if self.n_frames is None and self.max_edges is None:
            raise ValueError("give n_frames, max_edges or both")
        return self


class ValidationSection(Section):
    """When and how the average of the weights is validated."""

    every: int = Field(default=1, ge=1, le=MANY, description="epochs between validations")
    metric: Literal["force_mae", "force_rmse", "energy_mae", "energy_rmse"] = "force_mae"
    symmetry_frames: int = Field(
        default=16, ge=0, le=MANY, description="frames for L_mean and L_equiv; 0 leaves them out"
    )
    n_rotations: int = Field(
        default=8, ge=2, le=10_000, description="random rotations of each, the same at every validation"
    )
    degree: int | None = Field(
        default=None, ge=1, le=32, description="a quadrature of this degree instead of random rotations"
    )
    inversion: bool = True
    max_edges: int = Field(
        default=12_000, ge=1, le=MANY, description="edges in memory at once, of the record of the symmetry too"
    )


class EarlyStoppingSection(Section):
    """Stop when the metric has not improved for this many validations."""

    patience: int = Field(ge=1, le=MANY)


class CheckpointSection(Section):
    """How often the state for a resume is written; at the end it always is."""

    minutes: float | None = Field(default=2.0, gt=0)
    steps: int | None = Field(default=None, ge=1, le=MANY)


class WandbSection(Section):
    """A run of Weights & Biases."""

    project: str = Field(min_length=1)
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"


class LoggingSection(Section):
    """Where metrics go besides metrics.csv."""

    tensorboard: bool = Field(default=False, description="event files in the folder tensorboard of the run")
    wandb: WandbSection | None = None
