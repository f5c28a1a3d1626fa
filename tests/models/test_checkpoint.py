import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from equimd.errors import InputError
from equimd.graph import graph_from_arrays
from equimd.models import checkpoint
from equimd.models.checkpoint import (
    build_potential,
    find_potential,
    list_potentials,
    load_checkpoint,
    load_potential,
    save_checkpoint,
)
from equimd.models.container import read_tensors, write_tensors
from equimd.models.equivariant import EquivariantSettings
from equimd.models.transformer import TransformerSettings

E0 = {1: -10.0, 6: -48.0, 8: -102.25}
SETTINGS = {
    "equivariant": EquivariantSettings(cutoff=3.0, n_layers=1, l_max=1, n_channels=4, radial_width=8),
    "transformer": TransformerSettings(cutoff=3.0, d_model=8, n_heads=2, n_gnn_layers=1, n_attention_layers=1),
}


@pytest.fixture
def potential():
    torch.manual_seed(0)
    made = build_potential(SETTINGS["transformer"], (1, 6, 8), E0)
    made.set_scale_shift({1: 1.5, 6: 1.5, 8: 1.5}, {1: -1.0, 6: -2.0, 8: 3.0})
    return made


@pytest.mark.parametrize("family", ["equivariant", "transformer"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_round_trip(tmp_path, family, dtype):
    torch.manual_seed(0)
    made = build_potential(SETTINGS[family], (1, 6, 8), E0).to(getattr(torch, dtype))
    save_checkpoint(tmp_path / "m.safetensors", made, {"recipe": {"name": "Ångström"}})
    again, header = load_checkpoint(tmp_path / "m.safetensors", dtype=dtype)
    assert header["format"] == "equimd"
    assert header["family"] == family
    assert header["recipe"]["name"] == "Ångström"
    assert again.isolated_atom_energies == E0
    assert not again.training
    rng = np.random.default_rng(0)
    graph = graph_from_arrays(rng.normal(0, 1, (5, 3)), np.array([1, 6, 8, 1, 1]), np.zeros((3, 3)), np.zeros(3), 3.0)
    assert torch.equal(made(graph).energy, again(graph).energy)
    assert torch.equal(made(graph).forces, again(graph).forces)


def test_loading_leaves_the_generator_alone(tmp_path, potential):
    save_checkpoint(tmp_path / "m.safetensors", potential)
    before = torch.random.get_rng_state()
    load_checkpoint(tmp_path / "m.safetensors")
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_header_of_any_length_loads(tmp_path, potential):
    file = tmp_path / "m.safetensors"
    first_bytes = set()
    for padding in range(0, 512, 8):  # safetensors aligns its header to 8 bytes
        save_checkpoint(file, potential, {"padding": padding * "x"})
        first_bytes.add(file.read_bytes()[0])
        load_checkpoint(file)
        file.write_bytes(file.read_bytes()[:-1])
        with pytest.raises(InputError, match="truncated"):
            load_checkpoint(file)
    assert 0x80 in first_bytes  # the first byte of a pickle


class Bomb:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_foreign_files_are_refused_and_nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "m.safetensors"
    contents = {
        "a pickle": pickle.dumps(Bomb()),
        "an HDF5 file": b"\x89HDF\r\n\x1a\n" + bytes(100),
        "a gzip file": b"\x1f\x8b" + bytes(100),
        "no safetensors": b"",
        "or no safetensors": np.random.default_rng(0).bytes(4096),
    }
    for said, content in contents.items():
        file.write_bytes(content)
        with pytest.raises(InputError, match=said) as caught:
            load_checkpoint(file)
        assert "m.safetensors" in str(caught.value)
        assert "\n" not in str(caught.value)
    torch.save({"a": torch.ones(2)}, file)
    assert zipfile.is_zipfile(file)
    with pytest.raises(InputError, match="zip archive"):
        load_checkpoint(file)
    save_file({"a": torch.ones(2)}, file)
    with pytest.raises(InputError, match="something else"):
        load_checkpoint(file)
    assert not (tmp_path / "exploded").exists()
    with pytest.raises(InputError, match="cannot read"):
        load_checkpoint(tmp_path / "missing.safetensors")


def test_truncated_files_are_refused(tmp_path, potential):
    file = tmp_path / "m.safetensors"
    save_checkpoint(file, potential)
    content = file.read_bytes()
    for length in (1, 7, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(InputError) as caught:
            load_checkpoint(file)
        assert "\n" not in str(caught.value)


def rewrite(file, change=None, tensors=None):
    """The file with a changed header or tensors, as version 1 wrote it: without a hash."""
    header, held = read_tensors(file, "equimd")
    header["format_version"] = 1
    (change or (lambda h: None))(header)
    save_file(held if tensors is None else tensors(held), file, {"format": "equimd", "header": json.dumps(header)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda h: h.update(format_version=3), "format_version 3; this equimd reads 1 to 2"),
        (lambda h: h.update(format_version=2), "has no SHA-256, which every file of format_version 2 carries"),
        (lambda h: h.update(format_version=True), "format_version True"),
        (lambda h: h.update(recipe="none"), "recipe is 'none'"),
        (lambda h: h.update(recipe={"data": {"charge": "1"}}), "recipe.data.charge is '1'"),
        (lambda h: h.update(multiplicity=[1]), "multiplicity is"),
        (lambda h: h.update(ledger={"device_hours": "x"}), "ledger.device_hours is 'x'"),
        (lambda h: h.update(name=7), "name is 7"),
        (lambda h: h.update(species=[1, 1, 6]), "one of them twice"),
        (lambda h: h.update(species=[True, 6, 8]), "species.0 is True"),
        (lambda h: h["isolated_atom_energies"].update({"1": "-10"}), "isolated_atom_energies.1 is '-10'"),
        (lambda h: h.update(family="equivariant"), "family is 'equivariant', which settings.family is not"),
        (lambda h: h.update(deep=json.loads("[" * 40 + "]" * 40)), "nested deeper than 32"),
        (lambda h: h.update(odd=float("nan")), "nan is not finite"),
        (lambda h: h.pop("species"), "no 'species'"),
        (lambda h: h["settings"].update(family="other"), "which settings.family is not"),
        (lambda h: h["settings"].update(surprise=1), "bad settings: .*surprise"),
        (lambda h: h.update(species=[1, 6, 999]), "bad header"),
        (lambda h: h.update(species="x"), "bad header"),
        (lambda h: h.update(isolated_atom_energies={}), "isolated-atom energy"),
        (lambda h: h["settings"].update(d_model=16), "its settings ask for"),
    ],
)
def test_inconsistent_headers_are_refused(tmp_path, potential, change, said):
    file = tmp_path / "m.safetensors"
    save_checkpoint(file, potential)
    rewrite(file, change)
    with pytest.raises(InputError, match=said) as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)


def test_inconsistent_tensors_are_refused(tmp_path, potential):
    file = tmp_path / "m.safetensors"
    for tensors, said in (
        (lambda t: {k: v for k, v in t.items() if k != "scale"}, "lacks the tensor 'scale'"),
        (lambda t: t | {"more": torch.ones(1)}, "tensor 'more'"),
        (lambda t: t | {"scale": torch.full((3,), float("nan"))}, "not finite"),
    ):
        save_checkpoint(file, potential)
        rewrite(file, tensors=tensors)
        with pytest.raises(InputError, match=said):
            load_checkpoint(file)


def test_a_file_of_version_1_loads_and_a_new_one_says_when_it_changed(tmp_path, potential):
    file = tmp_path / "m.safetensors"
    save_checkpoint(file, potential)
    rewrite(file)
    assert load_checkpoint(file)[1]["format_version"] == 1
    save_checkpoint(file, potential)
    content = file.read_bytes()
    for at, bit in ((len(content) - 3, 1), (content.index(b"cutoff") + 9, 1), (content.index(b"sha256") + 5, 2)):
        file.write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
        with pytest.raises(InputError, match="damaged|does not write"):
            load_checkpoint(file)


def test_nothing_is_allocated_for_settings_that_the_tensors_do_not_have(tmp_path, potential):
    file = tmp_path / "m.safetensors"
    save_checkpoint(file, potential)
    # 69 billion numbers, of which no machine that runs this holds as many.
    largest = {"d_model": 4096, "n_heads": 64, "n_gnn_layers": 16, "n_attention_layers": 16, "d_feedforward": 16384}
    rewrite(file, lambda h: h["settings"].update(largest))
    with pytest.raises(InputError, match="its settings ask for"):
        load_checkpoint(file)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.complex64, torch.int32, torch.bool, torch.float16])
def test_weights_are_float32_or_float64(tmp_path, potential, kind):
    file = tmp_path / "m.safetensors"
    save_checkpoint(file, potential)
    rewrite(file, tensors=lambda held: held | {"scale": held["scale"].to(kind)})
    with pytest.raises(InputError, match="'scale' of type") as caught:
        load_checkpoint(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        ("equivariant", "cutoff_power", 10**9),
        ("equivariant", "radial_width", 10**9),
        ("equivariant", "avg_num_neighbors", 1e-300),
        ("transformer", "cutoff_width", 1e-300),
        ("transformer", "d_model", 10**9),
    ],
)
def test_settings_that_allocate_or_loop_are_bounded(family, key, value):
    with pytest.raises(InputError, match=f"^{key} is {value!r}: Input should be") as caught:
        type(SETTINGS[family])(**{key: value})
    assert "\n" not in str(caught.value)


def test_no_integer_setting_is_without_a_bound():
    for settings in SETTINGS.values():
        for name, field in type(settings).model_fields.items():
            if field.annotation is int:
                assert any(hasattr(limit, "le") for limit in field.metadata), name


def test_a_card_of_other_weights_is_refused(tmp_path, potential):
    save_checkpoint(tmp_path / "model.safetensors", potential)
    (tmp_path / "card.yaml").write_text(f"name: other\nsha256: {'a' * 64}\n")
    with pytest.raises(InputError, match="not the file that the card beside it describes"):
        load_potential(tmp_path)
    for text, said in (
        ("a: [", "is no YAML of a card"),
        ("a: &x [1]\nb: *x\n", "references"),
        ("- 1", "holds a list"),
        ("test: 5", "test is 5"),
        ("a: 2026-13-45", "is no YAML of a card"),
        ("x" * 70_000, "longer than"),
        ("card_sha256: a\nname: a", "was changed or damaged"),
    ):
        (tmp_path / "card.yaml").write_text(text)
        with pytest.raises(InputError, match=said) as caught:
            load_potential(tmp_path)
        assert "\n" not in str(caught.value)
    (tmp_path / "card.yaml").write_text("name: mine\ndate: 2026-12-01\n")
    assert load_potential(tmp_path).card == {"name": "mine", "date": "2026-12-01"}


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening it would wait for ever
    for path in (tmp_path / "pipe.safetensors", tmp_path):
        with pytest.raises(InputError, match="it is no regular file"):
            load_checkpoint(path)


def test_a_header_with_numbers_that_json_has_not_is_refused(tmp_path, potential):
    with pytest.raises(InputError, match="its header is not JSON"):
        save_checkpoint(tmp_path / "m.safetensors", potential, {"errors": float("nan")})
    write_tensors(tmp_path / "state", "state", {"best": float("nan")}, {"x": torch.ones(2)}, finite=False)
    assert np.isnan(read_tensors(tmp_path / "state", "state", finite=False)[0]["best"])


def limited(code: str, *arguments: str) -> subprocess.CompletedProcess:
    """Run code where no file may grow beyond 4 kB, as on a disk that is full."""

    def limit() -> None:
        import signal

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that write fails instead
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    return subprocess.run(
        [sys.executable, "-c", code, *arguments], preexec_fn=limit, capture_output=True, text=True, check=False
    )


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, potential):
    file = tmp_path / "m.safetensors"
    save_checkpoint(file, potential)
    before = file.read_bytes()
    assert len(before) > 4096
    code = (
        "import sys; from pathlib import Path\n"
        "from equimd.results import write_bytes_atomically\n"
        "try: write_bytes_atomically(Path(sys.argv[1]), bytes(100_000))\n"
        "except OSError as error: print(error); sys.exit(7)"
    )
    done = limited(code, str(file))
    assert done.returncode == 7, done.stderr
    assert str(file) in done.stdout
    assert done.stdout.count("\n") == 1
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]
    with pytest.raises(InputError, match="cannot write"):
        save_checkpoint(tmp_path / "no-folder" / "m.safetensors", potential)


def test_the_registry_finds_names_then_paths(tmp_path, potential, monkeypatch):
    first, second = tmp_path / "package", tmp_path / "checkout"
    for folder, name in ((first, "ethanol-a"), (second, "ethanol-a"), (second, "water-b")):
        (folder / name).mkdir(parents=True)
        save_checkpoint(folder / name / "model.safetensors", potential, {"where": folder.name})
    (second / "half-done").mkdir()
    (first / "ethanol-a" / "card.yaml").write_text("name: ethanol-a\n")
    monkeypatch.setattr(checkpoint, "registry_folders", lambda: [first, second])
    assert list_potentials() == ["ethanol-a", "water-b"]
    assert find_potential("ethanol-a") == first / "ethanol-a"
    assert find_potential(second / "ethanol-a") == second / "ethanol-a"
    file = second / "water-b" / "model.safetensors"
    assert find_potential(str(file)) == file
    loaded = load_potential("ethanol-a", device="cpu")
    assert loaded.header["where"] == "package"
    assert loaded.card == {"name": "ethanol-a"}
    assert load_potential("water-b", device="cpu").card is None
    with pytest.raises(InputError, match=r"did you mean 'ethanol-a'\?.*ethanol-a, water-b"):
        find_potential("ethanol")
    with pytest.raises(InputError, match="holds neither model.safetensors nor ensemble.json"):
        find_potential(second / "half-done")
    with pytest.raises(InputError, match="no potential is called ''"):
        find_potential("")
    with pytest.raises(InputError, match="accepted are auto"):
        load_potential("water-b", device="warp")


def test_tensors_are_stored_as_they_are(tmp_path, potential):
    save_checkpoint(tmp_path / "m.safetensors", potential)
    stored = load_file(tmp_path / "m.safetensors")
    assert {name: t.dtype for name, t in stored.items()} == {n: t.dtype for n, t in potential.state_dict().items()}
