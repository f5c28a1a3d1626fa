"""A whole neighbour-token transformer with frozen weights on the CPU: energies, forces and virial without autograd.

What ``models.transformer`` computes with torch on padded arrays is done here on the tokens that there are: linear maps
by ``torch.mm`` over all of them at once, in the precision that ``torch.set_float32_matmul_precision`` allows, and what
lies in between by the kernels of ``token_codegen`` and ``attention_codegen``, forward and backward.

Arrays are called by name. With i counting blocks and k stages, x{i} goes into a block and end{k} comes out of a stage;
g_NAME is the gradient with respect to NAME. Most of these share memory, except where training is to find them again.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from equimd.kernels import attention_codegen, geometry_codegen, token_codegen
from equimd.kernels.compiled import compile_kernel
from equimd.kernels.frozen import DTYPES, Evaluation, Geometry, check_inputs, make_evaluation
from equimd.kernels.source import KernelSource
from equimd.kernels.threads import torch_on_one_thread
from equimd.kernels.token_run import Axis, Kernel, Run
from equimd.kernels.token_weights import TABLES, Block, Filling, Stage, TokenNetwork
from equimd.kernels.topology import Topology
from equimd.kernels.workspace import Field, Workspace

EXPONENTIAL = 20
"""Multiply-adds that take as long."""

_IN_PLACE = {
    **{"g_x": "g", "g_mid": "g", "g_end": "g", "g_qkv": "g_qkv", "o": "o", "g_o": "o"},
    **{"g_yx": "y", "g_ymid": "y", "g_yend": "y", "g_h": "h", "g_atom_h": "atom_h"},
}  # names before their number, and the arrays that they share


Sources = dict[str, tuple[KernelSource, Axis, int]]
"""By name: a kernel, what it walks, and the multiply-adds per token or edge, 0 where only one thread may write."""


class Step(NamedTuple):
    """A block: its number i, and the name of what comes out."""

    i: int
    block: Block
    after: str


class FusedTransformer:
    """``network`` as a function of the geometry, compiled for its widths and one dtype.

    Each directed edge must have its reverse in the list. Edges beyond the cutoff have no token. Raises OSError where no
    folder can be written to.
    """

    keeps = False
    """Whether each array has memory of its own."""

    def __init__(self, network: TokenNetwork, dtype: str) -> None:
        if network.embedding.device.type != "cpu":
            raise ValueError("weights must be on the CPU")
        self.dtype, self.n_heads = dtype, network.n_heads
        self._filling = Filling.of(network)
        self._room = self._filling.make_room(network, DTYPES[dtype])
        self.update(network)
        scales = [network.cutoff, network.cutoff_width, (2 / network.cutoff) ** 0.5]
        self._constants = {
            "scales": torch.tensor(scales, dtype=torch.float64, device="cpu"),
            "frequencies": network.frequencies.to(torch.float64).contiguous(),
            "pairs": network.pairs.to(torch.float64).contiguous(),
        } | {name: getattr(self._room, name) for name in TABLES}
        for k, stage in enumerate(self._room.stages):
            self._constants |= {f"heads{k}": stage.heads, f"constant{k}": stage.constant}
        self._fields, self._shared = self._arrays(network)
        self._kernels = compile_all(self._sources(network))
        self._spare: list[Workspace] = []

    @torch.no_grad()
    def update(self, network: TokenNetwork) -> None:
        """Other weights for the same network: same shapes, same cutoff, same repulsion."""
        self._filling.write(network, self._room)

    def __call__(
        self,
        geometry: Geometry,
        kind: Tensor,
        seed: Tensor,
        topology: Topology,
        reverse: Tensor,
        seconds: dict[str, float] | None = None,
    ) -> Evaluation:
        """Outputs, forces and virial; ``seconds`` receives how long each step took.

        kind (N,) are rows of the species, seed (N,) how much each output counts, its scale in eV, reverse (E,) the edge
        back of each edge.

        Raises:
            ValueError: for arrays that do not fit the topology, or are not contiguous, of their type and on the CPU.
        """
        results, run = self.evaluate(geometry, kind, seed, topology, reverse, seconds)
        self._spare.append(run.workspace)
        return results

    def evaluate(
        self,
        geometry: Geometry,
        kind: Tensor,
        seed: Tensor,
        topology: Topology,
        reverse: Tensor,
        seconds: dict[str, float] | None = None,
    ) -> tuple[Evaluation, Run]:
        """As when called; and the run, with its arrays."""
        check_inputs(geometry, kind, topology)
        with torch.inference_mode(False), torch.no_grad():  # arrays that are kept may be written to again anywhere
            results = make_evaluation(topology.n_receivers, geometry.cell.shape[0])
            results.output.zero_()
            try:  # one workspace for each thread that is here at the same time
                workspace = self._spare.pop()
            except IndexError:
                workspace = Workspace(self._fields, self._constants)
            inputs = geometry._asdict() | {
                "kind": kind,
                "seed": seed.to(DTYPES[self.dtype]).contiguous(),
                "reverse": reverse,
                "order": topology.receiver_order,
                "other": topology.senders,
                "ptr": topology.receiver_ptr,
            }
            with torch_on_one_thread() as n_threads:
                run = Run(self._kernels, workspace, self._shared, topology, inputs | results._asdict(), seconds)
                run.n_threads = n_threads
                self._forward(run)
                self._backward(run)
        return results, run

    def steps(self) -> list[tuple[int, Stage, list[Step]]]:
        """Every stage, its number and its blocks."""
        found, i = [], 0
        for k, stage in enumerate(self._room.stages):
            last = i + len(stage.blocks) - 1
            steps = [
                Step(i + a, block, f"end{k}" if i + a == last else f"x{i + a + 1}")
                for a, block in enumerate(stage.blocks)
            ]
            found.append((k, stage, steps))
            i = last + 1
        return found

    def _forward(self, run: Run) -> None:
        run.make_tokens()
        for k, stage, steps in self.steps():
            for step in steps:
                _block_forward(run, step)
            run.kernel("readout", f"forward: readout {k}", x=f"end{k}", heads=f"heads{k}", constant=f"constant{k}")
            if stage.message is not None:
                run.linear("y", stage.message.T, "sent", f"forward: message {k}")
                run.kernel("receive", f"forward: message {k}", x=f"end{k}", x_next=f"x{steps[-1].i + 1}")

    def _backward(self, run: Run) -> None:
        for k, stage, steps in reversed(self.steps()):
            names, title = {"x": f"end{k}", "heads": f"heads{k}", "g": f"g_end{k}"}, f"backward: message {k}"
            if stage.message is None:
                run.kernel("readout_back_last", f"backward: readout {k}", **names)
            else:
                following = f"g_x{steps[-1].i + 1}"
                run.kernel("receive_back", title, g=following, g_sent="sent")
                run.linear("sent", stage.message, f"g_yend{k}", title)
                run.copy(following, f"g_end{k}", title)
                run.kernel("readout_back", f"backward: readout {k}", g_y=f"g_yend{k}", **names)
            for step in reversed(steps):
                _block_backward(run, step)
        run.kernel("tokens_back", "backward: tokens", g="g_x0")
        run.kernel("scatter", "backward: tokens")

    def _arrays(self, network: TokenNetwork) -> tuple[dict[str, Field], dict[str, str]]:
        """The arrays of a workspace, and which names are of the same."""
        real, d = DTYPES[self.dtype], network.embedding.shape[1]
        names = token_arrays(self._room.stages, d, self.n_heads)
        shared: dict[str, str] = {}
        for name in (*names["token"], *names["atom"]):
            plain = name.rstrip("0123456789")
            if plain in ("g_up", "g_atom_up"):  # found again at next to no cost
                shared[name] = plain if self.keeps else name.removeprefix("g_")
            elif plain in _IN_PLACE and not self.keeps:
                shared[name] = _IN_PLACE[plain]
        fields = {
            shared.get(name, name): Field(axis, width, real)
            for axis, widths in names.items()
            for name, width in widths.items()
        }
        fields |= {name: Field("edge", n, torch.float64) for name, n in (("vectors", 3), ("slope", 1), ("gradient", 3))}
        index = {"slot": "edge", "back": "token", "count": "atom"}
        return fields | {name: Field(axis, 1, torch.int64) for name, axis in index.items()}, shared

    def _sources(self, network: TokenNetwork) -> Sources:
        return _sources(network, self._room.stages[0].blocks[0], self.dtype)


def token_arrays(stages: Sequence[Stage], d: int, n_heads: int) -> dict[str, dict[str, int]]:
    """Widths of the arrays of which there is a row for every "token" and every "atom"."""
    blocks = [block for stage in stages for block in stage.blocks]
    width, heads = blocks[0].down.shape[1], blocks[0].out.shape[1]
    tokens = {"weight": 1, "g_weight": 1, "y": d, "sent": d, "h": width}
    atoms: dict[str, int] = {}
    for k in range(len(stages)):
        tokens |= {f"{name}{k}": d for name in ("end", "g_end", "g_yend")}
    for i, block in enumerate(blocks):
        tokens |= {f"{name}{i}": d for name in ("x", "mid", "g_x", "g_mid", "g_yx", "g_ymid")}
        tokens |= {f"qkv{i}": 3 * heads, f"g_qkv{i}": 3 * heads, f"o{i}": heads, f"g_o{i}": heads}
        tokens |= {f"level{i}": n_heads, f"up{i}": 2 * width, f"g_up{i}": 2 * width, f"g_h{i}": width}
        if block.atom_down is not None:
            wide = block.atom_down.shape[1]
            atoms |= {"atom_y": d, "atom_h": wide, f"g_atom_h{i}": wide}
            atoms |= {f"atom_up{i}": 2 * wide, f"g_atom_up{i}": 2 * wide}
    return {"token": tokens, "atom": atoms}


def _block_forward(run: Run, step: Step) -> None:
    (i, block, after), title = step, f"forward: block {step.i}: "
    run.kernel("norm", title + "norm", x=f"x{i}", y="y")
    run.linear("y", block.qkv.T, f"qkv{i}", title + "linear")
    run.kernel("attention", title + "attention", qkv=f"qkv{i}", level=f"level{i}", out=f"o{i}")
    run.linear(f"o{i}", block.out.T, f"mid{i}", title + "linear", add=f"x{i}")
    run.kernel("norm", title + "norm", x=f"mid{i}", y="y")
    run.linear("y", block.up.T, f"up{i}", title + "linear")
    run.kernel("swiglu", title + "swiglu", up=f"up{i}", h="h")
    run.linear("h", block.down.T, after, title + "linear", add=f"mid{i}")
    if block.atom_up is not None and block.atom_down is not None:
        run.take_atoms("y", "atom_y", title + "atoms")
        run.linear("atom_y", block.atom_up.T, f"atom_up{i}", title + "atoms")
        run.kernel("atom_swiglu", title + "atoms", up=f"atom_up{i}", h="atom_h")
        run.linear("atom_h", block.atom_down.T, "atom_y", title + "atoms")
        run.add_to_atoms("atom_y", after, title + "atoms")


def _block_backward(run: Run, step: Step) -> None:
    """From the gradient of what came out to that of what went in; g_weight gets its share."""
    (i, block, after), title = step, f"backward: block {step.i}: "
    run.linear(f"g_{after}", block.down, f"g_h{i}", title + "linear")
    run.kernel("swiglu_back", title + "swiglu", up=f"up{i}", g_h=f"g_h{i}", g_up=f"g_up{i}")
    run.linear(f"g_up{i}", block.up, f"g_ymid{i}", title + "linear")
    if block.atom_up is not None and block.atom_down is not None:
        names = {"up": f"atom_up{i}", "g_h": f"g_atom_h{i}", "g_up": f"g_atom_up{i}"}
        run.take_atoms(f"g_{after}", "atom_y", title + "atoms")
        run.linear("atom_y", block.atom_down, f"g_atom_h{i}", title + "atoms")
        run.kernel("atom_swiglu_back", title + "atoms", **names)
        run.linear(f"g_atom_up{i}", block.atom_up, "atom_y", title + "atoms")
        run.add_to_atoms("atom_y", f"g_ymid{i}", title + "atoms")
    names = {"x": f"mid{i}", "g_y": f"g_ymid{i}", "g": f"g_{after}", "g_to": f"g_mid{i}"}
    run.kernel("norm_back", title + "norm", **names)
    run.linear(f"g_mid{i}", block.out, f"g_o{i}", title + "linear")
    names = {"qkv": f"qkv{i}", "level": f"level{i}", "g": f"g_o{i}", "g_qkv": f"g_qkv{i}"}
    run.kernel("attention_back", title + "attention", **names)
    run.linear(f"g_qkv{i}", block.qkv, f"g_yx{i}", title + "linear")
    names = {"x": f"x{i}", "g_y": f"g_yx{i}", "g": f"g_mid{i}", "g_to": f"g_x{i}"}
    run.kernel("norm_back", title + "norm", **names)


def compile_all(sources: Sources) -> dict[str, Kernel]:
    """The kernels by name."""
    return {
        name: Kernel(compile_kernel(source.text, len(source.arguments)), source.arguments, axis, work)
        for name, (source, axis, work) in sources.items()
    }


def _sources(network: TokenNetwork, block: Block, dtype: str) -> Sources:
    """``block`` as it is prepared."""
    n_features, d = network.embedding.shape
    width, n_species, n_radial = block.down.shape[1], network.of_atoms.shape[0], n_features - 4
    heads = (network.n_heads, block.out.shape[1] // network.n_heads, dtype)
    repulsion, features = network.screening, n_radial * d + 200
    sources: Sources = {
        "distances": (token_codegen.distances_source(n_species, repulsion), "atom", 200),
        "tokens": (token_codegen.tokens_source(d, n_radial, n_species, dtype), "atom", features),
        "norm": (token_codegen.norm_source(d, dtype), "token", 2 * d),
        "attention": (attention_codegen.attention_source(*heads), "atom", 100 * d),
        "swiglu": (token_codegen.swiglu_source(width, dtype), "token", EXPONENTIAL * width),
        "readout": (token_codegen.readout_source(d, dtype), "atom", 4 * d),
        "readout_back_last": (token_codegen.readout_back_source(d, dtype, True), "atom", 8 * d),
        "swiglu_back": (token_codegen.swiglu_back_source(width, dtype), "token", EXPONENTIAL * width),
        "attention_back": (attention_codegen.attention_back_source(*heads), "atom", 250 * d),
        "norm_back": (token_codegen.norm_back_source(d, dtype), "token", 4 * d),
        "tokens_back": (token_codegen.tokens_back_source(d, n_radial, dtype, bool(repulsion)), "atom", features),
        "scatter": (geometry_codegen.scatter_source(), "atom", 0),
    }
    if len(network.stages) > 1:
        sources |= {
            "receive": (token_codegen.receive_source(d, dtype), "atom", d),
            "receive_back": (token_codegen.receive_back_source(d, dtype), "atom", d),
            "readout_back": (token_codegen.readout_back_source(d, dtype, False), "atom", 8 * d),
        }
    if block.atom_down is not None:
        width = block.atom_down.shape[1]
        sources |= {
            "atom_swiglu": (token_codegen.swiglu_source(width, dtype), "atom", 0),
            "atom_swiglu_back": (token_codegen.swiglu_back_source(width, dtype), "atom", 0),
        }
    return sources
