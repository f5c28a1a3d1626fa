"""Files that were damaged or edited: each is refused in one line, or says what it said before; nothing else happens.

Damage has the hash as it was; an editor writes a new one, so that a file of his may load, if it is a potential.
"""

import hashlib
import json
import signal
import time
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save

from equimd.errors import InputError
from equimd.frames.electrons import check_electrons
from equimd.graph import graph_from_arrays
from equimd.models.checkpoint import build_potential, load_potential, save_checkpoint
from equimd.models.container import _digest, read_tensors
from equimd.models.header import read_card, seal
from equimd.models.transformer import TransformerSettings

SETTINGS = TransformerSettings(cutoff=3.0, d_model=8, n_heads=2, n_gnn_layers=1, n_attention_layers=1, d_feedforward=8)
RECIPE = {"name": "tiny", "data": {"reference": "gfn2-xtb", "charge": 0, "multiplicity": 1}}
LEDGER = {"hours": 1.5, "device_hours": 1.5, "steps": 10, "frames_seen": 100}
LONGEST = 10.0  # seconds that any file may take; a whole one takes some hundredths of one
ODD = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    -1e308,
    1e-300,
    1.5,
    "",
    "x" * 5000,
    "\ud800",
    "\x1b[2J",
    "../..",
    [],
    {},
    [[]],
]
ODD += [[1] * 2000, {"a": {"b": None}}, 10**9, 4096, "1", [None], float("nan"), float("inf"), [1, 1, 8], {"1": "x"}]
TYPES = [torch.float8_e4m3fn, torch.complex64, torch.int64, torch.bool, torch.float16, torch.bfloat16, torch.float64]


@contextmanager
def at_most(seconds):
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder of a potential with its card, and of an ensemble of two."""
    folder = tmp_path_factory.mktemp("whole")
    for k, name in enumerate((".", "member-1", "member-2")):
        (folder / name).mkdir(exist_ok=True)
        torch.manual_seed(k)
        potential = build_potential(SETTINGS, (1, 8), {1: -10.7, 8: -102.5})
        save_checkpoint(
            folder / name / "model.safetensors",
            potential,
            {"name": name, "recipe": RECIPE, "ledger": LEDGER, "charge": 0, "multiplicity": 1},
        )
    sha256 = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    card = {"name": "tiny", "sha256": sha256, "date": "2026-11-29", "test": {"force_mae": 0.0285}, "elements": ["H"]}
    (folder / "card.yaml").write_text(yaml.safe_dump(seal(card, "card_sha256"), sort_keys=False))
    ensemble = {"name": "both", "members": ["member-1", "member-2"], "device_hours": 3.25}
    (folder / "ensemble.json").write_text(json.dumps(seal(ensemble, "sha256"), indent=2))
    return folder


class Attack:
    """One mutation of one of the files, drawn by a generator; ``honest`` where no new hash was written."""

    def __init__(self, whole, folder, rng):
        self.whole, self.folder, self.rng = whole, folder, rng
        for path in folder.rglob("*.*"):
            path.unlink(missing_ok=True)
        kinds = {
            "damage": 5,
            "edit_header": 4,
            "edit_tensors": 2,
            "edit_text": 1,
            "metadata": 1,
            "ensemble": 2,
            "card": 2,
        }
        weights = np.array([*kinds.values()], float)
        self.kind = str(rng.choice(list(kinds), p=weights / weights.sum()))
        self.honest = True
        self.target = folder
        getattr(self, "_" + self.kind)()

    def _pick(self, values):
        return values[int(self.rng.integers(len(values)))]

    def _copy(self, *names):
        for name in names:
            (self.folder / name).parent.mkdir(exist_ok=True)
            (self.folder / name).write_bytes((self.whole / name).read_bytes())

    def _damaged(self, content: bytes) -> bytes:
        rng, changed = self.rng, bytearray(content)
        at, length = int(rng.integers(len(content))), int(rng.integers(1, 64))
        how = self._pick(["bit"] * 4 + ["byte", "cut", "longer", "zeros", "moved"])
        if how == "bit":
            changed[at] ^= 1 << int(rng.integers(8))
        elif how == "byte":
            changed[at] = int(rng.integers(256))
        elif how == "cut":
            del changed[at:]
        elif how == "longer":
            changed += rng.bytes(length)
        elif how == "zeros":
            changed[at : at + length] = bytes(len(changed[at : at + length]))
        else:
            changed[at : at + length] = changed[at : at + length][::-1]
        return bytes(changed)

    def _damage(self):
        self._copy("model.safetensors")
        file = self.folder / "model.safetensors"
        content = file.read_bytes()
        head = 8 + int.from_bytes(content[:8], "little")
        if self.rng.random() < 0.5:  # the head is the shorter part, and the one that is parsed
            file.write_bytes(self._damaged(content[:head]) + content[head:])
        else:
            file.write_bytes(self._damaged(content))

    def _write(self, text, tensors, more=None):
        """A file with a right hash of whatever it holds."""
        self.honest = False
        content = save(tensors, {"format": "equimd", "header": text})
        length = 8 + int.from_bytes(content[:8], "little")
        head = json.loads(content[8:length])
        head["__metadata__"]["sha256"] = _digest(head, memoryview(content)[length:])
        head["__metadata__"] |= more or {}
        packed = json.dumps(head).encode()
        path = self.folder / "model.safetensors"
        path.write_bytes(len(packed).to_bytes(8, "little") + packed + content[length:])

    def _edited(self, content, surely=()):
        """A value somewhere inside becomes another, or goes away."""
        content = json.loads(json.dumps(content))
        path, place = [], content
        while True:
            keys = list(place) if isinstance(place, dict) else list(range(len(place)))
            key = self._pick(list(surely) if surely and not path else keys)
            inner = place[key]
            if not isinstance(inner, dict | list) or not inner or self.rng.random() < 0.3:
                break
            place = inner
            path.append(key)
        if self.rng.random() < 0.1:
            del place[key]
        else:
            place[key] = self._pick(ODD)
        return content

    def _edit_header(self):
        header, tensors = read_tensors(self.whole / "model.safetensors", "equimd")
        surely = ("settings",) if self.rng.random() < 0.4 else ()
        self._write(json.dumps(self._edited(header, surely)), tensors)

    def _edit_tensors(self):
        header, tensors = read_tensors(self.whole / "model.safetensors", "equimd")
        one, other = (self._pick(sorted(tensors)) for _ in range(2))
        how = self._pick(["type", "type", "all", "swap", "drop", "more", "shape", "odd"])
        if how == "type":
            tensors[one] = tensors[one].to(self._pick(TYPES))
        elif how == "all":
            kind = self._pick(TYPES)
            tensors = {name: tensor.to(kind) for name, tensor in tensors.items()}
        elif how == "swap":
            tensors[one], tensors[other] = tensors[other], tensors[one]
        elif how == "drop":
            del tensors[one]
        elif how == "more":
            tensors["more"] = torch.zeros(int(self.rng.integers(3)))
        elif how == "shape":
            tensors[one] = tensors[one].reshape(-1)[: int(self.rng.integers(3))].clone()
        else:
            tensors[one] = tensors[one] * self._pick([0.0, -1.0, 1e30, float("inf"), float("nan")])
        self._write(json.dumps(header), tensors)

    def _edit_text(self):
        header, tensors = read_tensors(self.whole / "model.safetensors", "equimd")
        text = json.dumps(header)
        deep = int(self._pick([40, 2000, 100_000]))
        texts = [
            text[:-1] + ', "family": "equivariant"}',
            text.replace("0.0", "NaN").replace("1.5", "Infinity"),
            text.replace("1.5", "1e999"),
            text.replace("1.5", "9" * 5000),
            text[:-1] + ', "deep": ' + "[" * deep + "]" * deep + "}",
            text[:-1] + ', "wide": [' + "0," * 500_001 + "0]}",
            text[: len(text) // 2],
            "[]",
            "null",
            "",
            '"' + text.replace('"', "'") + '"',
        ]
        self._write(self._pick(texts), tensors)

    def _metadata(self):
        header, tensors = read_tensors(self.whole / "model.safetensors", "equimd")
        more = [
            {"sha256": "0" * 64},
            {"sha25": "x"},
            {"sha256": ""},
            {"format": "pt"},
            {"format": "equimd-training-state"},
        ]
        self._write(json.dumps(header), tensors, self._pick(more))
        self.honest = True  # none of these may load

    def _ensemble(self):
        self._copy("ensemble.json", "member-1/model.safetensors", "member-2/model.safetensors")
        file = self.folder / self._pick(["ensemble.json"] * 3 + ["member-2/model.safetensors"])
        if file.suffix == ".safetensors" or self.rng.random() < 0.5:
            file.write_bytes(self._damaged(file.read_bytes()))
            return
        self.honest = False
        edited = self._edited(json.loads(file.read_text()), surely=("members", "members", "name", "device_hours"))
        file.write_text(json.dumps(seal(edited, "sha256") if self.rng.random() < 0.8 else edited))

    def _card(self):
        self._copy("card.yaml", "model.safetensors")
        file = self.folder / "card.yaml"
        if self.rng.random() < 0.5:
            file.write_bytes(self._damaged(file.read_bytes()))
            return
        self.honest = False
        bomb = "".join(f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]\n" if k else "a0: &a0 [1]\n" for k in range(20))
        odd = [
            "[" * 3000,
            bomb,
            "a: 2026-13-45\n",
            "a: !!binary x\n",
            "? [1]\n: 2\n",
            "a: " + "9" * 6000,
            "a: .nan\n",
            "- 1",
        ]
        card = self._edited(yaml.safe_load(file.read_text()))
        text = self._pick([*odd, *[yaml.safe_dump(seal(card, "card_sha256"))] * 8])
        file.write_bytes(text.encode("utf-8", "surrogatepass"))


GRAPH = ([[0.0, 0.0, 0.0], [0.96, 0.0, 0.0], [-0.24, 0.93, 0.0]], [8, 1, 1])


def said(potential) -> tuple:
    """All that a potential says."""
    weights = {name: tensor.numpy().tobytes() for name, tensor in potential.state_dict().items()}
    return potential.settings, weights, potential.header, potential.card


def use(potential) -> None:
    """What comes after loading, without compiled kernels."""
    check_electrons(potential.header)
    positions, numbers = np.array(GRAPH[0]), np.array(GRAPH[1])
    graph = graph_from_arrays(positions, numbers, np.zeros((3, 3)), np.zeros(3, bool), potential.cutoff)
    for member in (m for m in potential.modules() if hasattr(m, "kernel_backend")):
        member.kernel_backend = "reference"
    potential(graph)


def outcome(attack: Attack, before: dict) -> str:
    """What a mutated file led to: it is refused, says what it said before, or was edited and loads."""
    potential = message = None
    try:
        potential = load_potential(attack.target, device="cpu")
        use(potential)
    except InputError as error:
        message = str(error)
    assert message is None or (len(message.splitlines()) == 1 and len(message) < 2000)
    if potential is None:
        return "refused"
    if attack.honest:
        name = "ensemble" if attack.kind == "ensemble" else "card" if attack.kind == "card" else "plain"
        assert said(potential) == before[name], f"damage of {attack.kind} went unnoticed"
        return "the same"
    return "an edited potential"


def attacked(whole, folder, seed: int, n: int) -> Counter:
    """Counts of (kind, outcome) of n mutations."""
    for name in ("", "member-1", "member-2"):
        (folder / name).mkdir(exist_ok=True)
    before, counts = {}, Counter()
    (folder / "alone").mkdir()
    (folder / "alone" / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    before["plain"] = said(load_potential(folder / "alone", device="cpu"))
    before["card"] = said(load_potential(whole, device="cpu"))
    for name in ("ensemble.json", "member-1/model.safetensors", "member-2/model.safetensors"):
        (folder / "alone" / name).parent.mkdir(exist_ok=True)
        (folder / "alone" / name).write_bytes((whole / name).read_bytes())
    (folder / "alone" / "model.safetensors").unlink()
    before["ensemble"] = said(load_potential(folder / "alone", device="cpu"))
    files = folder / "attacked"
    files.mkdir()
    for k in range(n):
        attack = Attack(whole, files, np.random.default_rng([seed, k]))
        begin = time.monotonic()
        try:
            with at_most(LONGEST):
                counts[attack.kind, outcome(attack, before)] += 1
        except Exception as error:
            raise AssertionError(f"mutation {k} of seed {seed}: {attack.kind}: {error!r}") from error
        assert time.monotonic() - begin < LONGEST
    return counts


def test_a_hundred_mutations(whole, tmp_path):
    counts = attacked(whole, tmp_path, seed=1, n=100)
    assert counts["damage", "refused"] >= 20
    assert counts["edit_header", "refused"] >= 5


@pytest.mark.slow
def test_a_thousand_mutations(whole, tmp_path):
    counts = attacked(whole, tmp_path, seed=2, n=1000)
    print("\n".join(f"{kind}: {what}: {n}" for (kind, what), n in sorted(counts.items())))
    assert sum(counts.values()) == 1000


def test_the_card_that_was_read_is_the_card_that_was_written(whole):
    assert read_card(whole / "card.yaml")["test"] == {"force_mae": 0.0285}
