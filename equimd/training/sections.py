"""The sections of a recipe: one class for each thing that decides a training, with its units and its defaults."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """A part of a recipe; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataSection(Section):
    """Labelled frames."""

    train: str
    valid: str
    test: str | None = None
    n_train: int | None = Field(default=None, ge=1, description="take this many training frames, drawn with the seed")
    seed: int | None = Field(default=None, ge=0, description="of the draw of n_train; None takes the recipe's")
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
    """Size of a batch: by frames, by edges, or both; over all processes, however many there are."""

    n_frames: int | None = Field(default=None, ge=1)
    max_edges: int | None = Field(default=None, ge=1)
    max_edges_per_pass: int | None = Field(
        default=None, ge=1, description="most edges of a process in memory at once; gradients of such passes are added"
    )

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
    max_edges: int = Field(default=12_000, ge=1, description="edges in memory at once")


class EarlyStoppingSection(Section):
    """Stop when the metric has not improved for this many validations."""

    patience: int = Field(ge=1)


class CheckpointSection(Section):
    """How often the state for a resume is written; at the end it always is."""

    minutes: float | None = Field(default=2.0, gt=0)
    steps: int | None = Field(default=None, ge=1)


class WandbSection(Section):
    """A run of Weights & Biases."""

    project: str = Field(min_length=1)
    entity: str | None = None
    mode: Literal["online", "offline", "disabled"] = "online"


class LoggingSection(Section):
    """Where metrics go besides metrics.csv."""

    tensorboard: bool = Field(default=False, description="event files in the folder tensorboard of the run")
    wandb: WandbSection | None = None
