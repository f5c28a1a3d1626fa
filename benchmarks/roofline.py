"""How far the convolution's kernels are from what the processor can do: arithmetic, memory traffic, and time.

    python benchmarks/roofline.py [--threads 2] [--seconds 1]

The roofline of Williams, Waterman and Patterson (Commun. ACM 52, 65, 2009): no kernel can take less than

    bound = max(arithmetic / peak rate, traffic / bandwidth).

The peak is that of fused multiply-adds; the bandwidth that of reading or of a triad, whichever is higher, on arrays as
large as the kernel's. Both are measured in turns with the kernel, on the same threads, and their fastest calls count;
of the kernel it is the median. Arithmetic is counted by formulas from the plan, a multiply-add as two operations, and
compared with what stands in the generated source. Traffic is given twice: with every array touched once, which the
bound takes; and as if caches held nothing but the present atom, so that the rows at the other end are moved for every
edge, and what is written has to be read before.

Writes benchmarks/results/roofline.json and the table in benchmarks/README.md; 2 minutes.
"""

import argparse
import ast
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from convolution import N_CHANNELS, Problem, make_problem, take_turns, written
from tables import markdown, write_table
from torch import Tensor

from equimd.kernels import ConvolutionPlan, make_layer_plan
from equimd.kernels.codegen import kernel_source, path_terms
from equimd.kernels.compiled import assembly, compile_kernel, get_kernel
from equimd.kernels.ir import LANES
from equimd.kernels.reference import convolve_reference
from equimd.kernels.threads import run_ranges
from equimd.results import provenance, write_text_atomically

RESULTS = Path(__file__).with_name("results") / "roofline.json"
KINDS = ("forward", "grad_x", "grad_yw")
REAL, INDEX = 4, 8  # bytes of a number and of an index
AGREEMENT = 1e-5  # of float32 sums over some fifty edges of some hundred products, relative to their norm
# The peak kernel: numbers in a block, independent chains of multiply-adds, their length, passes over a block.
BLOCK, CHAINS, LENGTH, PASSES = 2048, 12, 32, 1000
MIN_TRAFFIC = 1 << 27  # bytes that a call moves at least, so that waking a thread does not count

_HEAD = """
def kernel(x: float32[:], y: float32[:], z: float32[:], low: int64, high: int64):
    a, b, c = x[low:], y[low:], z[low:]
"""
READ = ["s = float32(0)", "for i in range(high - low):", "    s += f * a[i]", "c[0] += s"]
TRIAD = ["for i in range(high - low):", "    c[i] = a[i] + f * b[i]"]


class Work(NamedTuple):
    """Floating-point operations of a kernel, and bytes: with every array touched once, and with nothing in caches."""

    operations: int
    bytes_once: int
    bytes_uncached: int


def count(kind: str, problem: Problem) -> Work:
    """The work of one kernel on one problem."""
    plan, n_edges, c = problem.plan, problem.topology.n_edges, N_CHANNELS
    n_nodes, (per_edge, per_channel) = problem.topology.n_receivers, operations(kind, plan)
    rows = {"x": n_nodes * plan.dim_in, "out": n_nodes * plan.dim_out, "w": n_edges * plan.n_paths}
    features, outputs, weights = (REAL * c * rows[name] for name in ("x", "out", "w"))
    harmonics, far = REAL * n_edges * plan.dim_sh, REAL * c * n_edges * plan.dim_in
    shared = features + outputs + weights + harmonics + INDEX * (2 * n_edges + n_nodes)
    if kind == "forward":
        once, uncached = shared, shared - features + far + outputs
    elif kind == "grad_x":
        once = shared + INDEX * n_edges
        uncached = once - features + 2 * far
    else:
        once = shared + weights + harmonics
        uncached = once - features + far + weights + harmonics
    return Work(n_edges * (per_edge + c * per_channel), once, uncached)


def operations(kind: str, plan: ConvolutionPlan) -> tuple[int, int]:
    """Multiplications and additions for each edge, and for each edge and channel.

    With n nonzero coefficients, n' of them other than ±1, q pairs (i, k) that some j couples, r output rows and
    h harmonics, each summed over the P paths: couplings take n' products and n − q additions for an edge; for a channel

        forward  q products a·x, q − r additions, r multiply-adds with w                     2q + r
        grad_x   r products w·g, q multiply-adds a·g                                         2q + r
        grad_yw  q products x·g, n' products and n − h additions for v, h products and
                 h − P additions for Σ y·v, h multiply-adds w·v                              q + n' + n + 3h − P

    Raises:
        AssertionError: where the generated source has other numbers.
    """
    n, scaled = plan.n_terms, 0
    q = r = h = 0
    for path in plan.paths:
        terms = [value for _, _, coupled in path_terms(path) for _, value in coupled]
        scaled += sum(abs(abs(value) - 1) > 1e-14 for value in terms)
        q += sum(1 for _ in path_terms(path))
        r += 2 * path.l3 + 1
        h += 2 * path.l2 + 1
    counted = (0, q + scaled + n + 3 * h - plan.n_paths) if kind == "grad_yw" else (scaled + n - q, 2 * q + r)
    written = _in_source(kernel_source(kind, plan, N_CHANNELS, "float32"))
    _require(counted == written, f"{kind} is counted as {counted}, but its source has {written}")
    return counted


def _in_source(source: str) -> tuple[int, int]:
    """Operations that stand in the loop over edges, and in the loops over channels inside of it."""
    every = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.For)]
    (edges,) = (node for node in every if isinstance(node.target, ast.Name) and node.target.id == "m")
    channels = [statement for statement in edges.body if isinstance(statement, ast.For)]
    scalars = [s for s in edges.body if isinstance(s, ast.Assign) and "ahead" not in ast.unparse(s.targets[0])]

    def total(statements: Sequence[ast.AST]) -> int:
        nodes = [node for statement in statements for node in ast.walk(statement)]
        return sum(isinstance(node, (ast.BinOp, ast.AugAssign)) for node in nodes)

    return total(scalars), total(channels)


class Probe(NamedTuple):
    """A call, and how much it does: operations or bytes."""

    call: Callable[[], None]
    amount: int


class Probes:
    """What shows the peak and the bandwidth of this processor, on the threads that the convolution uses."""

    def peak(self, threads: int) -> tuple[Probe, int | None]:
        """Multiply-adds on numbers in registers; and the bits of a register, None where x86 does not name them."""
        chains = range(CHAINS)
        body = [
            f"for i in range(0, {BLOCK}, {LANES}):",
            "    p, q = load(a, i), load(b, i)",
            *(f"    v{k} = fma(splat(float32({k})), splat(float32(1)), p)" for k in chains),
            *(f"    v{k} = fma(v{k}, q, p)" for _ in range(LENGTH) for k in chains),
            *(f"    v0 = fma(v{k}, splat(float32(1)), v0)" for k in chains[1:]),
            "    store(c, i, v0)",
        ]
        kernel, source = _compile([f"for _ in range({PASSES}):", *(f"    {line}" for line in body)])
        arrays = [0.5 * torch.rand(threads * BLOCK) for _ in range(3)]  # below one, so that the chains converge
        fused = [line for line in assembly(source).splitlines() if "vfmadd" in line and "ps\t" in line]
        widths = [bits for line in fused for name, bits in (("zmm", 512), ("ymm", 256), ("xmm", 128)) if name in line]
        operations = 2 * threads * BLOCK * PASSES * CHAINS * LENGTH
        bounds = [BLOCK * k for k in range(threads + 1)]
        return _probe(kernel, arrays, bounds, operations), max(set(widths), key=widths.count, default=None)

    def bandwidth(self, n_bytes: int, threads: int) -> dict[str, Probe]:
        """Reading an array of so many bytes, and a triad, c = a + f·b, on three that have them together."""
        n, passes = n_bytes // (3 * REAL), max(1, MIN_TRAFFIC // n_bytes)
        whole, thirds = torch.ones(3 * n), [torch.ones(n) for _ in range(3)]
        probes = {}
        for name, body, arrays in (("read", READ, [whole] * 3), ("triad", TRIAD, thirds)):
            lines = [f"for p in range({passes}):", "    f = float32(p)", *(f"    {line}" for line in body)]
            kernel, _ = _compile(lines)
            bounds = [len(arrays[0]) * k // threads for k in range(threads + 1)]
            probes[name] = _probe(kernel, arrays, bounds, passes * 3 * n * REAL)
        return probes


def _compile(lines: Sequence[str]) -> tuple[Callable[..., None], str]:
    """A function of three addresses and a range, and its source."""
    source = _HEAD + "".join(f"    {line}\n" for line in lines)
    return compile_kernel(source, 3), source


def _probe(kernel: Callable[..., None], arrays: Sequence[Tensor], bounds: list[int], amount: int) -> Probe:
    return Probe(lambda: run_ranges(kernel, [array.data_ptr() for array in arrays], bounds), amount)


def rates(probes: Mapping[str, Probe], timings: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Gflop/s or GB/s of probes, in their fastest call."""
    return {name: 1e-6 * probe.amount / timings[name]["best"] for name, probe in probes.items()}


def kernel_calls(problem: Problem, threads: int) -> dict[str, Callable[[], None]]:
    """The three kernels on one problem, after their results have been compared with the reference in float64.

    Raises:
        AssertionError: where they differ by more than AGREEMENT.
    """
    plan, topology = problem.plan, problem.topology
    x, y, w = (tensor.detach() for tensor in problem.floats)
    g, out, (gx, gy, gw) = problem.gradient, torch.empty_like(problem.gradient), map(torch.empty_like, (x, y, w))
    results = {"forward": (out, out), "grad_x": (gx, gx), "grad_yw": (gy, gw)}

    def make(kind: str) -> Callable[[], None]:
        kernel = get_kernel(kind, plan, N_CHANNELS, "float32")
        order, bounds = topology.receiver_order, topology.split(threads)
        if kind == "grad_x":
            order, bounds = topology.sender_groups(threads)
        indices = (order, topology.senders, topology.receivers, topology.receiver_ptr)
        tensors = (x, y, w, g, *results[kind], *indices)

        def call() -> None:
            if kind == "grad_x":
                gx.numpy().fill(0)  # not by torch: its threads would spin on beside ours
            run_ranges(kernel, [tensor.data_ptr() for tensor in tensors], bounds)

        return call

    calls = {kind: make(kind) for kind in KINDS}
    for call in calls.values():
        call()
    edges = topology.senders, topology.receivers
    inputs = [tensor.double().requires_grad_() for tensor in (x, y, w)]
    expected = convolve_reference(*inputs, *edges, plan, topology.n_receivers)
    wanted = [expected.detach(), *torch.autograd.grad(expected, inputs, g.double())]
    for name, found, exact in zip(("output", "gx", "gY", "gw"), (out, gx, gy, gw), wanted, strict=True):
        error = float((found - exact).norm() / exact.norm())
        _require(error < AGREEMENT, f"{name} differs from the reference by {error:.1e}")
    return calls


def measure(problem: Problem, threads: int, seconds: float) -> list[dict[str, Any]]:
    """A row for every kernel, in turns with what shows the processor's limits."""
    rows = []
    for kind, call in kernel_calls(problem, threads).items():
        work, every = count(kind, problem), Probes()
        probes = {"peak": every.peak(threads)[0]} | every.bandwidth(work.bytes_once, threads)
        timings = take_turns({kind: call} | {name: probe.call for name, probe in probes.items()}, seconds)
        timing, found = timings[kind], rates(probes, timings)
        arithmetic = 1e-6 * work.operations / found["peak"]
        memory = 1e-6 * work.bytes_once / max(found["read"], found["triad"])
        bound = max(arithmetic, memory)
        rows.append(
            {"l_max": problem.plan.l_max_sh, "kernel": kind, "threads": threads}
            | work._asdict()
            | timing
            | {
                "gflops": 1e-6 * work.operations / timing["ms"],
                "gbytes_per_s": 1e-6 * work.bytes_once / timing["ms"],
                "limits": found,
                "bound_ms": bound,
                "limit": "arithmetic" if arithmetic > memory else "memory",
                "times_bound": timing["ms"] / bound,
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def processor(threads: int, sizes: Mapping[str, int], seconds: float) -> dict[str, Any]:
    """Peak with vectors as wide as can be; bandwidths of arrays that fit each level."""
    every = Probes()
    probe, bits = every.peak(threads)
    found = rates({"peak": probe}, take_turns({"peak": probe.call}, seconds))["peak"]
    peaks = {"widest": {"gflops": found, "vector_bits": bits}}
    bandwidths = {}
    for name, size in sizes.items():
        probes = every.bandwidth(size * threads if name == "L2" else size, threads)
        timings = take_turns({kind: probe.call for kind, probe in probes.items()}, seconds)
        bandwidths[name] = rates(probes, timings)
    return {"peak": peaks, "bandwidth": bandwidths}


def cache_sizes() -> tuple[int, int]:
    """Bytes of the second and of the last level that a core sees; 1 and 32 MiB where the system does not say."""
    files = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    sizes = [int(file.read_text().strip().removesuffix("K")) << 10 for file in files]
    return (sizes[2], sizes[-1]) if len(sizes) > 2 else (1 << 20, 1 << 25)


def table(results: dict[str, Any]) -> str:
    """Markdown: what the processor can do, and what the kernels do."""
    heads = [f"{name} ({size / 2**20:,.0f} MiB), GB/s" for name, size in results["sizes"].items()]
    rows: list[Sequence[object]] = []
    for threads, block in results["processor"].items():
        peaks = [f"{p['gflops']:.0f} ({p['vector_bits'] or '?'} bits)" for p in block["peak"].values()]
        both = [f"{found['read']:.0f} / {found['triad']:.0f}" for found in block["bandwidth"].values()]
        rows.append((threads, *peaks, *both))
    names = {"default": "multiply-adds, Gflop/s", "widest": "with the widest vectors"}
    first = markdown(("threads", *(names[name] for name in block["peak"]), *heads), rows)
    rows = []
    for r in results["rows"]:
        traffic = f"{1e-6 * r['bytes_once']:.1f} … {1e-6 * r['bytes_uncached']:.1f}"
        attained = f"{r['gflops']:.0f}", f"{r['gbytes_per_s']:.0f}"
        bound = f"{r['bound_ms']:.3f}, {r['limit']}", f"{r['times_bound']:.1f}"
        work = f"{1e-6 * r['operations']:.0f}", traffic
        rows.append((r["l_max"], r["kernel"], r["threads"], *work, written(r), *attained, *bound))
    head = ("l_max", "kernel", "threads", "Mflop", "MB", "ms", "Gflop/s", "GB/s", "bound, ms", "times bound")
    made = results["provenance"]
    where = f"{results['n_edges']:,} edges, {N_CHANNELS} channels; {made['processor']}, float32, {made['date']}; "
    versions = [name for name in ("llvmlite", "numba", "torch") if name in made["versions"]]
    where += ", ".join(f"{name}=={made['versions'][name]}" for name in versions) + "."
    return "\n\n".join((first, markdown(head, rows), where))


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def main() -> None:
    """Measure and write what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="besides one")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each measurement")
    options = parser.parse_args()
    second, last = cache_sizes()
    sizes = {"L2": second // 2, "L3": min(16 * second, last // 2), "DRAM": 3 * last}
    results: dict[str, Any] = {"schema_version": 1, "sizes": sizes, "processor": {}, "rows": []}
    problems = [make_problem(make_layer_plan(l_max)) for l_max in (1, 2, 3)]
    for threads in sorted({1, options.threads}):
        results["processor"][str(threads)] = found = processor(threads, sizes, options.seconds)
        print(threads, json.dumps(found), flush=True)
        for problem in problems:
            results["rows"] += measure(problem, threads, options.seconds)
    results["n_edges"] = problems[0].topology.n_edges
    results["provenance"] = provenance(options.threads).model_dump()
    write_text_atomically(RESULTS, json.dumps(results, indent=2) + "\n")
    write_table("roofline", table(results))


if __name__ == "__main__":
    main()
