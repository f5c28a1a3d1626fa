"""What is simulated."""

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from equimd.results import Checked


class MDSettings(Checked):
    """Settings of a run; frozen, unknown keys are refused.

    temperature_K: of the thermostat, and of the initial velocities where the structure brings none (a relaxed structure
    then equilibrates to half of it in NVE). stride: steps between stored frames. checkpoint_every: steps between
    checkpoints, where the neighbour list is rebuilt. max_temperature_K, max_force (eV/Å): beyond these the run stops.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    ensemble: Literal["nve", "nvt", "npt"] = "nvt"
    steps: int = Field(default=1000, ge=0)
    timestep_fs: float = Field(default=0.5, gt=0, le=20, allow_inf_nan=False)
    temperature_K: float = Field(default=300.0, ge=0, allow_inf_nan=False)
    friction_per_fs: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    pressure_bar: float = Field(default=1.0, allow_inf_nan=False)
    barostat_time_fs: float = Field(default=1000.0, gt=0, allow_inf_nan=False)
    stride: int = Field(default=10, ge=1)
    checkpoint_every: int = Field(default=1000, ge=1)
    seed: int = Field(default=0, ge=0)
    max_temperature_K: float = Field(default=5000.0, gt=0)
    max_force: float = Field(default=200.0, gt=0)
    engine: Literal["ase"] = "ase"

    @model_validator(mode="after")
    def _thermostat(self) -> "MDSettings":
        if self.ensemble != "nve" and self.temperature_K == 0:
            raise ValueError(f"temperature_K is 0 with ensemble {self.ensemble}; accepted is more than 0")
        return self


def make_settings(**values: Any) -> MDSettings:
    """Settings from keywords.

    Raises:
        InputError: one line for the first value that is refused.
    """
    return MDSettings(**values)
