"""Every planted fault is caught by the row that is there for it; sound calculators and what ships raise no alarm."""

import pytest
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.io import read
from zoo import FAULTS, Sound

from equimd import EquimdCalculator, find_potential, list_potentials
from equimd.analysis.check import check


def crystal():
    """Copper in a small skewed cell."""
    return bulk("Cu")


def failed(certificate):
    return {row.name for row in certificate.rows if row.status == "fail"}


@pytest.mark.parametrize("calculator", list(FAULTS), ids=lambda c: c.__name__)
def test_a_fault_is_caught(calculator):
    certificate = check(calculator(), [crystal()])
    assert failed(certificate) & FAULTS[calculator], certificate.line
    assert not certificate.ok


SALT = bulk("NaCl", "rocksalt", a=5.64)
SOUND = [(c, s) for c in (Sound, LennardJones) for s in (crystal(), molecule("CH3CH2OH"), SALT)]


@pytest.mark.parametrize(
    ("calculator", "structure"),
    [*SOUND, (EMT, crystal()), (EMT, molecule("CH3CH2OH"))],
    ids=lambda x: getattr(x, "__name__", None) or x.symbols.formula.format("hill"),
)
def test_no_false_alarm(calculator, structure):
    certificate = check(calculator(), [structure])
    assert certificate.ok, [row for row in certificate.rows if row.status == "fail"]


def test_no_false_alarm_of_a_self_consistent_method():
    tblite = pytest.importorskip("tblite.ase")
    certificate = check(tblite.TBLite(method="GFN2-xTB", verbosity=0), [molecule("CH3CH2OH")])
    assert certificate.ok, [row for row in certificate.rows if row.status == "fail"]


@pytest.mark.parametrize("name", list_potentials())
def test_shipped_potentials_pass(name):
    certificate = check(EquimdCalculator(name), read(find_potential(name) / "start.xyz"))
    assert certificate.ok, [row for row in certificate.rows if row.status == "fail"]
