"""Our H5MD in MDAnalysis, with the values that it should find there; MDAnalysis's H5MD and PDB here."""

import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.frames import labels_of, read_list, write_frames
from equimd.units import ASE_TIME_FS, KJ_PER_MOL

pytestmark = pytest.mark.extra  # the extra "dev" installs MDAnalysis


@pytest.fixture
def mda():
    """The package, imported without its own warnings."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import MDAnalysis

    return MDAnalysis


def frames() -> list[Atoms]:
    rng = np.random.default_rng(0)
    made = []
    for k in range(3):
        atoms = bulk("NaCl", "rocksalt", 5.6)
        atoms.set_cell(atoms.cell.array * (1 + 0.01 * k), scale_atoms=True)
        atoms.rattle(0.05, seed=k)
        atoms.set_velocities(rng.normal(size=(2, 3)))
        atoms.calc = SinglePointCalculator(atoms, energy=-7.0 - k, forces=rng.normal(size=(2, 3)))
        atoms.info.update(step=10 * k, time_fs=5.0 * k)
        made.append(atoms)
    return made


@pytest.mark.filterwarnings("ignore")  # MDAnalysis's
def test_mdanalysis_reads_the_same_numbers(mda, tmp_path):
    made = frames()
    write_frames(tmp_path / "a.h5", made)
    made[0].write(tmp_path / "a.xyz")
    universe = mda.Universe(str(tmp_path / "a.xyz"), str(tmp_path / "a.h5"), format="H5MD")
    assert universe.trajectory.n_frames == 3
    for atoms, step in zip(made, universe.trajectory, strict=True):
        # single precision; MDAnalysis has Å, ps, kJ/(mol Å)
        np.testing.assert_allclose(step.positions, atoms.positions, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(step.velocities, 1000.0 * atoms.get_velocities() / ASE_TIME_FS, rtol=1e-6)
        np.testing.assert_allclose(step.forces * KJ_PER_MOL, atoms.get_forces(), rtol=1e-6)
        np.testing.assert_allclose(step.dimensions, atoms.cell.cellpar(), rtol=1e-6)
        assert step.time == pytest.approx(atoms.info["time_fs"] / 1000.0)
        assert step.data["potential_energy"] == atoms.get_potential_energy()


@pytest.mark.filterwarnings("ignore")
def test_a_molecule_has_no_box_in_mdanalysis(mda, tmp_path):
    water = molecule("H2O", cell=[9.0, 9.0, 9.0])
    water.write(tmp_path / "a.xyz")
    for name, pbc in (("a", False), ("b", True)):
        water.pbc = pbc
        write_frames(tmp_path / f"{name}.h5", [water])
        universe = mda.Universe(str(tmp_path / "a.xyz"), str(tmp_path / f"{name}.h5"), format="H5MD")
        assert (universe.dimensions is None) is not pbc


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("box", [None, [9.0, 10.0, 11.0, 90.0, 90.0, 90.0]])
def test_what_mdanalysis_writes_is_read(mda, tmp_path, box):
    water = molecule("H2O")
    write_frames(tmp_path / "top.xyz", [water])
    universe = mda.Universe.empty(3, trajectory=True, velocities=True, forces=True)
    universe.add_TopologyAttr("names", ["O", "H1", "H2"])
    universe.add_TopologyAttr("elements", ["O", "H", "H"])
    universe.add_TopologyAttr("resnames", ["HOH"])
    step = universe.trajectory.ts
    step.positions, step.velocities, step.forces = water.positions, np.ones((3, 3)), 2.0 * np.ones((3, 3))
    step.dimensions, step.time = box, 1.5
    written_in = {"timeunit": "ps", "lengthunit": "Angstrom", "velocityunit": "Angstrom/ps"}
    written_in["forceunit"] = "kJ/(mol*Angstrom)"
    with mda.Writer(str(tmp_path / "a.h5md"), 3, **written_in) as writer:
        writer.write(universe)
        writer.write(universe)
    back = read_list(tmp_path / "a.h5md", topology=tmp_path / "top.xyz")[1]
    np.testing.assert_allclose(back.positions, water.positions, atol=1e-6)
    np.testing.assert_allclose(back.get_velocities() / ASE_TIME_FS, 1e-3, rtol=1e-6)
    np.testing.assert_allclose(labels_of(back)["forces"], 2.0 * KJ_PER_MOL, rtol=1e-6)
    assert back.info["time_fs"] == pytest.approx(1500.0)
    assert back.cell.lengths().tolist() == ([0, 0, 0] if box is None else box[:3])
    assert back.pbc.all() == (box is not None)
    with mda.Writer(str(tmp_path / "a.pdb"), multiframe=True) as writer:
        writer.write(universe)
        writer.write(universe)
    back = read_list(tmp_path / "a.pdb")
    assert [atoms.get_chemical_formula() for atoms in back] == ["H2O"] * 2
    np.testing.assert_allclose(back[1].cell.lengths(), [0, 0, 0] if box is None else box[:3])
