"""What the README and docs/openmm.md show of OpenMM runs as it stands, from top to bottom."""

import re
from pathlib import Path

import openmm
import pytest
from openmm import unit
from openmm_systems import KJ_PER_MOL_IN_EV  # registers the entry point, too

from equimd.calculators.ase import EquimdCalculator

ROOT = Path(__file__).resolve().parents[2]


def blocks(page: str) -> list[str]:
    found = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    return [block for block in found if "openmm" in block or page == "docs/openmm.md"]


@pytest.mark.parametrize(("page", "count"), [("README.md", 1), ("docs/openmm.md", 7)])
def test_code_of_the_page_runs(page, count, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    assert len(blocks(page)) == count
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    state = names["simulation"].context.getState(positions=True, energy=True)
    atoms = names["atoms"]
    assert state.getStepCount() > 0
    atoms.positions = state.getPositions(asNumpy=True).value_in_unit(unit.angstrom)
    calc = EquimdCalculator("alanine-dipeptide-equivariant", device="cpu")
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) * KJ_PER_MOL_IN_EV
    # Positions in single precision on the way through the CPU platform: 1e-6 Å at some eV/Å.
    assert energy == pytest.approx(calc.get_potential_energy(atoms), abs=1e-3, rel=0)


def test_every_option_is_in_the_page():
    from equimd.calculators.openmm import _OPTIONS

    text = (ROOT / "docs" / "openmm.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in _OPTIONS)


def test_the_page_turns_a_cell_back(tmp_path, monkeypatch):
    """The forces that the page turns back are those of ASE in the user's frame."""
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    first, _, boxes = blocks("docs/openmm.md")[:3]
    for block in (first.split("potential =")[0], boxes):
        exec(block, names)
    with pytest.raises(openmm.OpenMMException, match="periodic box vector"):
        openmm.System().setDefaultPeriodicBoxVectors(*(names["water"].cell.array / 10))
    water = names["water"]
    calc = EquimdCalculator("water-transformer", device="cpu", dtype="float64")
    forces = names["forces"] * KJ_PER_MOL_IN_EV / 10
    wanted = calc.get_forces(water)
    assert abs(forces - wanted).max() < 1e-9 * abs(wanted).max()
