"""Python source of kernels for the gradient of a rate of change: what training a transformer on forces needs.

Along directions c (E, 3) of the edge vectors every array of ``token_codegen`` has a rate of change. That of x is d_x,
that of its gradient g is e. The gradient of the rate of change of the energy, with respect to a weight W in y = x Wᵀ,
is eᵀ x + gᵀ d_x, a matrix product of what these kernels leave behind.

- ``tokens_rates``: rates of the tokens;
- ``norm_rates``, ``swiglu_rates``, and ``attention_rates`` of ``attention_codegen``: of what lies between linear maps;
- ``…_back``: of the gradients; what is cheap to find again, values and rates, is written besides;
- ``readout_rates``, ``species_back``: the way back begins and ends.
"""

from equimd.kernels.geometry_codegen import unit_vector
from equimd.kernels.ir import LANES
from equimd.kernels.source import DEEP, EDGE, KernelSource, Source
from equimd.kernels.token_codegen import features, scale, step_down


def tokens_rates_source(d: int, n_radial: int, dtype: str) -> KernelSource:
    """features φ and d_features (M, 4 + n_radial), zero for atoms, d_x (M, d) and d_weight (M,).

    directions (E, 3) float64 are the rates of the edge vectors.
    """
    s, n_features = Source(dtype), 4 + n_radial
    s.array("ptr", dtype="int64"), s.array("order", dtype="int64"), s.array("first", dtype="int64")
    s.array("slot", dtype="int64"), s.array("vectors", 3, "float64"), s.array("directions", 3, "float64")
    s.array("scales", dtype="float64"), s.array("frequencies", dtype="float64"), s.array("embedding", d)
    s.array("features", n_features), s.array("d_features", n_features), s.array("d_x", d), s.array("d_weight")
    s.add("t = first[n]", "own = d_x[t]", "d_weight[t] = ZERO", f"for c in range({d}):", "    own[c] = ZERO")
    s.add(*(f"features[t, {k}] = d_features[t, {k}] = ZERO" for k in range(n_features)))
    s.add("for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", "if slot[e] < 0:", "    continue", "t += 1", *unit_vector(), indent=EDGE)
    s.add("c0, c1, c2 = directions[e, 0], directions[e, 1], directions[e, 2]", indent=EDGE)
    s.add("rate = u0 * c0 + u1 * c1 + u2 * c2", *features(n_radial, slope=True), *step_down(slope=True), indent=EDGE)
    s.add(f"d_weight[t] = {dtype}(d_down * rate)", indent=EDGE)
    rates = ["c0", "c1", "c2", "rate", *(f"d_f{4 + k} * rate" for k in range(n_radial))]
    s.add(*(f"w{k} = {dtype}({rate})" for k, rate in enumerate(rates)), indent=EDGE)
    s.add(*(f"features[t, {k}], d_features[t, {k}] = f{k}, w{k}" for k in range(n_features)), indent=EDGE)
    s.add("own = d_x[t]", f"for c in range({d}):", indent=EDGE)
    s.add(f"own[c] = {' + '.join(f'w{k} * embedding[{k}, c]' for k in range(n_features))}", indent=DEEP)
    return s.result()


def norm_rates_source(d: int, dtype: str) -> KernelSource:
    """d_y (M, d), the rate of ``norm``'s y, from x and d_x."""
    s = Source(dtype)
    s.array("x", d), s.array("d_x", d), s.array("d_y", d)
    s.add("own, rate, to = x[n], d_x[n], d_y[n]", *scale(s, d), *_rate_of_scale(s, d), f"for c in range({d}):")
    s.add("to[c] = scale * rate[c] + faster * own[c]", indent=EDGE)
    return s.result()


def norm_rates_back_source(d: int, dtype: str) -> KernelSource:
    """e (M, d) += the rate of the gradient of ``norm``, from g_y and its rate e_y; y and d_y once more.

    The gradient is s g_y − s³ a x with the scale s and a = mean(g_y x).
    """
    s = Source(dtype)
    s.array("x", d), s.array("d_x", d), s.array("g_y", d), s.array("e_y", d)
    s.array("e", d), s.array("y", d), s.array("d_y", d)
    s.add("own, rate, to = x[n], d_x[n], y[n]", *scale(s, d), *_rate_of_scale(s, d), f"for c in range({d}):")
    s.add("to[c] = scale * own[c]", indent=EDGE)
    s.add("to = d_y[n]", f"for c in range({d}):", "    to[c] = scale * rate[c] + faster * own[c]")
    s.add("grad, change, to = g_y[n], e_y[n], e[n]", "along, turn = ZERO, ZERO", f"for c in range({d}):")
    s.add("along += own[c] * grad[c]", "turn += own[c] * change[c] + rate[c] * grad[c]", indent=EDGE)
    s.add(f"cube = scale * scale * scale * {s.number(1 / d)}")
    s.add(f"turn = cube * turn + {s.number(3.0)} * scale * scale * faster * {s.number(1 / d)} * along", "along *= cube")
    s.add(f"for c in range({d}):")
    s.add("to[c] += scale * change[c] + faster * grad[c] - turn * own[c] - along * rate[c]", indent=EDGE)
    return s.result()


def _rate_of_scale(s: Source, d: int) -> list[str]:
    """``faster``: −s³ mean(x d_x), the rate of s = 1 / √(mean(x²) + 10⁻⁶)."""
    lines = ["faster = ZERO", f"for c in range({d}):", "    faster += own[c] * rate[c]"]
    return [*lines, f"faster *= -scale * scale * scale * {s.number(1 / d)}"]


def swiglu_rates_source(width: int, dtype: str) -> KernelSource:
    """d_h (M, width), the rate of ``swiglu``'s h, from up and d_up; the width is a multiple of 16."""
    s = Source(dtype)
    s.array("up"), s.array("d_up"), s.array("d_h")
    _start_swiglu(s, width)
    s.add(f"store(d_h, n * {width} + c, fma(mul(slope, b), d_a, mul(u, d_b)))", indent=EDGE)
    return s.result()


def swiglu_rates_back_source(width: int, dtype: str) -> KernelSource:
    """e_up (M, 2 width), the rate of ``swiglu_back``'s g_up, from g_h and its rate e_h; g_up, h and d_h once more.

    With u = silu(a): [u' (e_h b + g_h b') + u'' a' g_h b, u e_h + u' a' g_h], primes of a and b being rates.
    """
    s = Source(dtype)
    s.array("up"), s.array("d_up"), s.array("g_h"), s.array("e_h")
    s.array("e_up"), s.array("g_up"), s.array("h"), s.array("d_h")
    _start_swiglu(s, width)
    s.add(f"grad, change = load(g_h, n * {width} + c), load(e_h, n * {width} + c)", indent=EDGE)
    s.add(f"store(h, n * {width} + c, mul(u, b))", indent=EDGE)
    s.add(f"store(d_h, n * {width} + c, fma(mul(slope, b), d_a, mul(u, d_b)))", indent=EDGE)
    s.add("bend = mul(sub(one, gate), sub(fma(gate, one, slope), mul(u, gate)))", indent=EDGE)
    s.add("store(g_up, at, mul(mul(grad, b), slope))", f"store(g_up, at + {width}, mul(grad, u))", indent=EDGE)
    s.add("turned = mul(grad, d_a)", "straight = fma(change, b, mul(grad, d_b))", indent=EDGE)
    s.add("store(e_up, at, fma(slope, straight, mul(mul(bend, turned), b)))", indent=EDGE)
    s.add(f"store(e_up, at + {width}, fma(u, change, mul(slope, turned)))", indent=EDGE)
    return s.result()


def _start_swiglu(s: Source, width: int) -> None:
    """The loop over channels: a, b, their rates d_a and d_b, gate = sigmoid(a), u = silu(a), slope = u'."""
    s.add("one, nothing = splat(ONE), splat(ZERO)", f"for c in range(0, {width}, {LANES}):")
    s.add(f"at = n * {2 * width} + c", f"a, b = load(up, at), load(up, at + {width})", indent=EDGE)
    s.add(f"d_a, d_b = load(d_up, at), load(d_up, at + {width})", indent=EDGE)
    s.add("gate = div(one, fma(exp(sub(nothing, a)), one, one))", "u = mul(a, gate)", indent=EDGE)
    s.add("slope = fma(u, sub(one, gate), gate)", indent=EDGE)


def readout_rates_source(d: int, dtype: str, is_last: bool) -> KernelSource:
    """g_y (M, d), the gradient of seed · output with respect to the normed x, and its rate e_y.

    d_seed (N,) is the rate of the seed. Added are g_message and e_message (M, d), unless it is the last readout and no
    message was sent. factors and d_factors (M, 2) say how much y counts in either head.
    """
    s = Source(dtype)
    s.array("first", dtype="int64"), s.array("weight"), s.array("d_weight"), s.array("heads", d)
    s.array("seed"), s.array("d_seed"), s.array("g_y", d), s.array("e_y", d)
    s.array("factors", 2), s.array("d_factors", 2)
    if not is_last:
        s.array("g_message", d), s.array("e_message", d)
    s.add("for t in range(first[n], first[n + 1]):")
    s.add("k = 0 if t == first[n] else 1", "head, factor = heads[k], seed[n] * weight[t]", indent=EDGE)
    s.add("change = d_seed[n] * weight[t] + seed[n] * d_weight[t]", indent=EDGE)
    s.add("factors[t, k], factors[t, 1 - k] = factor, ZERO", indent=EDGE)
    s.add("d_factors[t, k], d_factors[t, 1 - k] = change, ZERO", indent=EDGE)
    for to, number, message in (("g_y", "factor", "g_message"), ("e_y", "change", "e_message")):
        s.add(f"to = {to}[t]", *([] if is_last else [f"more = {message}[t]"]), f"for c in range({d}):", indent=EDGE)
        s.add(f"to[c] = {number} * head[c]" + ("" if is_last else " + more[c]"), indent=DEEP)
    return s.result()


def species_back_source(d: int, n_species: int, dtype: str) -> KernelSource:
    """e (M, d) summed over tokens of the same species, to_atoms (S, d), or pair of species, to_pairs (S², d)."""
    s = Source(dtype)
    s.array("ptr", dtype="int64"), s.array("order", dtype="int64"), s.array("other", dtype="int64")
    s.array("first", dtype="int64"), s.array("slot", dtype="int64"), s.array("kind", dtype="int64")
    s.array("e", d), s.array("to_atoms", d), s.array("to_pairs", d)
    s.add("t = first[n]", "own, to = e[t], to_atoms[kind[n]]", f"for c in range({d}):", "    to[c] += own[c]")
    s.add("for m in range(ptr[n], ptr[n + 1]):")
    s.add("j = other[order[m]]", "if slot[order[m]] < 0:", "    continue", "t += 1", indent=EDGE)
    s.add(f"own, to = e[t], to_pairs[kind[n] * {n_species} + kind[j]]", indent=EDGE)
    s.add(f"for c in range({d}):", "    to[c] += own[c]", indent=EDGE)
    return s.result()
