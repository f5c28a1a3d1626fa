"""``equimd check`` on calculators of all kinds."""

import json
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones

from equimd import check
from equimd.errors import FailedError, InputError

ROWS = {
    *("rotation", "inversion", "translation", "lattice_translation", "permutation", "extensivity", "locality"),
    *("gradient", "stress", "jacobian", "smoothness", "batch", "cell_orientation", "repeatability"),
    *("isolated_atom", "far_dimer", "neighbors"),
}
ZOO = Path(__file__).parents[1] / "contract" / "zoo.py"


def test_a_sound_calculator_gets_a_certificate(run, tmp_path):
    bulk("Cu").write(tmp_path / "cu.xyz")
    result = run("check", "ase.calculators.emt:EMT", tmp_path / "cu.xyz", "--json", tmp_path / "out.json")
    assert result.exit_code == 0, result.output
    assert "17 of 17 checks passed" in result.output
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["ok"] is True
    assert found["calculator"] == "emt"
    assert {row["name"] for row in found["rows"]} == ROWS
    for row in found["rows"]:
        assert row["status"] == "pass"
        assert 0 <= row["value"] <= row["tolerance"]
        assert row["unit"]


def test_a_fault_ends_in_1_and_stays_json(run, tmp_path):
    bulk("Cu").write(tmp_path / "cu.xyz")
    result = run("check", f"{ZOO}:DroppedVirial", tmp_path / "cu.xyz", "--json", "-")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["ok"] is False
    assert {row["name"]: row["status"] for row in found["rows"]}["stress"] == "fail"


def test_molecules_and_default_structures():
    for certificate in (check(LennardJones(), molecule("CH3CH2OH")), check(EMT())):
        status = {row.name: row.status for row in certificate.rows}
        assert status["stress"] == status["cell_orientation"] == "not applicable"
        assert certificate.ok
        assert certificate.structures == ["C2H6O"]
        assert "14 of 14 checks passed, not applicable: lattice_translation, cell_orientation" in certificate.line


def test_a_symmetry_that_is_learned_may_be_broken_a_little(tmp_path):
    """Of a transformer; the same deviation of a calculator that says nothing is a fault."""
    from equimd import EquimdCalculator

    calculator = EquimdCalculator("ethanol-transformer")
    rows = {row.name: row for row in check(calculator).rows}
    assert 1e-4 < rows["rotation"].value < rows["rotation"].tolerance
    assert "learned" in rows["rotation"].why
    assert rows["translation"].tolerance < 1e-3
    calculator.learned_symmetry = False
    assert {row.name for row in check(calculator).rows if row.status == "fail"} == {"rotation", "inversion"}


def test_who_raises_for_the_same_structure_fails():
    """Refusing atoms alone is allowed, refusing a rotated crystal is not."""

    class KnowsNoMolecules(EMT):
        def calculate(self, atoms=None, *args):
            if not atoms.pbc.all():
                raise NotImplementedError("no molecules")
            return super().calculate(atoms, *args)

    allowed = {row.name: row for row in check(KnowsNoMolecules(), bulk("Cu")).rows}
    assert allowed["isolated_atom"].status == "not applicable"
    assert "no molecules" in allowed["isolated_atom"].note
    assert all(row.status != "fail" for row in allowed.values())

    class RightHanded(EMT):
        def calculate(self, atoms=None, *args):
            if np.linalg.det(atoms.cell.array) < 0:
                raise RuntimeError("mirrored")
            return super().calculate(atoms, *args)

    rows = {row.name: row for row in check(RightHanded(), bulk("Cu")).rows}
    assert rows["inversion"].status == "fail"
    assert "mirrored" in rows["inversion"].note
    assert rows["cell_orientation"].status == "pass", "descriptions of the cell that it takes are compared"


def test_charges_are_refused():
    ion = molecule("CH3CH2OH")
    ion.info["charge"] = 1
    with pytest.raises(InputError, match="C2H6O: total charge is 1 e; accepted: neutral singlets"):
        check(LennardJones(), ion)
    ion.info["charge"] = 0
    assert check(LennardJones(), ion).ok


def test_other_tolerances():
    value = next(row.value for row in check(EMT(), bulk("Cu")).rows if row.name == "gradient")
    tight, loose = (check(EMT(), bulk("Cu"), tolerances={"gradient": value * x}) for x in (0.5, 2.0))
    assert not tight.ok
    assert loose.ok


class Raises(EMT):
    def calculate(self, *args, **kwargs):
        raise RuntimeError("out of memory\nsecond line")


class IsNaN(EMT):
    def calculate(self, *args, **kwargs):
        super().calculate(*args, **kwargs)
        self.results["forces"] = self.results["forces"] * np.nan


def test_what_cannot_be_checked_is_said_in_one_line(tmp_path):
    with pytest.raises(
        InputError, match="Cu8, periodic cannot be computed: the calculator refuses: RuntimeError: out of"
    ):
        check(Raises(), bulk("Cu"))
    with pytest.raises(FailedError, match="the energy or forces of Cu8, periodic are not finite"):
        check(IsNaN(), bulk("Cu"))
    with pytest.raises(InputError, match="raises cannot compute any of C2H6O .RuntimeError., Cu, periodic"):
        check(Raises())
    with pytest.raises(InputError, match="there is no check 'rotations'; accepted are repeatability"):
        check(EMT(), bulk("Cu"), tolerances={"rotations": 1.0})
    with pytest.raises(InputError, match="4 structures given; accepted are 1 to 3"):
        check(EMT(), [bulk("Cu")] * 4)
    flat = bulk("Cu")
    flat.cell[2] = flat.cell[1]
    with pytest.raises(InputError, match="periodic in 3 directions, but its cell is flat"):
        check(EMT(), flat)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.py:make"], "there is no file nothing.py"),
        (["ase.calculators.emt:EMT", "--tolerance", "rotation"], "--tolerance is 'rotation'"),
        (["ase.calculators.emt:EMT", "--symmetrize", "average"], "--symmetrize is average, but"),
        (["ase.calculators.emt:EMT", "nothing.xyz"], "nothing.xyz"),
    ],
)
def test_bad_input_ends_in_2(refused, arguments, message):
    assert message in refused("check", *arguments)


def test_other_commands_take_somebody_elses_calculator(run, tmp_path):
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.05, seed=0)
    labelled = atoms.copy()
    labelled.info["charge"] = 1  # which only equimd's own potentials may mind
    labelled.info["REF_energy"], labelled.arrays["REF_forces"] = 1.0, np.ones((4, 3))
    atoms.write(tmp_path / "cu.xyz")
    labelled.write(tmp_path / "labelled.xyz")
    name, structure = "ase.calculators.emt:EMT", tmp_path / "cu.xyz"
    for command in (
        ["evaluate", name, tmp_path / "labelled.xyz"],
        ["equivariance", name, structure, "--degree", 2],
        ["throughput", name, structure, "--block-seconds", 0.01],
        ["md", name, structure, "-o", tmp_path / "run.h5", "--steps", 2],
    ):
        result = run(*command)
        assert result.exit_code == 0, (command, result.stderr)
    found = json.loads(run("evaluate", name, tmp_path / "labelled.xyz", "--json", "-").stdout)
    atoms.calc = EMT()
    assert found["force"]["mae"] == pytest.approx(np.abs(atoms.get_forces() - 1.0).mean(), rel=1e-6)
