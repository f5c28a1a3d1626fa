"""What an inspection finds in files of frames, and what its figure shows."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator

from equimd.errors import InputError
from equimd.frames import arrays as arrays_module
from equimd.frames import read_frames, write_frames
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
    text = suggest_recipe(result.files, ["energy=kcal/mol"], ["forces=F", "stress_sign=-1"])
    assert "  units: {energy: kcal/mol}\n  keys: {forces: F, stress_sign: -1}\n" in text
    assert f"train: {tmp_path / '0.xyz'}" in text
    assert f"valid: {tmp_path / '1.xyz'}" in text
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
