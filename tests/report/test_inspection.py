"""What an inspection finds in files of frames, and what its figure shows."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.errors import InputError
from equimd.frames import LabelKeys, read_frames, write_frames
from equimd.frames import arrays as arrays_module
from equimd.report.data_figure import draw, write_figure
from equimd.report.inspection import Comparison, Inspection, inspect_files, suggest_recipe
from equimd.report.style import house_style


def frames(n: int, seed: int = 0) -> list[Atoms]:
    """Rattled methanols with energies and forces of a spread that is usual."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        atoms = molecule("CH3OH")
        atoms.rattle(0.05, rng=rng)
        forces = rng.normal(size=(6, 3))
        forces -= forces.mean(axis=0)
        atoms.calc = SinglePointCalculator(atoms, energy=-180.0 + 0.1 * rng.normal(), forces=forces)
        out.append(atoms)
    return out


def inspect(tmp_path, *sets, **options):
    files = []
    for k, one in enumerate(sets):
        write_frames(tmp_path / f"{k}.xyz", one)
        files.append(read_frames(tmp_path / f"{k}.xyz", finite=False))
    return inspect_files(files, 4.0, **options)


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_a_sound_file_has_nothing_odd(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(arrays_module, "IN_MEMORY", limit)
    sound = frames(60)
    result = inspect(tmp_path, sound)
    assert isinstance(result, Inspection)
    assert (result.n_frames, result.n_atoms, result.periodic) == (60, [6], 0)
    assert result.elements == {"H": 240, "C": 60, "O": 60}
    assert result.n_labelled == {"energy": 60, "forces": 60, "stress": 0}
    assert result.outliers == []
    assert result.duplicates == []
    assert result.not_finite == []
    assert result.n_net_force == 0
    assert result.warnings == []
    assert result.neighbors.mean == 5
    forces = np.concatenate([atoms.get_forces() for atoms in sound])
    assert result.force_rms == pytest.approx(np.sqrt(np.mean(forces**2)), rel=1e-6)
    assert result.force_quantiles is not None
    assert result.force_quantiles["100"] == pytest.approx(np.linalg.norm(forces, axis=1).max(), rel=1e-6)
    assert result.energy_residual == pytest.approx(0.1 / 6, rel=0.3)


def test_everything_odd_is_found_with_its_frame(tmp_path):
    odd = frames(60)
    odd[7].calc.results["forces"][2] *= 100.0
    odd[20].calc.results["energy"] += 30.0
    results = odd[31].calc.results
    odd[31].positions[5] = odd[31].positions[0] + [0.4, 0.0, 0.0]
    odd[31].calc = SinglePointCalculator(odd[31], **results)
    results = odd[40].calc.results
    odd[40].positions[4] += 50.0
    odd[40].calc = SinglePointCalculator(odd[40], **results)
    odd[45].calc.results["forces"][1, 1] = np.nan
    odd.append(odd[3])
    atom = Atoms("O", info={"config_type": "IsolatedAtom"})
    atom.calc = SinglePointCalculator(atom, energy=-100.0)
    odd.append(atom)
    result = inspect(tmp_path, odd)
    assert {(outlier.frame, outlier.what) for outlier in result.outliers} == {
        (7, "largest force"),
        (20, "energy beyond the fit"),
        (31, "closest atoms"),
        (40, "atoms without neighbours"),
    }
    assert result.duplicates == [(60, 3)]
    assert result.n_not_finite == 1
    assert result.not_finite[0][0] == 45
    assert result.isolated_atoms == {"O": -100.0}
    assert result.n_net_force == 1
    assert result.n_frames == 61


def test_units_that_look_wrong_are_warned_of(tmp_path):
    wrong = frames(20)
    for atoms in wrong:
        atoms.calc.results["forces"] *= 50.0
    (warning,) = inspect(tmp_path, wrong).warnings
    assert "kcal/mol" in warning


def test_splits_are_compared(tmp_path):
    train = frames(30)
    test = [*frames(5, 1), train[4], molecule("H2O")]
    result = inspect(tmp_path, train, test, [bulk("Au")])
    assert isinstance(result, Comparison)
    by_place = {(pair.file[-5], pair.other[-5]): pair for pair in result.shared}
    assert by_place["1", "0"].frames == [(5, 4)]
    assert by_place["1", "0"].new_elements == []
    assert by_place["2", "0"].new_elements == ["Au"]
    text = suggest_recipe(result.files, ["energy=kcal/mol"], ["forces=F", "stress_sign=-1"], result.shared)
    assert "  units: {energy: kcal/mol}\n  keys: {forces: F, stress_sign: -1}\n" in text
    assert f"train: {tmp_path / '0.xyz'}" in text
    assert f"valid: {tmp_path / '2.xyz'}\n" in text
    assert f"# left out: 1 frames of {tmp_path / '1.xyz'} are training frames too\n" in text
    assert "stress: 0.0" in text


def test_the_figure(tmp_path):
    odd = frames(700)
    odd[300].calc.results["forces"][0] *= 100.0
    drawn = []

    def keep(names, surveys):
        with house_style():
            drawn.append(draw(names, surveys))
        write_figure(tmp_path / "one.svg", names, surveys)

    inspect(tmp_path, odd, draw=keep)
    first, forces, energy, distances = drawn[0].axes
    assert [text.get_text() for text in first.texts] == ["line: median, shade: all frames", "300"]
    assert [text.get_text() for text in forces.get_legend().get_texts()] == ["H", "C", "O"]
    shares = sum(float(np.sum(patch.get_data().values)) for patch in forces.patches)
    assert shares == pytest.approx(2 * 3 * 100.0, rel=1e-6)  # bins are half a tenth of a decade wide
    assert energy.patches
    area = sum(float(np.sum(patch.get_data().values * np.diff(patch.get_data().edges))) for patch in distances.patches)
    assert area == pytest.approx(5.0, rel=1e-6)  # neighbours of an atom
    assert (tmp_path / "one.svg").read_text().lstrip().startswith("<?xml")
    inspect(tmp_path, odd[:20], [molecule("H2O")], draw=keep)
    assert [text.get_text() for text in drawn[1].legends[0].get_texts()] == ["0.xyz: 20 frames", "1.xyz: 1 frames"]


def test_without_labels_the_figure_says_so(tmp_path):
    texts = []

    def keep(names, surveys):
        texts.extend(text.get_text() for axes in draw(names, surveys).axes for text in axes.texts)

    result = inspect(tmp_path, [molecule("H2O"), molecule("CH4")], draw=keep)
    assert texts == ["no forces", "no forces", "no energies"]
    assert result.force_rms is None
    with pytest.raises(InputError, match="holds no frames"):
        inspect(tmp_path, [])


def test_a_file_that_is_called_test_is_no_validation_set(tmp_path):
    for name, seed in (("a", 0), ("a-test", 1), ("b", 2)):
        write_frames(tmp_path / f"{name}.xyz", frames(20, seed))
    files = [read_frames(tmp_path / f"{name}.xyz") for name in ("a", "a-test", "b")]
    alone = suggest_recipe(inspect_files(files[:2], 4.0).files)
    assert f"valid: ...  # frames of other trajectories\n  test: {tmp_path / 'a-test.xyz'}\n" in alone
    text = suggest_recipe(inspect_files(files, 4.0).files)
    assert f"valid: {tmp_path / 'b.xyz'}\n  test: {tmp_path / 'a-test.xyz'}\n" in text


def test_sizes_that_differ_weigh_alike(tmp_path):
    """Energies that are E0 of each atom and an offset of the frame's own; the large frames are off by more in all."""
    rng = np.random.default_rng(0)
    mixed = []
    for size in [2] * 30 + [12] * 10:
        atoms = bulk("Cu", cubic=True).repeat((3, 1, 1))[:size]
        atoms.numbers[: rng.integers(1, size)] = 79
        atoms.rattle(0.05, rng=rng)
        energy = float(np.where(atoms.numbers == 79, -3.0, -4.0).sum()) + 0.05 * size * (-1) ** len(mixed)
        energy += 12.0 if size == 12 else 0.0
        atoms.calc = SinglePointCalculator(atoms, energy=energy)
        mixed.append(atoms)
    residual = inspect(tmp_path, mixed).energy_residual
    per_atom = np.array([atoms.get_potential_energy() / len(atoms) for atoms in mixed])
    shares = np.array([(atoms.numbers == 79).mean() for atoms in mixed])
    design = np.stack([shares, 1.0 - shares], axis=1)
    best = per_atom - design @ np.linalg.lstsq(design, per_atom, rcond=None)[0]
    assert residual == pytest.approx(float(np.sqrt(np.mean(best**2))), rel=1e-6)


def test_two_kinds_of_frames_are_no_outliers(tmp_path):
    """Relaxed and disordered crystals, a quarter of them: neither outliers nor forces in Hartree/Bohr."""
    rng = np.random.default_rng(1)
    crystals = []
    for k in range(80):
        atoms = bulk("InP", "zincblende", a=5.87, cubic=True)
        atoms.set_cell(atoms.cell.array * (1.0 + 0.02 * rng.normal()), scale_atoms=True)
        disorder = 0.05 if k % 4 == 3 else 0.001
        shifts = disorder * rng.normal(size=(8, 3))
        atoms.positions += shifts
        energy = -33.0 + 2.0 * float((shifts**2).sum()) + 0.01 * rng.normal() * (k % 4 == 3)
        atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=-2.0 * shifts)
        crystals.append(atoms)
    crystals[5].calc.results["forces"][3] = 40.0
    result = inspect(tmp_path, crystals)
    assert [(one.frame, one.what) for one in result.outliers] == [(5, "largest force")]
    assert result.warnings == []


def test_charges_that_differ_and_lone_atoms_are_told(tmp_path):
    some = frames(12)
    for k, atoms in enumerate(some):
        atoms.info["REF_charge"] = k % 2
    lone = Atoms("H")
    lone.calc = SinglePointCalculator(lone, energy=-13.0)
    result = inspect(tmp_path, [*some, lone])
    charges, single = result.warnings
    assert charges.endswith(
        f"0.xyz, frame 0 has total charge 0 e (REF_charge), {tmp_path / '0.xyz'}, frame 1 has 1 e (REF_charge); a"
        " potential is for one of them: training refuses the set"
    )
    assert single.startswith("1 frames are single atoms (first: frame 12): with config_type=IsolatedAtom")
    ions = inspect(tmp_path, some[1::2])
    assert ions.warnings == []
    assert "\n  charge: 1\n" in suggest_recipe([ions])


def test_names_that_no_frame_has_and_labels_that_nobody_reads(tmp_path):
    some = frames(12)
    for atoms in some[2:]:
        atoms.arrays["pbe_forces"] = atoms.calc.results.pop("forces")
    (message,) = inspect(tmp_path, some).warnings
    assert message.startswith("10 of 12 frames have an array 'pbe_forces'")
    keys = LabelKeys(energy="REF_enregy")
    file = read_frames(tmp_path / "0.xyz", keys=keys, finite=False)
    with pytest.raises(InputError, match="0.xyz: no frame has 'REF_enregy', the key of energy"):
        inspect_files([file], 4.0, keys=keys)


@pytest.mark.parametrize("cutoff", [0.0, -1.0, float("nan"), float("inf"), 1e9])
def test_a_cutoff_that_would_never_end(tmp_path, cutoff):
    write_frames(tmp_path / "0.xyz", frames(2))
    with pytest.raises(InputError, match=r"the cutoff is .* Å; accepted is a positive number up to 30"):
        inspect_files([read_frames(tmp_path / "0.xyz")], cutoff)
