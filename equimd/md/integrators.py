"""ASE's dynamics behind one small interface: step, and the state that a resume needs besides positions and momenta."""

import warnings
from typing import Any

import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.verlet import VelocityVerlet

from equimd.errors import InputError
from equimd.md.settings import MDSettings
from equimd.units import BAR

_BAROSTAT = ("p_eps", "force_eps")


class Integrator:
    """One of ASE's integrators.

    NVE is velocity Verlet; NVT is ASE's Langevin (Vanden-Eijnden & Ciccotti 2006) with the centre of mass free; NPT
    scales the volume isotropically with a Langevin barostat (BAOAB, Quigley & Probert 2004), which needs the stress and
    three periodic directions.
    """

    def __init__(self, atoms: Atoms, settings: MDSettings, rng: np.random.Generator) -> None:
        self.rng = rng
        step = settings.timestep_fs * units.fs
        self.dynamics: Any
        if settings.ensemble == "nve":
            self.dynamics = VelocityVerlet(atoms, step)
        elif settings.ensemble == "nvt":
            self.dynamics = Langevin(
                atoms,
                step,
                temperature_K=settings.temperature_K,
                friction=settings.friction_per_fs / units.fs,
                fixcm=False,
                rng=rng,
            )
        else:
            if not atoms.pbc.all():
                raise InputError(f"ensemble npt with pbc {atoms.pbc.tolist()}; it needs three periodic directions")
            if "stress" not in getattr(atoms.calc, "implemented_properties", ("stress",)):
                raise InputError("ensemble npt with a calculator that gives no stress; accepted: nvt or nve")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # says which barostat mass its heuristic gives
                self.dynamics = LangevinBAOAB(
                    atoms,
                    step,
                    temperature_K=settings.temperature_K,
                    externalstress=-settings.pressure_bar * BAR,
                    hydrostatic=True,
                    T_tau=units.fs / settings.friction_per_fs,
                    P_tau=settings.barostat_time_fs * units.fs,
                    rng=rng,
                )

    def step(self) -> None:
        """One time step; the atoms hold the new positions and momenta."""
        self.dynamics.step()

    def refresh(self) -> None:
        """Forget accelerations that were computed before the calculator was reset."""
        if hasattr(self.dynamics, "accel"):
            self.dynamics.accel = self.dynamics.atoms.get_forces() / self.dynamics.masses

    def state(self) -> dict[str, Any]:
        """What a resume needs, in JSON's types: the generator, and in NPT the barostat's momentum and force.

        The barostat's force belongs to the momenta of half a step ago and cannot be computed again.
        """
        barostat = {name: float(getattr(self.dynamics, name)) for name in _BAROSTAT if hasattr(self.dynamics, name)}
        return {"rng": self.rng.bit_generator.state, "barostat": barostat}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from ``state``."""
        self.rng.bit_generator.state = state["rng"]
        for name, value in state["barostat"].items():
            setattr(self.dynamics, name, value)
