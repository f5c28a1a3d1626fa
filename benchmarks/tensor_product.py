"""Ways to compute the tensor product of node features with spherical harmonics: what they cost, what they can express.

    python benchmarks/tensor_product.py [--threads 2] [--l-max L] [--seconds 4]

After Xie, Daigavane, Kotak and Smidt, "The Price of Freedom: Exploring Expressivity and Runtime Tradeoffs in
Equivariant Tensor Products" (2025, arXiv:2506.13523): different products are not the same operation, so the times
stand beside what each can express. One convolution, float32, contestants alternating within one process:

    dense    einsum with the full Clebsch-Gordan tensor, gather and scatter
    sparse   nonzero coefficients only, plain torch, path by path
    e3nn     e3nn's TensorProduct, 'uvu', with the code that it compiles, in its own layout
    equimd   equimd.kernels.convolve, backend "llvm"
    Gaunt    features and harmonics as functions on a grid of the sphere, multiplied pointwise, projected back

The first four compute the same and are compared before anything is timed. The Gaunt product is

    out[n, l3] = sum over edges of w[e, l3] · sum over (l1, l2) of γ(l1, l2, l3) · CG(x_l1, Y_l2)_l3,

one weight per edge, channel and output degree, all paths into a degree with the fixed factors γ, which vanish where
l1 + l2 + l3 is odd; one weight per path is out of its reach. That is verified too. Writes
benchmarks/results/tensor_product.json and the tables in benchmarks/README.md; 5 minutes.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from convolution import N_CHANNELS, Problem, make_problem, take_turns, written
from products import CONTESTANTS, Contestant, sphere
from tables import markdown, write_table
from torch import Tensor

from equimd.kernels import ConvolutionPlan, OutputBlock, make_layer_plan, make_plan, standard_irreps
from equimd.kernels.plan import Path as ProductPath
from equimd.kernels.reference import convolve_reference
from equimd.results import provenance, write_text_atomically

RESULTS = Path(__file__).with_name("results") / "tensor_product.json"
AGREEMENT = 1e-5  # of float32 sums over some fifty edges of some hundred products, relative to their norm
EXACT = 1e-12  # of quadratures in float64 with at most fifty points
SHOWN_L_MAX = 2  # whose paths are tabulated one by one


def name_of(path: ProductPath) -> str:
    """As e3nn would write it, 1o x 2e -> 3o."""
    p1, p2, p3 = ("e" if p == 1 else "o" for p in (path.p1, (-1) ** path.l2, path.p3))
    return f"{path.l1}{p1} x {path.l2}{p2} -> {path.l3}{p3}"


def gaunt_factor(path: ProductPath) -> float:
    """γ of a path: √((2·l1+1)(2·l2+1)) times the 3j symbol (l1 l2 l3; 0 0 0), without its sign."""
    total = path.l1 + path.l2 + path.l3
    if total % 2:
        return 0.0
    squared, half = 1 / math.factorial(total + 1), math.factorial(total // 2)
    for l in (path.l1, path.l2, path.l3):  # noqa: E741
        squared *= math.factorial(total - 2 * l)
        half /= math.factorial(total // 2 - l)
    return math.sqrt((2 * path.l1 + 1) * (2 * path.l2 + 1) * squared) * half


def check_factors(plan: ConvolutionPlan) -> dict[str, float]:
    """γ of every path, from the grid, after its coefficients have been found to be γ times Clebsch-Gordan's.

    Raises:
        AssertionError: where they are not, or where |γ| is not that of ``gaunt_factor``.
    """
    values, weights = sphere(plan.l_max_sh)
    factors = {}
    for path in plan.paths:
        rows = [slice(l * l, (l + 1) ** 2) for l in (path.l1, path.l2, path.l3)]  # noqa: E741
        arrays = [values[:, row].numpy() for row in rows]
        tensor = np.einsum("g,gi,gj,gk->ijk", weights.numpy(), *arrays)
        factor = float((tensor * path.cg).sum() / (path.cg**2).sum())
        difference = float(np.abs(tensor - factor * path.cg).max())
        _require(difference < EXACT, f"{name_of(path)} is not γ times Clebsch-Gordan: {difference:.1e}")
        error = abs(abs(factor) - gaunt_factor(path))
        _require(error < EXACT, f"γ of {name_of(path)} is {factor}, not ±{gaunt_factor(path)}")
        factors[name_of(path)] = factor if gaunt_factor(path) else 0.0
    return factors


def check_agreement(problem: Problem, contestants: dict[str, Contestant]) -> dict[str, float]:
    """Largest relative differences to the reference in float64, of outputs and of the three gradients.

    Raises:
        AssertionError: where one is not below AGREEMENT.
    """
    errors = {}
    for name, contestant in contestants.items():
        own = contestant if name == "Gaunt" else problem  # it has weights and outputs of its own
        floats = contestant.inputs if name == "Gaunt" else problem.floats
        x, sh, radial = inputs = [tensor.detach().double().requires_grad_() for tensor in floats]
        expected = (_gaunt_reference if name == "Gaunt" else _reference)(problem, x, sh, radial)
        gradient, unpack = own.gradient.double(), contestant.unpack
        found = [unpack(contestant.forward(), "out")]
        pairs = zip(contestant.both(), ("x", "sh", "radial"), strict=True)
        found += [unpack(tensor, which) for tensor, which in pairs]
        wanted = [expected.detach(), *torch.autograd.grad(expected, inputs, gradient)]
        errors[name] = max(float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True))
        _require(errors[name] < AGREEMENT, f"{name} differs from the reference by {errors[name]:.1e}")
    return errors


def _reference(problem: Problem, x: Tensor, sh: Tensor, radial: Tensor) -> Tensor:
    edges = problem.topology.senders, problem.topology.receivers
    return convolve_reference(x, sh, radial, *edges, problem.plan, problem.topology.n_receivers)


def _gaunt_reference(problem: Problem, x: Tensor, sh: Tensor, radial: Tensor) -> Tensor:
    """What the Gaunt product should be, by Clebsch-Gordan coefficients: paths weighted by γ · w[l3], and summed."""
    plan, factors = problem.plan, check_factors(problem.plan)
    by_path = torch.stack([factors[name_of(path)] * radial[:, path.l3] for path in plan.paths], dim=1)
    out = _reference(problem, x, sh, by_path)
    blocks = [out[:, block.rows].unflatten(1, (block.n_paths, -1)).sum(dim=1) for block in plan.blocks]
    return torch.cat(blocks, dim=1)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise AssertionError(message)


def expressivity(l_max: int) -> dict[str, Any]:
    """What can be told apart, for features of natural parity and all irreps that their product can have.

    bilinear_maps: the dimension of the space of maps that weights can choose from, per edge and channel.
    """
    plan = make_plan(standard_irreps(l_max), l_max, standard_irreps(l_max, parity=True))
    factors = check_factors(plan)
    kept = [path for path in plan.paths if factors[name_of(path)]]
    # With a weight for every degree of input, harmonic and output: the rank of d log(w1·w2·w3).
    one_hot = np.eye(l_max + 1)
    separable = np.array([np.concatenate([one_hot[p.l1], one_hot[p.l2], one_hot[p.l3]]) for p in kept])
    return {
        "outputs": [
            {
                "irrep": f"{block.l}{'e' if block.p == 1 else 'o'}",
                "clebsch_gordan": block.n_paths,
                "gaunt_paths": sum((p.l3, p.p3) == (block.l, block.p) for p in kept),
            }
            for block in plan.blocks
            if block.n_paths
        ],
        "lost": [name_of(path) for path in plan.paths if path not in kept],
        "bilinear_maps": {
            "clebsch_gordan": plan.n_paths,
            "clebsch_gordan_natural": make_layer_plan(l_max).n_paths,
            "gaunt_per_output_degree": len({p.l3 for p in kept}),
            "gaunt_per_degree_of_all_three": int(np.linalg.matrix_rank(separable)),
        },
    }


def alone(problem: Problem, path: ProductPath) -> Problem:
    """The problem with one path only."""
    single = dataclasses.replace(path, in_offset=0, out_offset=0, weight_index=0)
    irrep_in, irrep_out = (path.l1, path.p1), (path.l3, path.p3)
    block = OutputBlock(*irrep_out, offset=0, n_paths=1)
    plan = ConvolutionPlan((irrep_in,), problem.plan.l_max_sh, (irrep_out,), (single,), (block,))
    parts = problem.x[:, path.in_rows], problem.radial[:, [path.weight_index]], problem.gradient[:, path.out_rows]
    x, radial, gradient = (part.detach().contiguous() for part in parts)
    return dataclasses.replace(
        problem, plan=plan, x=x.requires_grad_(), radial=radial.requires_grad_(), gradient=gradient
    )


def measure(l_max: int, seconds: float) -> dict[str, Any]:
    """Everything about one l_max."""
    problem = make_problem(make_layer_plan(l_max))
    contestants = {name: make(problem) for name, make in CONTESTANTS.items()}
    errors = check_agreement(problem, contestants)
    terms = problem.topology.n_edges * N_CHANNELS * problem.plan.n_terms
    results: dict[str, Any] = {name: {"error": error} for name, error in errors.items()}
    for work in ("forward", "both"):
        calls = {name: getattr(contestant, work) for name, contestant in contestants.items()}
        for name, timing in take_turns(calls, seconds).items():
            results[name][work] = timing | {"ns_per_term": 1e6 * timing["ms"] / terms}
    paths = []
    for path in problem.plan.paths:
        single = alone(problem, path)
        pair = {name: CONTESTANTS[name](single) for name in ("equimd", "sparse")}
        check_agreement(single, pair)
        timings = take_turns({name: contestant.forward for name, contestant in pair.items()}, seconds / 8)
        nonzero = int(np.count_nonzero(path.cg))
        paths.append({"path": name_of(path), "nonzero": nonzero, "size": path.cg.size, "forward": timings})
    return {
        "n_edges": problem.topology.n_edges,
        "n_channels": N_CHANNELS,
        "n_paths": problem.plan.n_paths,
        "n_terms": problem.plan.n_terms,
        "grid_points": len(sphere(l_max)[1]),
        "contestants": results,
        "paths": paths,
        "expressivity": expressivity(l_max),
    }


def tables(results: dict[str, Any]) -> str:
    """Markdown: times, paths one by one, independent outputs, paths lost."""
    every = results["l_max"]
    parts = [_times(every)]
    if str(SHOWN_L_MAX) in every:
        parts += [f"Each path of l_max {SHOWN_L_MAX} alone, forward:", _paths(every[str(SHOWN_L_MAX)])]
    parts += ["Independent outputs of each kind, which is independent weights per edge and channel:", _outputs(every)]
    lost = [f"l_max {l_max}: {', '.join(block['expressivity']['lost'])}" for l_max, block in every.items()]
    parts.append("Paths that the Gaunt product cannot have, l1 + l2 + l3 being odd: " + "; ".join(lost) + ".")
    made, block = results["provenance"], next(iter(every.values()))
    names = [name for name in ("torch", "e3nn", "numba", "llvmlite") if name in made["versions"]]
    versions = ", ".join(f"{name}=={made['versions'][name]}" for name in names)
    size = f"{block['n_edges']:,} edges, {block['n_channels']} channels"
    threads = f"{results['threads']} thread{'s' if results['threads'] > 1 else ''}"
    parts.append(f"{size}; {made['processor']}, {threads}, float32, {made['date']}; {versions}.")
    return "\n\n".join(parts)


def _times(every: dict[str, Any]) -> str:
    rows = []
    for l_max, block in every.items():
        for name, result in block["contestants"].items():
            times = [result[work] for work in ("forward", "both")]
            row = [l_max, name, *(written(time) for time in times)]
            rows.append([*row, *(f"{time['ns_per_term']:.3f}" for time in times)])
    return markdown(("l_max", "product", "forward, ms", "and gradients, ms", "ns per term", "and gradients"), rows)


def _paths(block: dict[str, Any]) -> str:
    rows = []
    for path in block["paths"]:
        times = [written(path["forward"][name]) for name in ("equimd", "sparse")]
        rows.append([path["path"], f"{path['nonzero']} of {path['size']}", *times])
    return markdown(("path", "nonzero coefficients", "equimd, ms", "sparse, ms"), rows)


def _outputs(every: dict[str, Any]) -> str:
    blocks = [block["expressivity"] for block in every.values()]
    found = [{output["irrep"]: output for output in block["outputs"]} for block in blocks]
    rows: list[list[object]] = []
    for irrep in dict.fromkeys(irrep for outputs in found for irrep in outputs):
        row: list[object] = [irrep]
        for outputs in found:
            output = outputs.get(irrep)
            row += ["", ""] if output is None else [output["clebsch_gordan"], int(output["gaunt_paths"] > 0)]
        rows.append(row)
    maps = [block["bilinear_maps"] for block in blocks]
    rows.append(["all", *(n for m in maps for n in (m["clebsch_gordan"], m["gaunt_per_output_degree"]))])
    heads = (f"{name}, l_max {l_max}" for l_max in every for name in ("Clebsch-Gordan", "Gaunt"))
    return markdown(("output", *heads), rows)


def main() -> None:
    """Measure and write what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--l-max", type=int, choices=(1, 2, 3), action="append")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each contestant and kind of work")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results: dict[str, Any] = {"schema_version": 1, "threads": options.threads, "l_max": {}}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text(encoding="utf-8"))
    for l_max in options.l_max or (1, 2, 3):
        results["l_max"][str(l_max)] = measure(l_max, options.seconds)
        print(l_max, json.dumps(results["l_max"][str(l_max)], indent=1), flush=True)
    results |= {"threads": options.threads, "provenance": provenance().model_dump()}
    write_text_atomically(RESULTS, json.dumps(results, indent=2) + "\n")
    write_table("tensor_product", tables(results))


if __name__ == "__main__":
    main()
