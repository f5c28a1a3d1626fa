"""H5MD: what is written is read back, other programs' layouts too, and a kill leaves a whole file."""

import os

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator

from equimd import units
from equimd.errors import InputError
from equimd.frames import H5MDWriter, PlausibilityWarning, UnitSpec, labels_of, read_frames, read_list, write_frames
from equimd.frames.h5md_units import unit_factor
from equimd.frames.transaction import recover, transaction


def copper(seed: int = 0) -> Atoms:
    atoms = bulk("Cu", cubic=True)
    atoms.set_cell([[3.6, 0.1, 0.2], [0.3, 3.7, 0.4], [-0.5, 0.6, 3.8]], scale_atoms=True)
    atoms.rattle(0.05, seed=seed)
    atoms.set_velocities(np.random.default_rng(seed).normal(size=(4, 3)))
    calc = EMT()
    results = {name: calc.get_property(name, atoms) for name in ("energy", "forces", "stress")}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


def same(a: Atoms, b: Atoms) -> bool:
    one, two = labels_of(a), labels_of(b)
    return (
        np.array_equal(a.positions, b.positions)
        and np.array_equal(a.cell.array, b.cell.array)
        and np.array_equal(a.numbers, b.numbers)
        and np.array_equal(a.pbc, b.pbc)
        and np.allclose(a.get_velocities(), b.get_velocities(), rtol=1e-14)
        and all(np.array_equal(one[name], two[name]) for name in one if name != "forces")
        # eV/Å to kJ/mol/Å and back are two roundings.
        and np.allclose(one["forces"], two["forces"], rtol=5e-16, atol=0)
    )


def test_round_trip_over_several_flushes(tmp_path):
    frames = [copper(seed) for seed in range(7)]
    writer = H5MDWriter(tmp_path / "a.h5")
    for step, atoms in enumerate(frames):
        writer.append(atoms, step=10 * step, time_fs=5.0 * step)
        if step % 3 == 2:
            writer.flush()
    writer.flush()
    back = read_frames(tmp_path / "a.h5")
    assert len(back) == 7
    assert all(same(a, b) for a, b in zip(frames, back, strict=True))
    assert not same(frames[0], list(back)[1])
    assert [atoms.info["step"] for atoms in back] == [0, 10, 20, 30, 40, 50, 60]
    assert list(back)[2].info["time_fs"] == 10.0
    assert len(read_list(tmp_path / "a.h5", stride=3)) == 3


def test_layout_and_units_are_those_of_h5md(tmp_path):
    atoms = copper()
    write_frames(tmp_path / "a.h5md", [atoms])
    with h5py.File(tmp_path / "a.h5md") as file:
        assert file["h5md"].attrs["version"].tolist() == [1, 1]
        assert {"author", "creator", "modules"} <= set(file["h5md"])
        box = file["particles/all/box"]
        assert list(box.attrs["boundary"]) == ["periodic"] * 3
        assert box.attrs["dimension"] == 3
        np.testing.assert_array_equal(box["edges/value"][0], atoms.cell.array)
        for name in ("position", "velocity", "force"):
            element = file[f"particles/all/{name}"]
            assert "unit" in element["value"].attrs
            assert element["time"].attrs["unit"] == "fs"
            assert element["step"].shape == (1,)
        velocity = file["particles/all/velocity/value"][0]
        np.testing.assert_allclose(velocity * units.ASE_TIME_FS, atoms.get_velocities())
        kinetic = 0.5 * (atoms.get_masses()[:, None] * (velocity * units.ASE_TIME_FS) ** 2).sum()
        assert file["observables/kinetic_energy/value"][0] == pytest.approx(kinetic)


def test_quantities_that_are_missing_stay_missing(tmp_path):
    bare = molecule("H2O")
    write_frames(tmp_path / "a.h5", [bare])
    back = read_list(tmp_path / "a.h5")[0]
    assert labels_of(back) == {"energy": None, "forces": None, "stress": None}
    assert not back.pbc.any()


def test_truncate_and_append_continue_the_file(tmp_path):
    frames = [copper(seed) for seed in range(5)]
    write_frames(tmp_path / "a.h5", frames)
    writer = H5MDWriter(tmp_path / "a.h5", append=True)
    writer.truncate(2)
    writer.append(frames[4], step=2, time_fs=2.0)
    writer.flush()
    back = read_list(tmp_path / "a.h5")
    assert len(back) == 3
    assert all(same(a, b) for a, b in zip([*frames[:2], frames[4]], back, strict=True))
    with pytest.raises(InputError, match="holds 3 frames; accepted: 9"):
        writer.truncate(9)
    with pytest.raises(InputError, match="other atoms and pbc than the first"):
        writer.append(molecule("H2O"), step=3, time_fs=3.0)
    with pytest.raises(InputError, match=r"a\.h5 exists"):
        H5MDWriter(tmp_path / "a.h5")
    with pytest.raises(InputError, match="does not exist"):
        H5MDWriter(tmp_path / "b.h5", append=True)


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs."""


@pytest.mark.parametrize("moment", ["before the journal", "journal half written", "applying", "before its end"])
def test_a_kill_at_any_moment_of_a_flush_leaves_old_or_new(tmp_path, monkeypatch, moment):
    path = tmp_path / "a.h5"
    frames = [copper(seed) for seed in range(40)]
    write_frames(path, frames[:20])
    writer = H5MDWriter(path, append=True)
    for step, atoms in enumerate(frames[20:]):
        writer.append(atoms, step=20 + step, time_fs=0.0)

    import equimd.frames.transaction as module

    def killed(*_, **__):
        raise Killed

    if moment == "before the journal":
        monkeypatch.setattr(module.np, "savez", killed)
    elif moment == "journal half written":
        monkeypatch.setattr(module.os, "replace", killed)
        monkeypatch.setattr(module.Path, "unlink", lambda *_, **__: None)
    else:
        original, calls = module._sync, []

        def sync(file):
            calls.append(file)
            original(file)
            if len(calls) == 2:
                if moment == "applying":  # some pages, not all: the file itself is damaged now
                    file.seek(0)
                    file.write(b"\xff" * 2048)
                    file.flush()
                raise Killed

        monkeypatch.setattr(module, "_sync", sync)
    with pytest.raises(Killed):
        writer.flush()
    monkeypatch.undo()
    if moment == "applying":
        with pytest.raises(OSError, match="signature"):  # the negative twin: without the journal it is lost
            h5py.File(path)
    back = read_list(path)
    assert len(back) == (40 if moment in ("applying", "before its end") else 20)
    assert all(same(a, b) for a, b in zip(frames, back, strict=False))
    assert not path.with_name("a.h5.journal").exists()


def test_transactions_are_whole_for_any_file(tmp_path):
    path = tmp_path / "a.bin"
    rng = np.random.default_rng(0)
    mirror = bytearray()
    for _ in range(20):
        with transaction(path) as overlay:
            for _ in range(3):
                offset = int(rng.integers(0, len(mirror) + 1))
                data = rng.bytes(int(rng.integers(1, 9000)))
                overlay.seek(offset)
                overlay.write(data)
                mirror[offset : offset + len(data)] = data
            if rng.random() < 0.3:
                size = int(rng.integers(0, len(mirror)))
                overlay.truncate(size)
                del mirror[size:]
            overlay.seek(0)
            assert overlay.read() == bytes(mirror)
        assert path.read_bytes() == bytes(mirror)
    with pytest.raises(TypeError), transaction(path) as overlay:
        overlay.write(b"never" + None)
    assert path.read_bytes() == bytes(mirror)
    assert not recover(path)


def foreign(path, *, species, unit=True, edges=(10.0, 11.0, 12.0), mass=None):
    """A file as other programs write it: nm and ps, a fixed box of edge lengths, an increment instead of steps."""
    with h5py.File(path, "w") as file:
        file.create_group("h5md").attrs["version"] = [1, 1]
        group = file.create_group("particles/atoms")
        box = group.create_group("box")
        box.attrs["boundary"] = np.array([b"periodic"] * 3)
        box["edges"] = np.array(edges) / 10
        for name, values, text in (
            ("position", np.full((3, 2, 3), 0.1) * np.arange(3)[:, None, None], "nm"),
            ("velocity", np.ones((3, 2, 3)), "nm ps-1"),
        ):
            element = group.create_group(name)
            element["value"] = values.astype(np.float32)
            element["value"][:, 1] += 0.1
            element["step"] = 5
            element["time"] = 0.01
            if unit:
                element["value"].attrs["unit"], element["time"].attrs["unit"] = text, "ps"
                box["edges"].attrs["unit"] = "nm"
        force = group.create_group("force")  # only every other frame
        force["value"], force["step"] = np.ones((2, 2, 3)), np.array([0, 10])
        force["value"].attrs["unit"] = "kJ mol-1 nm-1"
        if species is not None:
            group["species"] = species
        if mass is not None:
            group["mass"] = mass


def test_a_foreign_file_with_its_own_units_and_clocks(tmp_path):
    path = tmp_path / "a.h5"
    kinds = h5py.enum_dtype({"O": 0, "H": 1})
    foreign(path, species=np.array([0, 1], dtype=kinds))
    frames = read_list(path)
    assert frames[0].get_chemical_symbols() == ["O", "H"]
    np.testing.assert_allclose(frames[2].positions[0], 2.0, rtol=1e-6)
    np.testing.assert_allclose(frames[0].get_velocities()[0] / units.ASE_TIME_FS, 0.01, rtol=1e-6)
    assert frames[0].cell.lengths().tolist() == [10, 11, 12]
    assert [atoms.info["step"] for atoms in frames] == [0, 5, 10]
    assert [atoms.info["time_fs"] for atoms in frames] == [0, 10, 20]
    forces = [labels_of(atoms)["forces"] for atoms in frames]
    assert forces[1] is None
    np.testing.assert_allclose(forces[2], 1.0364e-3, rtol=1e-4)


def test_labels_that_are_not_finite_in_part_are_not_dropped(tmp_path):
    path = tmp_path / "a.h5"
    write_frames(path, [copper(0), copper(1), copper(2)])
    with h5py.File(path, "r+") as file:
        force = file["particles/all/force/value"]
        force[1, 2, 0], force[2] = np.nan, np.nan
    with pytest.raises(InputError, match=r"a.h5, frame 1: forces of atom 2 has a value that is not finite \(nan\)"):
        read_list(path)
    forces = [labels_of(atoms)["forces"] for atoms in read_frames(path, finite=False)]
    assert int(np.isnan(forces[1]).sum()) == 1
    assert forces[2] is None


def test_units_are_never_assumed_in_silence(tmp_path, caplog):
    foreign(tmp_path / "a.h5", species=np.array([8, 1]), unit=False, edges=(30.0, 31.0, 32.0))
    with pytest.warns(PlausibilityWarning, match="are positions in nm"):
        assert read_list(tmp_path / "a.h5")[0].positions[1, 0] == pytest.approx(0.1)
    assert "names no unit" in caplog.text
    nm = read_list(tmp_path / "a.h5", units=UnitSpec(energy="kJ/mol", length="nm"))[0]
    assert nm.positions[1, 0] == pytest.approx(1.0)
    assert unit_factor("kcal mol-1 Angstrom-1", "") == pytest.approx(units.KCAL_PER_MOL)
    with pytest.raises(InputError, match="'furlong'; accepted"):
        unit_factor("furlong", "x")


@pytest.mark.parametrize(
    ("species", "mass", "message"),
    [
        (None, None, "has no species"),
        (np.array([2, 1]), np.array([16.0, 1.0]), "type indices"),
        (np.array([0, 300]), None, "accepted: atomic numbers"),
        (np.array([8, 1, 1]), None, "3 species for 2 atoms"),
    ],
)
def test_elements_are_never_guessed(tmp_path, species, mass, message):
    foreign(tmp_path / "a.h5", species=species, mass=mass)
    with pytest.raises(InputError, match=message):
        read_list(tmp_path / "a.h5")
    write_frames(tmp_path / "top.xyz", [Atoms("OH", [[0, 0, 0], [1, 0, 0]])])
    assert read_list(tmp_path / "a.h5", topology=tmp_path / "top.xyz")[0].get_chemical_symbols() == ["O", "H"]


def test_other_hdf5_files_are_refused(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["x"] = 1
    with pytest.raises(InputError, match="HDF5 with x; accepted: H5MD"):
        read_frames(tmp_path / "a.h5")
    (tmp_path / "b.h5").write_bytes(os.urandom(64))
    with pytest.raises(InputError, match="cannot be read"):
        read_frames(tmp_path / "b.h5")
