"""A whole neighbour-token transformer with frozen weights on the CPU: energies, forces and virial without autograd.

What ``models.transformer`` computes with torch on padded arrays is done here on the tokens that there are: linear maps
by ``torch.mm`` over all of them at once, in the precision that ``torch.set_float32_matmul_precision`` allows, and what
lies in between by the kernels of ``token_codegen``, forward and backward.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from equimd.kernels import geometry_codegen, token_codegen
from equimd.kernels.compiled import compile_kernel
from equimd.kernels.frozen import DTYPES, Evaluation, Geometry, check_inputs, make_evaluation
from equimd.kernels.geometry_codegen import Screening
from equimd.kernels.source import LANES, KernelSource
from equimd.kernels.threads import WORK_PER_THREAD, run_ranges, torch_on_one_thread
from equimd.kernels.topology import Topology
from equimd.kernels.workspace import Field, Workspace


@dataclass(frozen=True)
class Block:
    """Weights of attention and SwiGLU, all (fan out, fan in) as torch's linear maps hold them.

    qkv (3d, d), out (d, d), up (2F, d), down (d, F); atom_up (2A, d) and atom_down (d, A) of a SwiGLU for atoms' tokens
    alone, if there is one.
    """

    qkv: Tensor
    out: Tensor
    up: Tensor
    down: Tensor
    atom_up: Tensor | None = None
    atom_down: Tensor | None = None


@dataclass(frozen=True)
class Stage:
    """Blocks, their readout, and the message (d, d) to the next stage; None after the last.

    heads (2, d): of the atom's token and of edges. constant: of the readout.
    """

    blocks: Sequence[Block]
    heads: Tensor
    constant: Tensor
    message: Tensor | None


@dataclass(frozen=True)
class TokenNetwork:
    """Weights of a transformer; see ``token_codegen.tokens_source`` for those of the embedding.

    screening and pairs (S, S, 3) of the nuclear repulsion, see ``geometry_codegen.geometry_source``.
    """

    stages: Sequence[Stage]
    frequencies: Tensor
    embedding: Tensor
    of_atoms: Tensor
    of_pairs: Tensor
    n_heads: int
    cutoff: float
    cutoff_width: float
    screening: Screening
    pairs: Tensor


class FusedTransformer:
    """``network`` as a function of the geometry, compiled for its widths and one dtype.

    Each directed edge must have its reverse in the list. Edges beyond the cutoff have no token. Raises OSError where no
    folder can be written to.
    """

    def __init__(self, network: TokenNetwork, dtype: str) -> None:
        if network.embedding.device.type != "cpu":
            raise ValueError("weights must be on the CPU")
        self.dtype = dtype
        n_features, d = network.embedding.shape
        self._stages = [self._prepare(stage, network.n_heads) for stage in network.stages]
        blocks = [block for stage in self._stages for block in stage.blocks]
        scales = [network.cutoff, network.cutoff_width, (2 / network.cutoff) ** 0.5]
        self._constants = {
            "scales": torch.tensor(scales, dtype=torch.float64, device="cpu"),
            "frequencies": network.frequencies.to(torch.float64).contiguous(),
            "pairs": network.pairs.to(torch.float64).contiguous(),
            "embedding": self._cast(network.embedding),
            "of_atoms": self._cast(network.of_atoms),
            "of_pairs": self._cast(network.of_pairs),
        }
        for k, stage in enumerate(self._stages):
            self._constants |= {f"heads{k}": stage.heads, f"constant{k}": stage.constant}
        self._fields = _fields(blocks, len(self._stages), d, network.n_heads, DTYPES[dtype])
        self._kernels = _compile(network, blocks[0], n_features - 4, dtype)
        self._spare: list[Workspace] = []

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to(DTYPES[self.dtype]).clone(memory_format=torch.contiguous_format)

    def _prepare(self, stage: Stage, n_heads: int) -> Stage:
        """Cast, with 1/√D in the queries' weights; heads and hidden channels filled up with zeros to whole vectors."""
        blocks = []
        for block in stage.blocks:
            d = block.out.shape[0]
            qkv = block.qkv.view(3, n_heads, d // n_heads, d).clone()
            qkv[0] *= (d / n_heads) ** -0.5
            out = block.out.view(d, n_heads, d // n_heads)
            weights = [_fill(qkv, 2).flatten(0, 2), _fill(out, 2).flatten(1)]
            for up, down in ((block.up, block.down), (block.atom_up, block.atom_down)):
                if up is not None and down is not None:
                    weights += [_fill(up.view(2, -1, d), 1).flatten(0, 1), _fill(down, 1)]
            blocks.append(Block(*(self._cast(w) for w in weights)))
        message = None if stage.message is None else self._cast(stage.message)
        return Stage(blocks, self._cast(stage.heads), self._cast(stage.constant), message)

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
                "seed": self._cast(seed),
                "reverse": reverse,
                "order": topology.receiver_order,
                "other": topology.senders,
                "ptr": topology.receiver_ptr,
            }
            with torch_on_one_thread() as n_threads:
                run = _Run(self._kernels, workspace, topology, inputs | results._asdict(), n_threads, seconds)
                self._forward(run)
                self._backward(run)
            self._spare.append(workspace)
        return results

    def _forward(self, run: "_Run") -> None:
        run.make_tokens()
        i = 0
        for k, stage in enumerate(self._stages):
            for a, block in enumerate(stage.blocks):
                after = f"end{k}" if a == len(stage.blocks) - 1 else f"x{i + 1}"
                _block_forward(run, block, i, after)
                i += 1
            run.kernel("readout", f"forward: readout {k}", x=f"end{k}", heads=f"heads{k}", constant=f"constant{k}")
            if stage.message is not None:
                run.linear("y", stage.message.T, "sent", f"forward: message {k}")
                run.kernel("receive", f"forward: message {k}", x=f"end{k}", x_next=f"x{i}")

    def _backward(self, run: "_Run") -> None:
        i = sum(len(stage.blocks) for stage in self._stages)
        for k in range(len(self._stages) - 1, -1, -1):
            stage, names = self._stages[k], {"x": f"end{k}", "heads": f"heads{k}"}
            if stage.message is None:
                run.kernel("readout_back_last", f"backward: readout {k}", **names)
            else:
                run.kernel("receive_back", f"backward: message {k}", g_sent="sent")
                run.linear("sent", stage.message, "y", f"backward: message {k}")
                run.kernel("readout_back", f"backward: readout {k}", g_y="y", **names)
            for block in reversed(stage.blocks):
                i -= 1
                _block_backward(run, block, i)
        run.kernel("tokens_back", "backward: tokens")
        run.kernel("scatter", "backward: tokens")


def _fill(weight: Tensor, axis: int) -> Tensor:
    """With zeros along the axis, so that it is of whole vectors."""
    missing = -weight.shape[axis] % LANES
    return F.pad(weight.detach(), [0, 0] * (weight.ndim - 1 - axis) + [0, missing])


def _block_forward(run: "_Run", block: Block, i: int, after: str) -> None:
    """x{i} → ``after``; what the way back needs stays in x{i}, qkv{i}, level{i}, mid{i} and up{i}."""
    title = f"forward: block {i}: "
    run.kernel("norm", title + "norm", x=f"x{i}", y="y")
    run.linear("y", block.qkv.T, f"qkv{i}", title + "linear")
    run.kernel("attention", title + "attention", qkv=f"qkv{i}", level=f"level{i}", out="o")
    run.linear("o", block.out.T, f"mid{i}", title + "linear", add=f"x{i}")
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


def _block_backward(run: "_Run", block: Block, i: int) -> None:
    """g, the gradient of what the block gave, becomes that of x{i}; g_weight gets its share."""
    title = f"backward: block {i}: "
    run.linear("g", block.down, "h", title + "linear")
    run.kernel("swiglu_back", title + "swiglu", up=f"up{i}", g_h="h")
    run.linear(f"up{i}", block.up, "y", title + "linear")
    if block.atom_up is not None and block.atom_down is not None:
        run.take_atoms("g", "atom_y", title + "atoms")
        run.linear("atom_y", block.atom_down, "atom_h", title + "atoms")
        run.kernel("atom_swiglu_back", title + "atoms", up=f"atom_up{i}", g_h="atom_h")
        run.linear(f"atom_up{i}", block.atom_up, "atom_y", title + "atoms")
        run.add_to_atoms("atom_y", "y", title + "atoms")
    run.kernel("norm_back", title + "norm", x=f"mid{i}", g_y="y")
    run.linear("g", block.out, "o", title + "linear")
    run.kernel("attention_back", title + "attention", qkv=f"qkv{i}", level=f"level{i}", g="o")
    run.linear("g_qkv", block.qkv, "y", title + "linear")
    run.kernel("norm_back", title + "norm", x=f"x{i}", g_y="y")


class _Kernel(NamedTuple):
    run: Callable[..., None]
    arguments: tuple[str, ...]
    axis: Literal["atom", "token"]  # what it walks
    work: int  # multiply-adds per token or edge; 0 where only one thread may write


def _compile(network: TokenNetwork, block: Block, n_radial: int, dtype: str) -> dict[str, _Kernel]:
    d, width, n_species = network.embedding.shape[1], block.down.shape[1], network.of_atoms.shape[0]
    heads = (network.n_heads, block.out.shape[1] // network.n_heads, dtype)
    repulsion = network.screening
    exponential = 20  # multiply-adds that take as long
    sources: dict[str, tuple[KernelSource, Literal["atom", "token"], int]] = {
        "distances": (token_codegen.distances_source(n_species, repulsion), "atom", 200),
        "tokens": (token_codegen.tokens_source(d, n_radial, n_species, dtype), "atom", n_radial * d + 200),
        "norm": (token_codegen.norm_source(d, dtype), "token", 2 * d),
        "attention": (token_codegen.attention_source(*heads), "atom", 100 * d),
        "swiglu": (token_codegen.swiglu_source(width, dtype), "token", exponential * width),
        "readout": (token_codegen.readout_source(d, dtype), "atom", 4 * d),
        "readout_back_last": (token_codegen.readout_back_source(d, dtype, True), "atom", 8 * d),
        "swiglu_back": (token_codegen.swiglu_back_source(width, dtype), "token", exponential * width),
        "attention_back": (token_codegen.attention_back_source(*heads), "atom", 250 * d),
        "norm_back": (token_codegen.norm_back_source(d, dtype), "token", 4 * d),
        "tokens_back": (
            token_codegen.tokens_back_source(d, n_radial, dtype, bool(repulsion)),
            "atom",
            n_radial * d + 200,
        ),
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
    return {
        name: _Kernel(compile_kernel(source.text, len(source.arguments), source.modules), source.arguments, axis, work)
        for name, (source, axis, work) in sources.items()
    }


def _fields(blocks: Sequence[Block], n_stages: int, d: int, n_heads: int, real: torch.dtype) -> dict[str, Field]:
    """The arrays of a workspace: widths per token, and what there is per atom and per edge."""
    width, heads = blocks[0].down.shape[1], blocks[0].out.shape[1]
    tokens = {"weight": 1, "g_weight": 1, "y": d, "sent": d, "o": heads, "h": width, "g": d, "g_qkv": 3 * heads}
    tokens |= {f"end{k}": d for k in range(n_stages)}
    atoms: dict[str, int] = {}
    for i, block in enumerate(blocks):
        tokens |= {f"x{i}": d, f"qkv{i}": 3 * heads, f"level{i}": n_heads, f"mid{i}": d, f"up{i}": 2 * width}
        if block.atom_down is not None:
            atoms |= {f"atom_up{i}": 2 * block.atom_down.shape[1], "atom_h": block.atom_down.shape[1], "atom_y": d}
    edges = {"slot": Field("edge", 1, torch.int64)}
    edges |= {name: Field("edge", n, torch.float64) for name, n in (("vectors", 3), ("slope", 1), ("gradient", 3))}
    return {
        **{name: Field("token", n, real) for name, n in tokens.items()},
        **{name: Field("atom", n, real) for name, n in atoms.items()},
        **edges,
        "back": Field("token", 1, torch.int64),
        "count": Field("atom", 1, torch.int64),
    }


class _Run:
    """One evaluation: kernels and linear maps on arrays by name."""

    def __init__(
        self,
        kernels: Mapping[str, _Kernel],
        workspace: Workspace,
        topology: Topology,
        tensors: dict[str, Tensor],
        n_threads: int,
        seconds: dict[str, float] | None,
    ) -> None:
        self._kernels, self._workspace, self._topology, self._seconds = kernels, workspace, topology, seconds
        self._held = tensors  # as long as their addresses are used
        self._n_threads = n_threads
        self._n_tokens = 0
        workspace.fit(atom=topology.n_receivers, edge=topology.n_edges)
        self._pointers = workspace.pointers | {name: tensor.data_ptr() for name, tensor in tensors.items()}

    def make_tokens(self) -> None:
        """Find the edges within the cutoff, make room for their tokens, and fill x0."""
        n = self._topology.n_receivers
        self.kernel("distances", "forward: tokens")
        first = torch.zeros(n + 1, dtype=torch.int64, device="cpu")
        torch.cumsum(self._workspace.tensors["count"][:n] + 1, 0, out=first[1:])
        longest = (first[1:] - first[:-1]).max().reshape(1)
        self._held |= {"first": first, "longest": longest}
        self._n_tokens = int(first[-1])
        self._workspace.fit(token=self._n_tokens)
        self._pointers |= self._workspace.pointers
        self._pointers |= {"first": first.data_ptr(), "longest": longest.data_ptr()}
        self.kernel("tokens", "forward: tokens", x="x0")

    def kernel(self, name: str, title: str, **names: str) -> None:
        """Run a kernel; ``names`` are of the arrays that are not called as the kernel calls them."""
        start = time.perf_counter()
        kernel = self._kernels[name]
        arguments = [self._pointers[names.get(argument, argument)] for argument in kernel.arguments]
        if kernel.axis == "token":
            bounds = self._bounds(self._n_tokens, kernel.work)
        else:
            bounds = self._topology.split(self._n_parts(self._topology.n_edges * kernel.work))
        run_ranges(kernel.run, arguments, bounds)
        self._add_time(title, start)

    def linear(self, source: str, weight: Tensor, target: str, title: str, add: str = "") -> None:
        """target = source @ weight, or that added to another array."""
        start = time.perf_counter()
        x, out, more = self._rows(source), self._rows(target), self._rows(add) if add else None

        def multiply(low: int, high: int) -> None:
            if more is None:
                torch.mm(x[low:high], weight, out=out[low:high])
            else:
                torch.addmm(more[low:high], x[low:high], weight, out=out[low:high])

        run_ranges(multiply, (), self._bounds(len(x), weight.numel()))
        self._add_time(title, start)

    def take_atoms(self, source: str, target: str, title: str) -> None:
        """target (N, d) = rows of the atoms' own tokens."""
        start = time.perf_counter()
        torch.index_select(self._rows(source), 0, self._held["first"][:-1], out=self._rows(target))
        self._add_time(title, start)

    def add_to_atoms(self, source: str, target: str, title: str) -> None:
        """Add (N, d) to the rows of the atoms' own tokens."""
        start = time.perf_counter()
        self._rows(target).index_add_(0, self._held["first"][:-1], self._rows(source))
        self._add_time(title, start)

    def _n_parts(self, work: int) -> int:
        return max(1, min(self._n_threads, work // WORK_PER_THREAD))

    def _bounds(self, n_rows: int, work_per_row: int) -> list[int]:
        parts = self._n_parts(n_rows * work_per_row)
        return [n_rows * k // parts for k in range(parts + 1)]

    def _rows(self, name: str) -> Tensor:
        return self._workspace.rows(name)

    def _add_time(self, title: str, start: float) -> None:
        if self._seconds is not None:
            self._seconds[title] = self._seconds.get(title, 0.0) + time.perf_counter() - start
