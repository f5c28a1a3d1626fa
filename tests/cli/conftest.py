"""A runner for the command line, and tiny potentials of both families with random weights."""

from pathlib import Path

import pytest
import torch
from ase.calculators.singlepoint import SinglePointCalculator
from tiny import ISOLATED, SETTINGS, water
from typer.testing import CliRunner

from equimd.cli import app
from equimd.frames import write_frames
from equimd.models.checkpoint import build_potential, save_checkpoint


@pytest.fixture(scope="session")
def potentials(tmp_path_factory) -> dict[str, str]:
    """Path of a potential by family; each folder brings its start.xyz."""
    out = {}
    for family, settings in SETTINGS.items():
        folder = tmp_path_factory.mktemp("potentials") / f"tiny-{family}"
        folder.mkdir()
        torch.manual_seed(0)
        potential = build_potential(settings, (1, 8), ISOLATED)
        save_checkpoint(folder / "model.safetensors", potential, {"recipe": {"data": {"reference": "gfn2-xtb"}}})
        write_frames(folder / "start.xyz", [water()])
        out[family] = str(folder)
    return out


@pytest.fixture
def labelled(tmp_path) -> Path:
    """Three labelled frames."""
    frames = []
    for k in range(3):
        atoms = water()
        atoms.positions[1, 0] += 0.05 * k
        forces = [[0.5, 0.0, 0.0], [-0.5, 0.1, 0.0], [0.0, -0.1, 0.0]]
        atoms.calc = SinglePointCalculator(atoms, energy=-138.0 - 0.1 * k, forces=forces)
        frames.append(atoms)
    write_frames(tmp_path / "labelled.xyz", frames)
    return tmp_path / "labelled.xyz"


@pytest.fixture
def run():
    """Run a command line: its result, with stdout and stderr apart."""

    def invoke(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    return invoke


@pytest.fixture
def refused(run):
    """Run a command line that must fail on its input: exit code 2, nothing on stdout, one line on stderr."""

    def invoke(*arguments) -> str:
        result = run(*arguments)
        assert result.exit_code == 2, (result.stdout, result.stderr, result.exception)
        assert result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith("equimd: error: ")
        return line

    return invoke
