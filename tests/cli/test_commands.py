"""Each command on a tiny potential: what it prints, what it writes, and that JSON stands alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator

import equimd
from equimd.cli import app
from equimd.frames import read_list, write_frames

# The same package in a process of its own, installed or not.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(equimd.__file__).parents[1])}


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def as_json(result) -> dict:
    """What was printed with --json -, alone on standard output."""
    assert result.exit_code == 0, (result.stderr, result.exception)
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_help_and_version(run):
    from equimd import __version__

    result = run("--help")
    assert result.exit_code == 0
    commands = "train md evaluate equivariance throughput check compare report info data"
    for command in commands.split():
        assert command in result.stdout
    assert run("--version").stdout == f"equimd {__version__}\n"


def test_help_imports_nothing_heavy():
    heavy = "torch numpy ase openmm matplotlib pydantic scipy"
    code = f"import sys, equimd.cli; print([m for m in {heavy.split()} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.strip() == "[]"


def test_info(run):
    result = as_json(run("info", "--json", "-"))
    assert result["schema_version"] == 1
    assert "cpu" in result["devices"]
    assert result["provenance"]["versions"]["equimd"]
    assert "torch" in run("info").stdout


def test_slower_kernels_are_told(run, potentials, labelled, monkeypatch):
    from equimd.kernels import token_run

    right = token_run.Run.kernel

    def broken(self, name, *args, **names):
        if name != "attention_back":
            right(self, name, *args, **names)

    assert run("evaluate", potentials["transformer"], labelled).stderr == ""
    monkeypatch.setattr(token_run.Run, "kernel", broken)
    result = run("evaluate", potentials["transformer"], labelled)
    assert result.exit_code == 0
    assert "equimd: warning: compiled kernels are wrong here" in result.stderr


def test_data_inspect(run, labelled):
    result = as_json(run("data", "inspect", labelled, "--json", "-"))
    assert result["n_frames"] == 3
    assert result["elements"] == {"H": 6, "O": 3}
    assert result["n_labelled"] == {"energy": 3, "forces": 3, "stress": 0}
    assert result["energy_per_atom"][0] == pytest.approx(-138.2 / 3)
    assert result["duplicates"] == []
    assert result["neighbors"]["mean"] == 2
    shown = run("data", "inspect", labelled, "--cutoff", 3, "--figure", "look.png").stdout
    assert "Frames with forces" in shown
    assert f"train: {labelled}" in shown
    assert Path("look.png").read_bytes().startswith(b"\x89PNG")


PDB = """CRYST1   20.000   20.000   20.000  90.00  90.00  90.00 P 1           1
MODEL        1
HETATM    1  O   HOH A   1       0.000   0.000   0.119  1.00  0.00           O
HETATM    2  H1  HOH A   1       0.000   0.763  -0.477  1.00  0.00           H
HETATM    3  H2  HOH A   1       0.000  -0.763  -0.477  1.00  0.00           H
HETATM    4 AR    AR B   2       9.000   9.000   9.000  1.00  0.00          AR
ENDMDL
END
"""


def test_trajectories_of_others_without_their_solvent_and_box(run, potentials):
    Path("a.pdb").write_text(PDB)
    part = ("--select", "water", "--no-pbc")
    for command in (("equivariance", potentials["equivariant"], "a.pdb"), ("data", "inspect", "a.pdb")):
        done = run(*command, *part, "--json", "-")
        assert done.exit_code == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["lossy"].startswith("pdb: positions rounded to 0.001 Å")
        assert done.stderr.startswith("equimd: warning: a.pdb: pdb: positions rounded to 0.001 Å")
        assert done.stderr.count("\n") == 1
        assert "Lossy" in run(*command, *part).stdout
    assert result["elements"] == {"H": 2, "O": 1}
    assert result["periodic"] == 0
    done = run("evaluate", potentials["equivariant"], "a.pdb", *part)
    assert "none of 1 frames has labels" in done.stderr
    assert "20 Å × 20 Å × 20 Å" in run("data", "inspect", "a.pdb").stderr
    short = ("--steps", "2", "-o", "a.h5", "--ensemble", "nve")
    assert run("md", potentials["equivariant"], "a.pdb", *part, *short).exit_code == 0
    assert len(read_list("a.h5")[0]) == 3
    assert "element Ar" in run("md", potentials["equivariant"], "a.pdb", *short[:3], "b.h5").stderr


def test_a_recipe_to_start_from_is_not_broken_into_lines(run, labelled, tmp_path):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    labelled = Path(labelled).rename(folder / "a.xyz")
    lines = run("data", "inspect", labelled).stdout.splitlines()
    assert any(line.strip() == f"train: {labelled}" for line in lines)


def test_data_inspect_compares_files(run, labelled):
    frames = read_list(labelled)
    write_frames("other.xyz", [frames[2], frames[0]])
    files = ("data", "inspect", labelled, "other.xyz")
    result = as_json(run(*files, "--json", "-"))
    assert [one["n_frames"] for one in result["files"]] == [3, 2]
    (shared,) = result["shared"]
    assert shared["n_frames"] == 2
    assert shared["frames"] == [[0, 2], [1, 0]]
    shown = run(*files, "--figure", "look.svg").stdout
    assert "other.xyz in labelled.xyz" in shown
    assert "valid: ..." in shown
    assert "left out: 2 frames of other.xyz are training frames too" in shown
    assert Path("look.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize("family", ["equivariant", "transformer"])
def test_evaluate(run, potentials, labelled, family):
    result = as_json(run("evaluate", potentials[family], labelled, "--json", "-"))
    assert result["schema_version"] == 1
    assert result["n_frames"] == 3
    assert set(result["force"]) == {"mae", "rmse"}
    assert result["stress"] is None


def test_units_of_the_file_are_taken(run, potentials, labelled):
    plain = as_json(run("evaluate", potentials["equivariant"], labelled, "--json", "-"))
    scaled = as_json(run("evaluate", potentials["equivariant"], labelled, "--unit", "energy=kcal/mol", "--json", "-"))
    assert scaled["energy"]["mae"] != pytest.approx(plain["energy"]["mae"], rel=0.1)


def test_equivariance(run, potentials, labelled):
    exact = as_json(run("equivariance", potentials["equivariant"], labelled, "--degree", 3, "--json", "-"))
    broken = as_json(run("equivariance", potentials["transformer"], labelled, "--degree", 3, "--json", "-"))
    assert exact["group"]["kind"] == "quadrature"
    assert exact["force"]["relative"] < 1e-5  # float32
    assert broken["force"]["rmse_equiv"] > 100 * exact["force"]["rmse_equiv"]
    assert broken["loss"]["percent_of_loss"] > exact["loss"]["percent_of_loss"]
    shown = run("equivariance", potentials["transformer"], labelled, "--random", 4, "--stride", 2)
    assert "Share of the loss" in shown.stdout


def crystals(**info):
    """Two crystals of hydrogen and oxygen, labelled with forces and stress."""
    frames = []
    for k in range(2):
        atoms = Atoms(
            "OHHO", [[0, 0, 0], [1.0, 0.1, 0], [0.2, 1.0, 0.3], [1.8, 1.7, 1.5]], cell=[3.4, 3.5, 3.6], pbc=True
        )
        atoms.rattle(0.02, seed=k)
        forces = np.arange(12.0).reshape(4, 3) - 5.5
        atoms.calc = SinglePointCalculator(atoms, energy=-200.0, forces=forces, stress=np.full(6, 0.01))
        atoms.info.update({key: values[k] for key, values in info.items()})
        frames.append(atoms)
    return frames


def test_parts_and_stress_are_shown(run, potentials):
    write_frames("crystals.xyz", crystals())
    command = ("equivariance", potentials["transformer"], "crystals.xyz", "--degree", 2)
    shown = run(*command)
    assert shown.exit_code == 0, shown.stderr
    for text in ("rotations alone", "from inversion", "Spread of the stress", "asymmetry", "GPa", "rounding floor"):
        assert text in shown.stdout
    assert "Suspicious" not in shown.stdout
    result = as_json(run(*command, "--json", "-"))
    for block, whole in (("force", "rmse_equiv"), ("energy", "std_per_atom"), ("stress", "rmse_equiv")):
        part = result[block]
        assert part[whole] ** 2 == pytest.approx(part["proper"] ** 2 + part["inversion"] ** 2, rel=1e-9)
    assert result["force"]["floor_kind"] == "measured"
    assert "from inversion" not in run(*command, "--no-inversion").stdout


def test_errors_by_group_and_stress_in_gpa_are_shown(run, potentials):
    write_frames("crystals.xyz", crystals(config_type=["bulk", "liquid"]))
    shown = run("evaluate", potentials["equivariant"], "crystals.xyz").stdout
    for text in ("By config_type", "bulk", "liquid", "GPa", "meV/Å³"):
        assert text in shown
    write_frames("one.xyz", crystals(config_type=["bulk", "bulk"]))
    assert "By config_type" not in run("evaluate", potentials["equivariant"], "one.xyz").stdout
    result = as_json(run("evaluate", potentials["equivariant"], "one.xyz", "--json", "-"))
    assert result["by_group"]["bulk"]["n_forces"] == 2


def test_labels_that_are_predictions_are_called_suspicious(run, potentials):
    from equimd.cli.common import make_calculator

    calculator = make_calculator(potentials["transformer"])
    frames = crystals()
    for frame in frames:  # forces alone, as another program would store them
        frame.calc = SinglePointCalculator(frame, forces=calculator.get_forces(frame).round(6))
    write_frames("own.xyz", frames)
    for command in ("evaluate", "equivariance"):
        shown = run(command, potentials["transformer"], "own.xyz").stdout
        assert "Suspicious: the force error of 2 of 2 labelled frames is zero to rounding" in shown


def test_throughput_writes_json_and_shows_a_table(run, potentials):
    start = Path(potentials["equivariant"]) / "start.xyz"
    options = ("--block-seconds", 0.001, "--profile", "--json", "out.json")
    result = run("throughput", potentials["equivariant"], start, *options)
    assert result.exit_code == 0, result.stderr
    assert "ns/day" in result.stdout
    assert "forward: layer 0: convolution" in result.stdout
    written = json.loads(Path("out.json").read_text())
    assert written["n_atoms"] == 3
    assert written["ms_per_step"]["median"] > 0
    assert written["profile_ms"]["everything else"] >= 0


def test_md_and_resume(run, potentials):
    start = Path(potentials["equivariant"]) / "start.xyz"
    command = ("md", potentials["equivariant"], start, "-o", "run.h5", "--stride", 2, "--ensemble", "nve")
    first = as_json(run(*command, "--steps", 4, "--json", "-"))
    assert first["n_frames"] == 3
    assert run(*command, "--steps", 8, "--resume").exit_code == 0
    assert len(read_list("run.h5")) == 5
    assert run(*command, "--steps", 8, "--resume").exit_code == 0  # it is done
    fewer = run(*command, "--steps", 5, "--resume")
    assert (fewer.exit_code, len(read_list("run.h5"))) == (2, 5)
    assert "steps is 5, and the run has done 8" in fewer.stderr


def test_md_starts_from_the_frame_that_is_asked_for(run, refused, potentials):
    start = Path(potentials["equivariant"]) / "start.xyz"
    md = ("md", potentials["equivariant"])
    assert run(*md, start, "-o", "one.h5", "--steps", 4, "--stride", 2).stderr == ""
    first = run(*md, "one.h5", "-o", "two.h5", "--steps", 0)
    assert "one.h5 holds 3 frames: the run starts from the first" in first.stderr
    last = run(*md, "one.h5", "-o", "three.h5", "--steps", 0, "--frame", -1, "--resume")
    assert "there is no run at three.h5 to continue: it begins at step 0" in last.stderr
    assert len(last.stderr.splitlines()) == 1
    frames = read_list("one.h5")
    assert (read_list("two.h5")[0].positions == frames[0].positions).all()
    assert (read_list("three.h5")[0].positions == frames[-1].positions).all()
    assert abs(read_list("three.h5")[0].get_momenta() - frames[-1].get_momenta()).max() < 1e-12  # and goes on moving
    assert "--frame is 3" in refused(*md, "one.h5", "-o", "four.h5", "--frame", 3)
    assert "is one structure; accepted: 0, or -1" in refused(*md, "ethanol-equivariant", "-o", "four.h5", "--frame", 3)


def test_md_shows_volume_density_and_pressure(run, potentials):
    ice = read_list(Path(potentials["equivariant"]) / "start.xyz")[0]
    ice.set_cell([12.0, 12.0, 12.0])
    ice.pbc = True
    write_frames("ice.xyz", [ice])
    shown = run("md", potentials["equivariant"], "ice.xyz", "-o", "run.h5", "--steps", 20, "--stride", 1)
    assert shown.exit_code == 0, shown.stderr
    # one molecule of 18.015 amu in 1728 Å³
    for row in (
        r"Mean volume +1,728 +Å³",
        r"Mean density +0\.0173 +g/cm³",
        r"Mean pressure .* bar",
        r"GPa",
        r" ± .* K",
    ):
        assert re.search(row, shown.stdout), row
    gas = run("md", potentials["equivariant"], Path(potentials["equivariant"]) / "start.xyz", "-o", "gas.h5")
    assert "olume" not in gas.stdout


def test_sigterm_ends_a_run_as_an_interrupt_does(run, potentials, monkeypatch):
    import equimd.md.run as md_run

    def terminated(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(md_run, "_advance", terminated)
    start = Path(potentials["equivariant"]) / "start.xyz"
    result = run("md", potentials["equivariant"], start, "-o", "run.h5", "--steps", 4, "--stride", 1)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["equimd: error: interrupted; files written so far are whole and stay"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_an_explosion_is_a_failure_with_a_line(run, potentials, monkeypatch):
    start = Path(potentials["equivariant"]) / "start.xyz"
    result = run("md", potentials["equivariant"], start, "-o", "run.h5", "--temperature", 90000, "--steps", 20)
    assert result.exit_code == 1
    assert "the run stopped at 0.000" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert read_list("run.h5")


def test_train(run, labelled):
    energies = {"H": -10.7, "O": -102.5}
    values = {
        "name": "tiny",
        "model": {"family": "equivariant", "cutoff": 4.0, "n_layers": 1, "l_max": 1, "n_channels": 4},
        "data": {
            "train": str(labelled),
            "valid": str(labelled),
            "isolated_atom_energies": energies,
            "duplicates": "allow",
        },
        "steps": 2,
        "batch": {"n_frames": 2},
    }
    Path("recipe.yaml").write_text(yaml.safe_dump(values))
    result = as_json(run("train", "recipe.yaml", "-o", "out", "--set", "steps=3", "--json", "-"))
    assert result["steps"] == 3
    assert Path("out/model.safetensors").is_file()


def test_compare_and_report(run, potentials):
    names = (potentials["equivariant"], potentials["transformer"])
    command = ("compare", *names, "--steps", 6, "--frames", 3, "--block-seconds", 0.001, "-o", "out")
    result = run(*command, "--json", "-")
    compared = as_json(result)
    assert [p["name"] for p in compared["potentials"]] == ["tiny-equivariant", "tiny-transformer"]
    assert [p["family"] for p in compared["potentials"]] == ["equivariant", "transformer"]
    assert json.loads(Path("out/results.json").read_text()) == compared
    page = Path("out/report.html").read_text()
    Path("out/report.html").unlink()
    again = run("report", "out")
    assert again.exit_code == 0, again.stderr
    assert "Equivariance error" in again.stdout
    assert Path("out/report.html").read_text() == page


def test_a_comparison_in_which_all_explode_is_an_answer(run, refused, potentials):
    command = ("compare", potentials["equivariant"], "--steps", 6, "--frames", 3, "--block-seconds", 0.001)
    result = run(*command, "-o", "out", "--temperature", 90000)
    assert result.exit_code == 0, result.stderr
    assert "equimd: warning: tiny-equivariant: it explodes at 0.000" in result.stderr
    assert "explodes at 0.000" in result.stdout
    assert "explodes at 0.000" in Path("out/report.html").read_text()
    again = run(*command, "-o", "out", "--temperature", 90000, "--resume", "--json", "-")
    assert as_json(again)["potentials"][0]["stopped"]["what"] == "explodes"
    assert "temperature_K was 90000.0 and is 300.0" in refused(*command, "-o", "out", "--resume")


def test_threads_are_set_recorded_and_restored(monkeypatch):
    import torch

    from equimd.cli.common import cpu_threads
    from equimd.errors import InputError
    from equimd.results import provenance

    before = torch.get_num_threads()
    for variable, count, n_atoms, expected in ((None, 2, 9, 2), (None, None, 9, 1), (None, None, 900, before)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        with cpu_threads(count, n_atoms):
            assert torch.get_num_threads() == expected
            assert provenance().n_threads == expected
        assert torch.get_num_threads() == before
        assert os.environ.get("OMP_NUM_THREADS") == variable
    with pytest.raises(InputError, match="--threads is 0"), cpu_threads(0, 9):
        pass


def test_unexpected_failures_are_one_line_and_debug_shows_where(run, monkeypatch, potentials, labelled):
    import equimd.analysis.accuracy as accuracy

    def broken(*_, **__):
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr(accuracy, "evaluate_accuracy", broken)
    result = run("evaluate", potentials["equivariant"], labelled)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line == ("equimd: error: ZeroDivisionError: division by zero (EQUIMD_DEBUG=1 or equimd --debug shows where)")
    debugged = run("--debug", "evaluate", potentials["equivariant"], labelled)
    assert isinstance(debugged.exception, ZeroDivisionError)


def test_an_interrupt_is_one_line(run, monkeypatch, potentials, labelled):
    import equimd.analysis.accuracy as accuracy

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(accuracy, "evaluate_accuracy", interrupted)
    result = run("evaluate", potentials["equivariant"], labelled)
    assert result.exit_code == 1
    assert result.stderr.splitlines() == ["equimd: error: interrupted; files written so far are whole and stay"]


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "equimd", "report", "nowhere"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("equimd: error: cannot read nowhere")
    assert app is not None
