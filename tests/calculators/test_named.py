"""Calculators by what a user writes."""

import sys

import pytest
from ase.calculators.emt import EMT

from equimd.calculators.named import is_factory, make_foreign
from equimd.errors import InputError


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith(("equimd_user_", "beside"))]:
        del sys.modules[name]


def test_names_of_factories_and_no_others(here):
    assert is_factory("ase.calculators.emt:EMT")
    assert is_factory("folder/script.py:make")
    assert is_factory("module:Class.from_file")
    for name in ("ethanol-equivariant", "runs/mine", "C:\\runs\\mine", "./a:b/c", "module:", ":EMT", "a:1"):
        assert not is_factory(name), name
    (here / "a:b").mkdir()
    assert not is_factory("a:b"), "a folder of that name is a path"


def test_a_class_a_function_and_an_object(here):
    (here / "mine.py").write_text(
        "from beside import EMT\ndef make(asap_cutoff=False):\n    return EMT(asap_cutoff=asap_cutoff)\n"
        "ready = EMT()\nclass Holder:\n    make = staticmethod(make)\n"
    )
    (here / "beside.py").write_text("from ase.calculators.emt import EMT\n")
    assert isinstance(make_foreign("ase.calculators.emt:EMT"), EMT)
    assert isinstance(make_foreign("mine.py:make"), EMT)
    assert isinstance(make_foreign("mine:make"), EMT)
    assert isinstance(make_foreign("mine.py:Holder.make"), EMT)
    assert make_foreign("mine.py:ready") is make_foreign("mine.py:ready")
    assert make_foreign("mine.py:make", {"asap_cutoff": True}).parameters.asap_cutoff


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.py:make", "there is no file nothing.py; accepted is script.py:factory"),
        ("no_such_module:make", "there is no module 'no_such_module' here"),
        ("ase.no_such_module:make", "there is no module 'ase.no_such_module' here"),
        ("ase.build:nothing", "ase.build has no 'nothing'"),
        ("mine.py:fails", "mine.py:fails failed: RuntimeError: two lines"),
        ("mine.py:number", "mine.py:number returned a int; expected an ASE calculator"),
        ("mine.py:wants", r"mine.py:wants failed: TypeError: wants\(\) missing 1 required"),
        ("broken.py:make", "broken.py cannot be imported: SyntaxError"),
        ("lacking:make", "lacking cannot be imported: ModuleNotFoundError: No module named 'not_there'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(here, name, message):
    (here / "mine.py").write_text(
        "def fails():\n    raise RuntimeError('two lines\\nof text')\n"
        "def number():\n    return 3\ndef wants(x):\n    pass\n"
    )
    (here / "broken.py").write_text("def (\n")
    (here / "lacking.py").write_text("import not_there\n")
    with pytest.raises(InputError, match=message) as caught:
        make_foreign(name)
    assert "\n" not in str(caught.value)
