import json

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.calculator import Calculator, all_changes

from equimd.analysis.throughput import ThroughputResult, TimingSettings, measure_throughput
from equimd.calculators.forcefield import Evaluation
from equimd.errors import InputError


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Slow(Calculator):
    """No forces, 3 ms per evaluation (times the next factor, if any)."""

    implemented_properties = ("energy", "forces")

    def __init__(self, clock, factors=None):
        super().__init__()
        self.clock, self.factors, self.seen, self.synchronized = clock, factors or (lambda n: 1.0), [], 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, properties, system_changes)
        self.seen.append(self.atoms.positions.copy())
        self.clock.now += 3e-3 * self.factors(len(self.seen))
        self.results = {"energy": 0.0, "forces": np.zeros((len(self.atoms), 3))}


def test_rates_with_a_fake_clock():
    clock, atoms = Clock(), molecule("CH3CH2OH")
    calculator = Slow(clock)
    before, done = atoms.copy(), []
    result = measure_throughput(calculator, atoms, clock=clock, progress=lambda *a: done.append(a))
    assert result.ms_per_forward.median == pytest.approx(3.0)
    assert result.ms_per_step.median == pytest.approx(3.0)
    assert result.ms_per_step.spread == pytest.approx(0.0, abs=1e-9)
    assert not result.unstable
    assert result.ns_per_day == pytest.approx(0.5e-6 * 86_400 / 3e-3)
    assert result.atom_steps_per_device_hour == pytest.approx(9 * 3600 / 3e-3)
    assert result.us_per_atom_step == pytest.approx(3000 / 9)
    assert result.peak_memory_mib > 1
    assert result.n_evaluations == len(calculator.seen)
    # 1 s of warm-up and 5 + 5 blocks of 0.5 s.
    assert clock.now == pytest.approx(6.0, rel=0.05)
    assert atoms == before
    assert done[-1] == (5, 5)


def test_positions_change_at_every_evaluation():
    clock = Clock()
    calculator = Slow(clock)
    measure_throughput(
        calculator, molecule("H2O"), clock=clock, settings=TimingSettings(warmup_seconds=0, block_seconds=0.03)
    )
    seen = calculator.seen
    assert all(not np.array_equal(a, b) for a, b in zip(seen[:-1], seen[1:], strict=True))


def test_warm_up_is_at_least_the_steps_and_is_not_timed():
    clock = Clock()
    calculator = Slow(clock, lambda n: 100.0 if n <= 20 else 1.0)  # compilation in the first calls
    settings = TimingSettings(warmup_steps=40, warmup_seconds=0, block_seconds=0.03)
    result = measure_throughput(calculator, molecule("H2O"), clock=clock, settings=settings)
    assert result.ms_per_step.median == pytest.approx(3.0)
    assert result.ms_per_step.spread == pytest.approx(0.0, abs=1e-9)


def test_a_busy_machine_is_called_unstable():
    clock = Clock()
    calculator = Slow(clock, lambda n: 1.0 + 0.5 * ((n // 15) % 2))
    settings = TimingSettings(warmup_seconds=0, block_seconds=0.03)
    result = measure_throughput(calculator, molecule("H2O"), clock=clock, settings=settings)
    assert result.unstable
    assert max(result.ms_per_step.spread, result.ms_per_forward.spread) > 0.2


def test_a_force_field_that_is_no_ase_calculator_is_synchronised():
    clock = Clock()

    class Field:
        name, device, dtype = "field", "cuda:0", "float32"
        calls = 0

        def evaluate(self, frames):
            self.pending = 2e-3 * len(frames)  # queued on the device
            return Evaluation(np.zeros(len(frames)), [np.zeros((len(f), 3)) for f in frames], [None] * len(frames))

        def synchronize(self):
            self.calls += 1
            clock.now += 1.0

        def peak_memory(self):
            return 12.5

    field = Field()
    settings = TimingSettings(warmup_seconds=0, block_seconds=0)
    result = measure_throughput(field, molecule("H2O"), timestep_fs=1.0, clock=clock, settings=settings)
    assert field.calls >= 20
    assert result.peak_memory_mib == 12.5
    assert (result.name, result.device, result.dtype) == ("field", "cuda:0", "float32")
    assert result.ms_per_step.median == pytest.approx(1000.0)


def test_json_has_the_promised_fields_and_can_be_read_again():
    clock = Clock()
    result = measure_throughput(Slow(clock), molecule("H2O"), clock=clock, settings=TimingSettings(warmup_seconds=0))
    data = json.loads(result.to_json())
    promised = {"n_atoms", "device", "dtype", "timestep_fs", "unstable", "ms_per_step", "ms_per_forward", "ns_per_day"}
    assert promised | {"atom_steps_per_device_hour", "peak_memory_mib", "schema_version"} <= set(data)
    assert set(data["ms_per_step"]) == {"median", "spread"}
    assert ThroughputResult.model_validate_json(result.to_json()) == result


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="timestep_fs is -1"):
        measure_throughput(Slow(Clock()), molecule("H2O"), timestep_fs=-1)
    stuck = Clock()
    calculator = Slow(stuck, lambda n: 0.0)
    with pytest.raises(InputError, match="clock stood still"):
        measure_throughput(calculator, molecule("H2O"), clock=stuck, settings=TimingSettings(warmup_seconds=0))


def test_profile_is_part_of_the_result():
    class Told(Slow):
        def profile(self, atoms):
            return {"forward: layer 0: radial": 2e-3, "backward: layer 0: radial": 1e-3}

        name, device, dtype = "told", "cpu", "float32"

        def evaluate(self, frames):
            return Evaluation(np.zeros(len(frames)), [self.get_forces(f) for f in frames], [None] * len(frames))

    clock, atoms = Clock(), molecule("CH3CH2OH")
    result = measure_throughput(Told(clock), atoms, clock=clock, profile=True)
    assert result.profile_ms == {"forward: layer 0: radial": 2.0, "backward: layer 0: radial": 1.0}
    assert measure_throughput(Told(clock), atoms, clock=clock).profile_ms is None
    with pytest.raises(InputError, match="does not tell where its time goes"):
        measure_throughput(Slow(clock), atoms, clock=clock, profile=True)
