"""What standard output holds: JSON alone where it was asked for, characters it can write, lines that are not broken."""

import ctypes
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import equimd
from equimd.cli import app, output
from equimd.cli.common import grid

# The same package; C's output is held back as it usually is.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(equimd.__file__).parents[1]), "PYTHONUNBUFFERED": ""}


class Answer:
    """A result with characters beyond ASCII, and beyond 16 bits."""

    def to_json(self) -> str:
        return json.dumps({"unit": "eV/Å³", "arrow": "→", "rare": "𝔼"}, ensure_ascii=False)


def loud(*_, **__):
    """Prints as libraries do, in Python and in C, and answers."""
    print("a library says something")
    libc = ctypes.CDLL(None)
    libc.printf(b"so does C, which holds it back\n")
    os.write(1, b"and somebody writes to the descriptor\n")
    return Answer()


# The command with a loud inventory; fake parents keep the start of the process short.
LOUD = f"""
import sys, types
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_output
for name in ("equimd.report", "equimd.report.inventory"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["equimd.report.inventory"].inventory = test_output.loud
from equimd.cli import app
try:
    app(["info", "--json", "-"])
finally:
    print("after", flush=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="C's own printf is reached in another way")
def test_json_stands_alone_whatever_libraries_print():
    done = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    text, after = done.stdout.splitlines()
    assert json.loads(text) == json.loads(Answer().to_json())
    assert text.isascii()
    assert after == "after"  # and standard output is given back
    for line in ("a library says", "so does C", "and somebody"):
        assert line in done.stderr


def test_json_stands_alone_under_a_runner(run, monkeypatch):
    import equimd.report.inventory as inventory

    def loud_in_python():
        print("a library says something")
        return Answer()

    monkeypatch.setattr(inventory, "inventory", loud_in_python)
    result = run("info", "--json", "-")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == json.loads(Answer().to_json())
    assert "a library says something" in result.stderr
    assert run("info", "--json", "-", "--nonsense").exit_code == 2
    assert "0.1.0" in run("--version").stdout


@pytest.mark.parametrize(
    ("encoding", "shown"), [("cp1252", "Å ->"), ("latin-1", "Å ->"), ("ascii", "A ->"), ("utf-8", "Å →")]
)
def test_characters_that_the_terminal_lacks_are_spelled(encoding, shown, monkeypatch):
    import equimd.report.inventory as inventory

    class Shown:
        provenance = type("", (), {"python": "Å → \udcff", "versions": {}, "processor": "", "n_threads": 1})
        devices, potentials = (), ()

    monkeypatch.setattr(inventory, "inventory", Shown)
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    with pytest.raises(SystemExit) as ended:
        app(["info"])
    assert ended.value.code == 0
    with pytest.raises(SystemExit) as ended:
        app(["report", "no→where"])
    assert ended.value.code == 2
    written = {name: stream.buffer.getvalue().decode(encoding) for name, stream in streams.items()}
    assert f"{shown} ?" in written["stdout"]
    assert ("no→where" if encoding == "utf-8" else "no->where") in written["stderr"]
    assert sys.stdout.errors == "strict"  # as it was


def test_a_table_is_not_broken_where_there_is_no_terminal(capsys):
    output.show(grid("a title", [("label" * 30, "1.0", "unit" * 40)]))
    lines = capsys.readouterr().out.splitlines()
    assert any("label" * 30 in line and "unit" * 40 in line for line in lines)
    assert all(len(line) < 400 for line in lines)


def test_md_has_no_engine_to_choose(refused):
    assert "--engine" in refused("md", "ethanol-equivariant", "ethanol-equivariant", "-o", "x.h5", "--engine", "ase")
