"""Python source of the kernels between the matrix products of a frozen neighbour-token transformer.

Tokens lie in one array (M, d), atom by atom, the atom's own first: no slot is empty, and edges beyond the cutoff have
none. ``first`` (N + 1,) says where the tokens of each atom begin, weight (M,) how much each counts, back (M,) which is
the token of the edge in the other direction. Each operation has a kernel that goes forward, and one (…_back) that turns
the gradient of its output into that of its input; what is cheap to find again is not kept in between.

- ``distances``, ``tokens``: from positions to tokens;
- ``norm``, ``swiglu``, and ``attention`` of ``attention_codegen``: what lies between linear maps;
- ``readout``, ``receive``: atomic outputs, and messages to the token of the edge back.

Kernels of ``norm`` and ``swiglu`` walk tokens, all others atoms.
"""

from equimd.kernels.geometry_codegen import Screening, unit_vector, walk_distances
from equimd.kernels.ir import LANES
from equimd.kernels.source import DEEP, DEEPER, EDGE, KernelSource, Source


def distances_source(n_species: int, repulsion: Screening) -> KernelSource:
    """vectors (E, 3), slot (E,): how many-th of its atom's edges within the cutoff, −1 beyond; count (N,) of these.

    ``scales`` begins with the cutoff. If there is one, also the nuclear repulsion, as in ``geometry_source``.
    """
    s = Source("float64")
    s.array("scales", dtype="float64"), s.array("slot", dtype="int64"), s.array("count", dtype="int64")
    s.add("found = 0")
    walk_distances(s, n_species, repulsion)
    s.add("if r > scales[0]:", "    slot[e] = -1", "else:", indent=EDGE)
    s.add("    slot[e] = found", "    found += 1", indent=EDGE)
    s.add("count[n] = found")
    if repulsion:
        s.add("repulsion[n] = total")
    return s.result()


def tokens_source(d: int, n_radial: int, n_species: int, dtype: str) -> KernelSource:
    """x (M, d), weight and back: W φ(r_ij) + b[Z_i, Z_j] for edges, a[Z_i] for atoms.

    embedding (4 + n_radial, d) is W; of_atoms (S, d) and of_pairs (S², d) are a and b; frequencies (n_radial,) those of
    the radial functions, Å⁻¹. ``scales`` is (cutoff, width of the step down to it, √(2/cutoff)).
    """
    s = Source(dtype)
    s.array("ptr", dtype="int64"), s.array("order", dtype="int64"), s.array("other", dtype="int64")
    s.array("first", dtype="int64"), s.array("slot", dtype="int64"), s.array("kind", dtype="int64")
    s.array("reverse", dtype="int64"), s.array("vectors", 3, "float64"), s.array("scales", dtype="float64")
    s.array("frequencies", dtype="float64")
    s.array("of_atoms", d), s.array("of_pairs", d), s.array("embedding", d)
    s.array("x", d), s.array("weight"), s.array("back", dtype="int64")
    s.add("t = first[n]", "own, start = x[t], of_atoms[kind[n]]", f"for c in range({d}):", "    own[c] = start[c]")
    s.add("weight[t] = ONE", "back[t] = t", "for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", "if slot[e] < 0:", "    continue", "t += 1", "j = other[e]", indent=EDGE)
    s.add(*unit_vector(), *features(n_radial), *step_down(), indent=EDGE)
    s.add("weight[t] = down", "back[t] = first[j] + 1 + slot[reverse[e]]", indent=EDGE)
    s.add(*(f"w{k} = {dtype}(f{k})" for k in range(4 + n_radial)), indent=EDGE)
    s.add(f"own, start = x[t], of_pairs[kind[n] * {n_species} + kind[j]]", f"for c in range({d}):", indent=EDGE)
    products = "".join(f" + w{k} * embedding[{k}, c]" for k in range(4 + n_radial))
    s.add(f"own[c] = start[c]{products}", indent=DEEP)
    return s.result()


def tokens_back_source(d: int, n_radial: int, dtype: str, repulsion: bool) -> KernelSource:
    """g (M, d) and g_weight (M,) → gradient (E, 3), with the slope of the nuclear repulsion."""
    s = Source(dtype)
    s.array("ptr", dtype="int64"), s.array("order", dtype="int64"), s.array("first", dtype="int64")
    s.array("slot", dtype="int64"), s.array("vectors", 3, "float64"), s.array("scales", dtype="float64")
    s.array("frequencies", dtype="float64")
    s.array("embedding", d), s.array("g", d), s.array("g_weight"), s.array("gradient", 3, "float64")
    if repulsion:
        s.array("slope", dtype="float64")
    s.add("t = first[n]", "for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", *unit_vector(), indent=EDGE)
    s.add(f"along = {'slope[e]' if repulsion else '0.0'}", "d0 = d1 = d2 = 0.0", "if slot[e] >= 0:", indent=EDGE)
    s.add("t += 1", "own = g[t]", *(f"w{k} = ZERO" for k in range(4 + n_radial)), indent=DEEP)
    s.add(f"for c in range({d}):", indent=DEEP)
    s.add(*(f"w{k} += own[c] * embedding[{k}, c]" for k in range(4 + n_radial)), indent=DEEPER)
    s.add(*step_down(slope=True), *features(n_radial, slope=True), indent=DEEP)
    s.add("along += float(g_weight[t]) * d_down + float(w3)", indent=DEEP)
    s.add(*(f"along += float(w{4 + k}) * d_f{4 + k}" for k in range(n_radial)), indent=DEEP)
    s.add(*(f"d{k} = float(w{k})" for k in range(3)), indent=DEEP)
    s.add(*(f"gradient[e, {k}] = along * u{k} + d{k}" for k in range(3)), indent=EDGE)
    return s.result()


def features(n_radial: int, slope: bool = False) -> list[str]:
    """f0, f1, …: the vector, the distance, √(2/cutoff) sin(ω_k r)/r; or d_f4, …, slopes of the latter."""
    lines = [*(f"f{k} = vectors[e, {k}]" for k in range(3)), "f3 = r", "norm = scales[2] / r"]
    for k in range(n_radial):
        lines += [f"angle = frequencies[{k}] * r", f"f{4 + k} = norm * math.sin(angle)"]
        if slope:
            lines += [f"d_f{4 + k} = norm * frequencies[{k}] * math.cos(angle) - f{4 + k} / r"]
    return lines


def step_down(slope: bool = False) -> list[str]:
    """down = 1 − 10t³ + 15t⁴ − 6t⁵, or its derivative d_down, with t = (r − cutoff + width)/width in 0…1."""
    lines = ["v = min(max((r - scales[0] + scales[1]) / scales[1], 0.0), 1.0)"]
    if slope:
        return [*lines, "d_down = -30.0 * v * v * (1.0 - v) * (1.0 - v) / scales[1]"]
    return [*lines, "down = 1.0 - v * v * v * (10.0 - 15.0 * v + 6.0 * v * v)"]


def norm_source(d: int, dtype: str) -> KernelSource:
    """y = x / √(mean(x²) + 10⁻⁶) (M, d)."""
    s = Source(dtype)
    s.array("x", d), s.array("y", d)
    s.add("own, to = x[n], y[n]", *scale(s, d), f"for c in range({d}):", "    to[c] = own[c] * scale")
    return s.result()


def norm_back_source(d: int, dtype: str) -> KernelSource:
    """g_to = g + scale (g_y − y mean(g_y y)), by the gradient of ``norm``; ``x`` is what was normalised.

    g_to may be g: by vectors, because the compiler takes a slow way then.
    """
    s, whole = Source(dtype), d - d % LANES
    s.array("x", d), s.array("g_y", d), s.array("g", d), s.array("g_to", d)
    s.add("own, grad, before, to = x[n], g_y[n], g[n], g_to[n]", *scale(s, d), *_share(s, d))
    s.add("scales, shares = splat(scale), splat(-scale * along)", f"for c in range(0, {whole}, {LANES}):")
    s.add("part = fma(scales, load(grad, c), load(before, c))", indent=EDGE)
    s.add("store(to, c, fma(shares, load(own, c), part))", indent=EDGE)
    s.add(f"for c in range({whole}, {d}):", "    to[c] = before[c] + scale * (grad[c] - along * own[c])")
    return s.result()


def scale(s: Source, d: int) -> list[str]:
    """``scale`` = 1 / √(mean(x²) + 10⁻⁶) of the row ``own``."""
    lines = ["total = ZERO", f"for c in range({d}):", "    total += own[c] * own[c]"]
    return [*lines, f"scale = ONE / math.sqrt(total * {s.number(1 / d)} + {s.number(1e-6)})"]


def _share(s: Source, d: int) -> list[str]:
    """``along`` = scale² mean(own grad), how much of ``own`` is taken from ``grad`` in the gradient."""
    lines = ["along = ZERO", f"for c in range({d}):", "    along += own[c] * grad[c]"]
    return [*lines, f"along *= scale * scale * {s.number(1 / d)}"]


def swiglu_source(width: int, dtype: str) -> KernelSource:
    """h = silu(a) ⊙ b (M, width) of up = [a, b] (M, 2 width); the width is a multiple of 16."""
    s = Source(dtype)
    s.array("up"), s.array("h")
    s.add("one, nothing = splat(ONE), splat(ZERO)", f"for c in range(0, {width}, {LANES}):")
    s.add(
        f"at = n * {2 * width} + c",
        "a = load(up, at)",
        "below = fma(exp(sub(nothing, a)), one, one)",
        indent=EDGE,
    )
    s.add(f"store(h, n * {width} + c, mul(div(a, below), load(up, at + {width})))", indent=EDGE)
    return s.result()


def swiglu_back_source(width: int, dtype: str) -> KernelSource:
    """g_up = [g_h b silu'(a), g_h silu(a)] with up = [a, b], which may be the same array; a width as before."""
    s = Source(dtype)
    s.array("up"), s.array("g_h"), s.array("g_up")
    s.add("one, nothing = splat(ONE), splat(ZERO)", f"for c in range(0, {width}, {LANES}):")
    s.add(
        f"at = n * {2 * width} + c",
        f"a, b, grad = load(up, at), load(up, at + {width}), load(g_h, n * {width} + c)",
        indent=EDGE,
    )
    s.add("gate = div(one, fma(exp(sub(nothing, a)), one, one))", "u = mul(a, gate)", indent=EDGE)
    s.add("store(g_up, at, mul(mul(grad, b), fma(u, sub(one, gate), gate)))", indent=EDGE)
    s.add(f"store(g_up, at + {width}, mul(grad, u))", indent=EDGE)
    return s.result()


def readout_source(d: int, dtype: str) -> KernelSource:
    """output += constant + h_a · y_0 + Σ_j w_j h_e · y_j, and y (M, d): x normalised. heads (2, d) are h_a and h_e."""
    s = Source(dtype)
    s.array("first", dtype="int64"), s.array("x", d), s.array("y", d), s.array("weight")
    s.array("heads", d), s.array("constant"), s.array("output", dtype="float64")
    s.add("result = float(constant[0])", "for t in range(first[n], first[n + 1]):")
    s.add("own, to = x[t], y[t]", *scale(s, d), "head = heads[0 if t == first[n] else 1]", indent=EDGE)
    s.add("value = ZERO", f"for c in range({d}):", "    to[c] = own[c] * scale", indent=EDGE)
    s.add("    value += head[c] * to[c]", "result += float(weight[t] * value)", indent=EDGE)
    s.add("output[n] += result")
    return s.result()


def readout_back_source(d: int, dtype: str, is_last: bool) -> KernelSource:
    """The gradient of seed · output, and of the message if one was sent, added to g (M, d) and to g_weight (M,).

    g_y (M, d) is that of the message. After the last readout nothing was sent, and g and g_weight begin here.
    """
    s = Source(dtype)
    s.array("first", dtype="int64"), s.array("x", d), s.array("weight"), s.array("heads", d), s.array("seed")
    s.array("g", d), s.array("g_weight")
    s.buffer("grad", d)
    s.add("for t in range(first[n], first[n + 1]):")
    s.add("own, to = x[t], g[t]", *scale(s, d), "head = heads[0 if t == first[n] else 1]", indent=EDGE)
    s.add("factor, value = seed[n] * weight[t], ZERO", f"for c in range({d}):", indent=EDGE)
    s.add("    value += head[c] * own[c]", "    grad[c] = factor * head[c]", indent=EDGE)
    if is_last:
        s.add("    to[c] = ZERO", "g_weight[t] = seed[n] * value * scale", indent=EDGE)
    else:
        s.array("g_y", d)
        s.add("g_weight[t] += seed[n] * value * scale", "message = g_y[t]", f"for c in range({d}):", indent=EDGE)
        s.add("    grad[c] += message[c]", indent=EDGE)
    s.add(*_share(s, d), f"for c in range({d}):", indent=EDGE)
    s.add("to[c] += scale * (grad[c] - along * own[c])", indent=DEEP)
    return s.result()


def receive_source(d: int, dtype: str) -> KernelSource:
    """x_next = x + what the edge back sent; atoms receive nothing."""
    s = Source(dtype)
    s.array("first", dtype="int64"), s.array("back", dtype="int64")
    s.array("x", d), s.array("sent", d), s.array("x_next", d)
    s.add("for t in range(first[n], first[n + 1]):")
    s.add("own, to, message = x[t], x_next[t], sent[back[t]]", f"for c in range({d}):", indent=EDGE)
    s.add("to[c] = own[c] + message[c] if t > first[n] else own[c]", indent=DEEP)
    return s.result()


def receive_back_source(d: int, dtype: str) -> KernelSource:
    """g_sent (M, d): the gradient g of the edge back; zero for atoms."""
    s = Source(dtype)
    s.array("first", dtype="int64"), s.array("back", dtype="int64"), s.array("g", d), s.array("g_sent", d)
    s.add("for t in range(first[n], first[n + 1]):")
    s.add("own, to = g[back[t]], g_sent[t]", f"for c in range({d}):", indent=EDGE)
    s.add("to[c] = own[c] if t > first[n] else ZERO", indent=DEEP)
    return s.result()
