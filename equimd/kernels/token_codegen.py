"""Python source of the kernels between the matrix products of a frozen neighbour-token transformer.

Tokens lie in one array (M, d), atom by atom, the atom's own first: no slot is empty, and edges beyond the cutoff have
none. ``first`` (N + 1,) says where the tokens of each atom begin, weight (M,) how much each counts, back (M,) which is
the token of the edge in the other direction. Each operation has a kernel that goes forward, and one (…_back) that turns
the gradient of its output into that of its input; what is cheap to find again is not kept in between.

- ``distances``, ``tokens``: from positions to tokens;
- ``norm``, ``swiglu``, ``attention``: what lies between linear maps;
- ``readout``, ``receive``: atomic outputs, and messages to the token of the edge back.

Kernels of ``norm`` and ``swiglu`` walk tokens, all others atoms.
"""

from collections.abc import Sequence

from equimd.kernels.geometry_codegen import Screening, unit_vector, walk_distances
from equimd.kernels.source import EDGE, LANES, KernelSource, Source

_DEEP, _DEEPER = EDGE + "    ", EDGE + "        "


def distances_source(n_species: int, repulsion: Screening) -> KernelSource:
    """vectors (E, 3), slot (E,): how many-th of its atom's edges within the cutoff, −1 beyond; count (N,) of these.

    ``scales`` begins with the cutoff. If there is one, also the nuclear repulsion, as in ``geometry_source``.
    """
    s = Source("float64")
    s.array("scales", kind="DOUBLE"), s.array("slot", kind="INDEX"), s.array("count", kind="INDEX")
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
    s.array("ptr", kind="INDEX"), s.array("order", kind="INDEX"), s.array("other", kind="INDEX")
    s.array("first", kind="INDEX"), s.array("slot", kind="INDEX"), s.array("kind", kind="INDEX")
    s.array("reverse", kind="INDEX"), s.array("vectors", 3, "DOUBLE"), s.array("scales", kind="DOUBLE")
    s.array("frequencies", kind="DOUBLE")
    s.array("of_atoms", d), s.array("of_pairs", d), s.array("embedding", d)
    s.array("x", d), s.array("weight"), s.array("back", kind="INDEX")
    s.add("t = first[n]", "own, start = x[t], of_atoms[kind[n]]", f"for c in range({d}):", "    own[c] = start[c]")
    s.add("weight[t] = ONE", "back[t] = t", "for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", "if slot[e] < 0:", "    continue", "t += 1", "j = other[e]", indent=EDGE)
    s.add(*unit_vector(), *_features(n_radial), *_step_down(), indent=EDGE)
    s.add("weight[t] = down", "back[t] = first[j] + 1 + slot[reverse[e]]", indent=EDGE)
    s.add(*(f"w{k} = np.{dtype}(f{k})" for k in range(4 + n_radial)), indent=EDGE)
    s.add(f"own, start = x[t], of_pairs[kind[n] * {n_species} + kind[j]]", f"for c in range({d}):", indent=EDGE)
    products = "".join(f" + w{k} * embedding[{k}, c]" for k in range(4 + n_radial))
    s.add(f"own[c] = start[c]{products}", indent=_DEEP)
    return s.result()


def tokens_back_source(d: int, n_radial: int, dtype: str, repulsion: bool) -> KernelSource:
    """g (M, d) and g_weight (M,) → gradient (E, 3), with the slope of the nuclear repulsion."""
    s = Source(dtype)
    s.array("ptr", kind="INDEX"), s.array("order", kind="INDEX"), s.array("first", kind="INDEX")
    s.array("slot", kind="INDEX"), s.array("vectors", 3, "DOUBLE"), s.array("scales", kind="DOUBLE")
    s.array("frequencies", kind="DOUBLE")
    s.array("embedding", d), s.array("g", d), s.array("g_weight"), s.array("gradient", 3, "DOUBLE")
    if repulsion:
        s.array("slope", kind="DOUBLE")
    s.add("t = first[n]", "for m in range(ptr[n], ptr[n + 1]):")
    s.add("e = order[m]", *unit_vector(), indent=EDGE)
    s.add(f"along = {'slope[e]' if repulsion else '0.0'}", "d0 = d1 = d2 = 0.0", "if slot[e] >= 0:", indent=EDGE)
    s.add("t += 1", "own = g[t]", *(f"w{k} = ZERO" for k in range(4 + n_radial)), indent=_DEEP)
    s.add(f"for c in range({d}):", indent=_DEEP)
    s.add(*(f"w{k} += own[c] * embedding[{k}, c]" for k in range(4 + n_radial)), indent=_DEEPER)
    s.add(*_step_down(slope=True), *_features(n_radial, slope=True), indent=_DEEP)
    s.add("along += float(g_weight[t]) * d_down + float(w3)", indent=_DEEP)
    s.add(*(f"along += float(w{4 + k}) * d_f{4 + k}" for k in range(n_radial)), indent=_DEEP)
    s.add(*(f"d{k} = float(w{k})" for k in range(3)), indent=_DEEP)
    s.add(*(f"gradient[e, {k}] = along * u{k} + d{k}" for k in range(3)), indent=EDGE)
    return s.result()


def _features(n_radial: int, slope: bool = False) -> list[str]:
    """f0, f1, …: the vector, the distance, √(2/cutoff) sin(ω_k r)/r; or d_f4, …, slopes of the latter."""
    lines = [*(f"f{k} = vectors[e, {k}]" for k in range(3)), "f3 = r", "norm = scales[2] / r"]
    for k in range(n_radial):
        lines += [f"angle = frequencies[{k}] * r", f"f{4 + k} = norm * math.sin(angle)"]
        if slope:
            lines += [f"d_f{4 + k} = norm * frequencies[{k}] * math.cos(angle) - f{4 + k} / r"]
    return lines


def _step_down(slope: bool = False) -> list[str]:
    """down = 1 − 10t³ + 15t⁴ − 6t⁵, or its derivative d_down, with t = (r − cutoff + width)/width in 0…1."""
    lines = ["v = min(max((r - scales[0] + scales[1]) / scales[1], 0.0), 1.0)"]
    if slope:
        return [*lines, "d_down = -30.0 * v * v * (1.0 - v) * (1.0 - v) / scales[1]"]
    return [*lines, "down = 1.0 - v * v * v * (10.0 - 15.0 * v + 6.0 * v * v)"]


def norm_source(d: int, dtype: str) -> KernelSource:
    """y = x / √(mean(x²) + 10⁻⁶) (M, d)."""
    s = Source(dtype)
    s.array("x", d), s.array("y", d)
    s.add("own, to = x[n], y[n]", *_scale(s, d), f"for c in range({d}):", "    to[c] = own[c] * scale")
    return s.result()


def norm_back_source(d: int, dtype: str) -> KernelSource:
    """g += scale (g_y − y mean(g_y y)), the gradient of ``norm``; ``x`` is what was normalised."""
    s = Source(dtype)
    s.array("x", d), s.array("g_y", d), s.array("g", d)
    s.add("own, grad, to = x[n], g_y[n], g[n]", *_scale(s, d), *_norm_back(s, d))
    return s.result()


def _scale(s: Source, d: int) -> list[str]:
    lines = ["total = ZERO", f"for c in range({d}):", "    total += own[c] * own[c]"]
    return [*lines, f"scale = ONE / math.sqrt(total * {s.number(1 / d)} + {s.number(1e-6)})"]


def _norm_back(s: Source, d: int) -> list[str]:
    lines = ["along = ZERO", f"for c in range({d}):", "    along += own[c] * grad[c]"]
    lines += [f"along *= scale * scale * {s.number(1 / d)}", f"for c in range({d}):"]
    return [*lines, "    to[c] += scale * (grad[c] - along * own[c])"]


def swiglu_source(width: int, dtype: str) -> KernelSource:
    """h = silu(a) ⊙ b (M, width) of up = [a, b] (M, 2 width); the width is a multiple of 16."""
    s = Source(dtype)
    s.array("up"), s.array("h")
    s.use_lanes()
    s.add("one, nothing = splat(ONE), splat(ZERO)", f"for c in range(0, {width}, {LANES}):")
    s.add(
        f"at = n * {2 * width} + c",
        "a = load(up, at)",
        "below = fma(exp_lanes(sub(nothing, a)), one, one)",
        indent=EDGE,
    )
    s.add(f"store(h, n * {width} + c, mul(div(a, below), load(up, at + {width})))", indent=EDGE)
    return s.result()


def swiglu_back_source(width: int, dtype: str) -> KernelSource:
    """up = [a, b] becomes [g_h b silu'(a), g_h silu(a)]; the width is a multiple of 16."""
    s = Source(dtype)
    s.array("up"), s.array("g_h")
    s.use_lanes()
    s.add("one, nothing = splat(ONE), splat(ZERO)", f"for c in range(0, {width}, {LANES}):")
    s.add(
        f"at = n * {2 * width} + c",
        f"a, b, grad = load(up, at), load(up, at + {width}), load(g_h, n * {width} + c)",
        indent=EDGE,
    )
    s.add("gate = div(one, fma(exp_lanes(sub(nothing, a)), one, one))", "u = mul(a, gate)", indent=EDGE)
    s.add("store(up, at, mul(mul(grad, b), fma(u, sub(one, gate), gate)))", indent=EDGE)
    s.add(f"store(up, at + {width}, mul(grad, u))", indent=EDGE)
    return s.result()


def attention_source(n_heads: int, d_head: int, dtype: str) -> KernelSource:
    """out_a = Σ_b α_ab v_b (M, H·D) with α_ab = w_b exp(q_a·k_b) / Σ_c w_c exp(q_a·k_c), head by head.

    qkv (M, 3·H·D) holds queries, already divided by √D, keys and values; level (M, H) gets log Σ_c w_c exp(q_a·k_c).
    D is a multiple of 16. A vector holds 16 queries, so that nothing is summed across its lanes.
    """
    s, d = Source(dtype), n_heads * d_head
    s.array("out"), s.array("level", n_heads)
    _start_heads(s, n_heads, d_head, scratch=("p",), blocks=("q",))
    s.add(*_take_block("q", "qkv", 3 * d, d_head), *_products("p", "q", d, 3 * d, d_head), indent=_DEEP)
    s.add("top = load(p, 0)", "for b in range(1, tokens):", indent=_DEEP)
    s.add(f"top = maximum(top, load(p, b * {LANES}))", indent=_DEEPER)
    s.add("sums = splat(ZERO)", "for b in range(tokens):", indent=_DEEP)
    s.add(f"part = mul(exp_lanes(sub(load(p, b * {LANES}), top)), splat_at(weight, base + b))", indent=_DEEPER)
    s.add(f"store(p, b * {LANES}, part)", "sums = fma(part, splat(ONE), sums)", indent=_DEEPER)
    s.add("store(line, 0, div(splat(ONE), sums))", *_combine("p", 2 * d, 3 * d, d_head, "load(line, 0)"), indent=_DEEP)
    s.add(*_put_block("out", d, d_head), f"store(line, 0, top), store(line, {LANES}, sums)", indent=_DEEP)
    s.add("for l in range(present):", indent=_DEEP)
    s.add(f"level[base + start + l, head] = line[l] + math.log(line[{LANES} + l])", indent=_DEEPER)
    return s.result()


def attention_back_source(n_heads: int, d_head: int, dtype: str) -> KernelSource:
    """g (M, H·D), the gradient of ``attention``'s output → g_qkv (M, 3·H·D), and added to g_weight (M,).

    With A = g vᵀ, P = α, R = P/w and Z = P (A − rowsum(P A)): [Z k, Zᵀ q, Pᵀ g], and Σ_rows,heads R (A − rowsum(P A)).
    """
    s, d = Source(dtype), n_heads * d_head
    s.array("level", n_heads), s.array("g"), s.array("g_qkv"), s.array("g_weight")
    zeros = [f"for c in range(base * {3 * d}, (base + tokens) * {3 * d}, {LANES}):", "    store(g_qkv, c, splat(ZERO))"]
    _start_heads(s, n_heads, d_head, scratch=("p", "z"), blocks=("q", "o"), at_atom=zeros)
    s.add(*_take_block("q", "qkv", 3 * d, d_head), *_take_block("o", "g", d, d_head), indent=_DEEP)
    s.add(f"for l in range(present, {LANES}):", indent=_DEEP)  # what comes in for queries that are not there
    s.add(*(f"store(o_r, {c * LANES} + l * {LANES}, splat(ZERO))" for c in range(0, d_head, LANES)), indent=_DEEPER)
    s.add(*(f"transpose(o_r, o_t, {block})" for block in range(d_head // LANES)), indent=_DEEP)
    s.add(f"for l in range({LANES}):", indent=_DEEP)
    s.add("line[l] = level[base + min(start + l, tokens - 1), head]", indent=_DEEPER)
    s.add(*_products("p", "q", d, 3 * d, d_head), *_products("z", "o", 2 * d, 3 * d, d_head), indent=_DEEP)
    s.add("high, along = load(line, 0), splat(ZERO)", "for b in range(tokens):", indent=_DEEP)
    s.add(f"part, heavy = exp_lanes(sub(load(p, b * {LANES}), high)), splat_at(weight, base + b)", indent=_DEEPER)
    s.add(f"store(p, b * {LANES}, part)", f"along = fma(mul(part, heavy), load(z, b * {LANES}), along)", indent=_DEEPER)
    s.add("for b in range(tokens):", indent=_DEEP)
    s.add(f"part, heavy = load(p, b * {LANES}), splat_at(weight, base + b)", indent=_DEEPER)
    s.add(f"apart = mul(sub(load(z, b * {LANES}), along), part)", indent=_DEEPER)
    s.add(f"store(z, b * {LANES}, mul(apart, heavy))", f"store(p, b * {LANES}, mul(part, heavy))", indent=_DEEPER)
    s.add("g_weight[base + b] += total(apart)", indent=_DEEPER)
    s.add(*_combine("z", d, 3 * d, d_head), *_put_block("g_qkv", 3 * d, d_head), indent=_DEEP)
    s.add(*_spread("z", "q", d, 3 * d, d_head), *_spread("p", "o", 2 * d, 3 * d, d_head), indent=_DEEP)
    return s.result()


def _start_heads(
    s: Source,
    n_heads: int,
    d_head: int,
    scratch: tuple[str, ...],
    blocks: tuple[str, ...],
    at_atom: Sequence[str] = (),
) -> None:
    """The loops over atoms, heads and blocks of 16 queries, ``present`` of which are there, from ``start`` on.

    scratch: arrays of a vector for every token. blocks: for each, NAME_t (D, 16) and NAME_r (16, D).
    """
    s.use_lanes()
    s.array("first", kind="INDEX"), s.array("longest", kind="INDEX"), s.array("qkv"), s.array("weight")
    s.prologue += [f"    {name} = np.empty(longest[0] * {LANES}, np.{s.dtype})" for name in scratch]
    for name in (*blocks, "result"):
        s.buffer(f"{name}_t", d_head * LANES), s.buffer(f"{name}_r", d_head * LANES)
    s.buffer("line", 2 * LANES)
    s.add("base = first[n]", "tokens = first[n + 1] - base", *at_atom, f"for head in range({n_heads}):")
    s.add(f"offset = head * {d_head}", f"for start in range(0, tokens, {LANES}):", indent=EDGE)
    s.add(f"present = min({LANES}, tokens - start)", indent=_DEEP)


def _take_block(name: str, array: str, width: int, d_head: int) -> list[str]:
    """NAME_r and NAME_t: the head's first channels of 16 rows; the last token's over again when there are fewer."""
    lines = [f"for l in range({LANES}):", f"    at = (base + min(start + l, tokens - 1)) * {width} + offset"]
    for block, c in enumerate(range(0, d_head, LANES)):
        lines.append(f"    store({name}_r, {block * LANES * LANES} + l * {LANES}, load({array}, at + {c}))")
    return [*lines, *(f"transpose({name}_r, {name}_t, {block})" for block in range(d_head // LANES))]


def _put_block(array: str, width: int, d_head: int) -> list[str]:
    """The head's first channels of the rows that there are, from ``result_t``."""
    lines = [f"transpose(result_t, result_r, {block})" for block in range(d_head // LANES)]
    lines += ["for l in range(present):", f"    at = (base + start + l) * {width} + offset"]
    for block, c in enumerate(range(0, d_head, LANES)):
        lines.append(f"    store({array}, at + {c}, load(result_r, {block * LANES * LANES} + l * {LANES}))")
    return lines


def _products(target: str, block: str, column: int, width: int, d_head: int) -> list[str]:
    """target[b] = Σ_d block_d·row_bd, a vector over 16 queries for every token b; rows are columns of qkv."""
    lines: list[str] = []
    for c in range(0, d_head, LANES):
        lines += [f"v{k} = load({block}_t, {(c + k) * LANES})" for k in range(LANES)]
        lines += [f"at = base * {width} + {column + c} + offset", "for b in range(tokens):"]
        lines += [f"    part = {f'load({target}, b * {LANES})' if c else 'splat(ZERO)'}"]
        lines += [f"    part = fma(v{k}, splat_at(qkv, at + {k}), part)" for k in range(LANES)]
        lines += [f"    store({target}, b * {LANES}, part)", f"    at += {width}"]
    return lines


def _combine(shares: str, column: int, width: int, d_head: int, factor: str = "") -> list[str]:
    """result_t: Σ_b shares[b]·row_bd, a vector over 16 queries for every channel d; rows are columns of qkv."""
    lines: list[str] = []
    for c in range(0, d_head, LANES):
        lines += [f"v{k} = splat(ZERO)" for k in range(LANES)]
        lines += [f"at = base * {width} + {column + c} + offset", "for b in range(tokens):"]
        lines += [f"    part = load({shares}, b * {LANES})"]
        lines += [f"    v{k} = fma(part, splat_at(qkv, at + {k}), v{k})" for k in range(LANES)]
        lines += [f"    at += {width}"]
        value = f"mul(v{{k}}, {factor})" if factor else "v{k}"
        lines += [f"store(result_t, {(c + k) * LANES}, {value.format(k=k)})" for k in range(LANES)]
    return lines


def _spread(shares: str, block: str, column: int, width: int, d_head: int) -> list[str]:
    """Columns of g_qkv += Σ_a shares[b, a]·block_a over 16 queries a, a vector over channels for every token b."""
    lines: list[str] = []
    for part, c in enumerate(range(0, d_head, LANES)):
        lines += [f"v{k} = load({block}_r, {(part * LANES + k) * LANES})" for k in range(LANES)]
        lines += [f"to = base * {width} + {column + c} + offset", "for b in range(tokens):"]
        lines += [f"    at, part = b * {LANES}, load(g_qkv, to)"]
        lines += [f"    part = fma(v{k}, splat_at({shares}, at + {k}), part)" for k in range(LANES)]
        lines += ["    store(g_qkv, to, part)", f"    to += {width}"]
    return lines


def readout_source(d: int, dtype: str) -> KernelSource:
    """output += constant + h_a · y_0 + Σ_j w_j h_e · y_j, and y (M, d): x normalised. heads (2, d) are h_a and h_e."""
    s = Source(dtype)
    s.array("first", kind="INDEX"), s.array("x", d), s.array("y", d), s.array("weight")
    s.array("heads", d), s.array("constant"), s.array("output", kind="DOUBLE")
    s.add("result = float(constant[0])", "for t in range(first[n], first[n + 1]):")
    s.add("own, to = x[t], y[t]", *_scale(s, d), "head = heads[0 if t == first[n] else 1]", indent=EDGE)
    s.add("value = ZERO", f"for c in range({d}):", "    to[c] = own[c] * scale", indent=EDGE)
    s.add("    value += head[c] * to[c]", "result += float(weight[t] * value)", indent=EDGE)
    s.add("output[n] += result")
    return s.result()


def readout_back_source(d: int, dtype: str, is_last: bool) -> KernelSource:
    """The gradient of seed · output, and of the message if one was sent, added to g (M, d) and to g_weight (M,).

    g_y (M, d) is that of the message. After the last readout nothing was sent, and g and g_weight begin here.
    """
    s = Source(dtype)
    s.array("first", kind="INDEX"), s.array("x", d), s.array("weight"), s.array("heads", d), s.array("seed")
    s.array("g", d), s.array("g_weight")
    s.buffer("grad", d)
    s.add("for t in range(first[n], first[n + 1]):")
    s.add("own, to = x[t], g[t]", *_scale(s, d), "head = heads[0 if t == first[n] else 1]", indent=EDGE)
    s.add("factor, value = seed[n] * weight[t], ZERO", f"for c in range({d}):", indent=EDGE)
    s.add("    value += head[c] * own[c]", "    grad[c] = factor * head[c]", indent=EDGE)
    if is_last:
        s.add("    to[c] = ZERO", "g_weight[t] = seed[n] * value * scale", indent=EDGE)
    else:
        s.array("g_y", d)
        s.add("g_weight[t] += seed[n] * value * scale", "message = g_y[t]", f"for c in range({d}):", indent=EDGE)
        s.add("    grad[c] += message[c]", indent=EDGE)
    s.add(*_norm_back(s, d), indent=EDGE)
    return s.result()


def receive_source(d: int, dtype: str) -> KernelSource:
    """x_next = x + what the edge back sent; atoms receive nothing."""
    s = Source(dtype)
    s.array("first", kind="INDEX"), s.array("back", kind="INDEX")
    s.array("x", d), s.array("sent", d), s.array("x_next", d)
    s.add("for t in range(first[n], first[n + 1]):")
    s.add("own, to, message = x[t], x_next[t], sent[back[t]]", f"for c in range({d}):", indent=EDGE)
    s.add("to[c] = own[c] + message[c] if t > first[n] else own[c]", indent=_DEEP)
    return s.result()


def receive_back_source(d: int, dtype: str) -> KernelSource:
    """g_sent (M, d): the gradient g of the edge back; zero for atoms."""
    s = Source(dtype)
    s.array("first", kind="INDEX"), s.array("back", kind="INDEX"), s.array("g", d), s.array("g_sent", d)
    s.add("for t in range(first[n], first[n + 1]):")
    s.add("own, to = g[back[t]], g_sent[t]", f"for c in range({d}):", indent=EDGE)
    s.add("to[c] = own[c] if t > first[n] else ZERO", indent=_DEEP)
    return s.result()
