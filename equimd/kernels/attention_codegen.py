"""Python source of the attention kernels of a neighbour-token transformer, and of those of its rates of change.

Arrays are those of ``token_codegen`` and ``token_rates_codegen``; D, the channels of a head, is a multiple of 16. All
kernels walk atoms. A vector holds 16 queries of one head, so that nothing is summed across its lanes.
"""

from collections.abc import Sequence

from equimd.kernels.ir import LANES
from equimd.kernels.source import DEEP, DEEPER, EDGE, KernelSource, Source


def attention_source(n_heads: int, d_head: int, dtype: str) -> KernelSource:
    """out_a = Σ_b α_ab v_b (M, H·D) with α_ab = w_b exp(q_a·k_b) / Σ_c w_c exp(q_a·k_c), head by head.

    qkv (M, 3·H·D) holds queries, already divided by √D, keys and values; level (M, H) gets log Σ_c w_c exp(q_a·k_c).
    """
    s, d = Source(dtype), n_heads * d_head
    s.array("out"), s.array("level", n_heads)
    _start_heads(s, n_heads, d_head, scratch=("p",), blocks=("q",))
    s.add(*_take_block("q", "qkv", 3 * d, d_head), *_products("p", "q", ("qkv", d), 3 * d, d_head), indent=DEEP)
    s.add("top = load(p, 0)", "for b in range(1, tokens):", indent=DEEP)
    s.add(f"top = maximum(top, load(p, b * {LANES}))", indent=DEEPER)
    s.add("sums = splat(ZERO)", "for b in range(tokens):", indent=DEEP)
    s.add(f"part = mul(exp(sub(load(p, b * {LANES}), top)), splat_at(weight, base + b))", indent=DEEPER)
    s.add(f"store(p, b * {LANES}, part)", "sums = fma(part, splat(ONE), sums)", indent=DEEPER)
    s.add("store(line, 0, div(splat(ONE), sums))", indent=DEEP)
    s.add(*_combine("p", ("qkv", 2 * d), 3 * d, d_head, factor="load(line, 0)"), indent=DEEP)
    s.add(*_put_block("out", d, d_head), "store(line, 0, top)", f"store(line, {LANES}, sums)", indent=DEEP)
    s.add("for l in range(present):", indent=DEEP)
    s.add(f"level[base + start + l, head] = line[l] + math.log(line[{LANES} + l])", indent=DEEPER)
    return s.result()


def attention_back_source(n_heads: int, d_head: int, dtype: str) -> KernelSource:
    """g (M, H·D), the gradient of ``attention``'s output → g_qkv (M, 3·H·D), and added to g_weight (M,).

    With A = g vᵀ, P = α, R = P/w and Z = P (A − rowsum(P A)): [Z k, Zᵀ q, Pᵀ g], and Σ_rows,heads R (A − rowsum(P A)).
    """
    s, d = Source(dtype), n_heads * d_head
    s.array("level", n_heads), s.array("g"), s.array("g_qkv"), s.array("g_weight")
    _start_heads(s, n_heads, d_head, scratch=("p", "z"), blocks=("q", "o"), at_atom=_clear("g_qkv", 3 * d))
    s.add(*_take_block("q", "qkv", 3 * d, d_head), *_take_block("o", "g", d, d_head, zeros=True), indent=DEEP)
    s.add(*_take_line("level", 0), *_products("p", "q", ("qkv", d), 3 * d, d_head), indent=DEEP)
    s.add(*_products("z", "o", ("qkv", 2 * d), 3 * d, d_head), indent=DEEP)
    s.add("high, along = load(line, 0), splat(ZERO)", "for b in range(tokens):", indent=DEEP)
    s.add(f"part, heavy = exp(sub(load(p, b * {LANES}), high)), splat_at(weight, base + b)", indent=DEEPER)
    s.add(f"store(p, b * {LANES}, part)", f"along = fma(mul(part, heavy), load(z, b * {LANES}), along)", indent=DEEPER)
    s.add("for b in range(tokens):", indent=DEEP)
    s.add(f"part, heavy = load(p, b * {LANES}), splat_at(weight, base + b)", indent=DEEPER)
    s.add(f"apart = mul(sub(load(z, b * {LANES}), along), part)", indent=DEEPER)
    s.add(f"store(z, b * {LANES}, mul(apart, heavy))", f"store(p, b * {LANES}, mul(part, heavy))", indent=DEEPER)
    s.add("g_weight[base + b] += total(apart)", indent=DEEPER)
    s.add(*_combine("z", ("qkv", d), 3 * d, d_head), *_put_block("g_qkv", 3 * d, d_head), indent=DEEP)
    s.add(*_spread("z", "q", ("g_qkv", d), 3 * d, d_head), indent=DEEP)
    s.add(*_spread("p", "o", ("g_qkv", 2 * d), 3 * d, d_head), indent=DEEP)
    return s.result()


def attention_rates_source(n_heads: int, d_head: int, dtype: str) -> KernelSource:
    """d_out (M, H·D) and d_level (M, H), the rates of what ``attention`` gives, from d_qkv and d_weight.

    With R = exp(S − level) and S' = q' kᵀ + q k'ᵀ: level' = Σ_b R (w' + w S'), P' = R (w' + w S') − P level', and
    out' = P' v + P v'.
    """
    s, d = Source(dtype), n_heads * d_head
    s.array("level", n_heads), s.array("d_level", n_heads), s.array("d_qkv"), s.array("d_out"), s.array("d_weight")
    _start_heads(s, n_heads, d_head, scratch=("p", "d_p"), blocks=("q", "d_q"))
    s.add(*_take_block("q", "qkv", 3 * d, d_head), *_take_block("d_q", "d_qkv", 3 * d, d_head), indent=DEEP)
    s.add(*_take_line("level", 0), *_products("p", "q", ("qkv", d), 3 * d, d_head), indent=DEEP)
    s.add(*_rates_of_products("d_p", "q", d, 3 * d, d_head), indent=DEEP)
    s.add("high, rate = load(line, 0), splat(ZERO)", "for b in range(tokens):", indent=DEEP)
    s.add(f"share, heavy = exp(sub(load(p, b * {LANES}), high)), splat_at(weight, base + b)", indent=DEEPER)
    s.add(f"part = mul(share, fma(heavy, load(d_p, b * {LANES}), splat_at(d_weight, base + b)))", indent=DEEPER)
    s.add(f"store(d_p, b * {LANES}, part)", f"store(p, b * {LANES}, mul(share, heavy))", indent=DEEPER)
    s.add("rate = fma(part, splat(ONE), rate)", indent=DEEPER)
    s.add("for b in range(tokens):", indent=DEEP)
    s.add(f"part = sub(load(d_p, b * {LANES}), mul(load(p, b * {LANES}), rate))", indent=DEEPER)
    s.add(f"store(d_p, b * {LANES}, part)", indent=DEEPER)
    s.add(*_combine("d_p", ("qkv", 2 * d), 3 * d, d_head), indent=DEEP)
    s.add(*_combine("p", ("d_qkv", 2 * d), 3 * d, d_head, adds=True), indent=DEEP)
    s.add(*_put_block("d_out", d, d_head), "store(line, 0, rate)", "for l in range(present):", indent=DEEP)
    s.add("d_level[base + start + l, head] = line[l]", indent=DEEPER)
    return s.result()


def attention_rates_back_source(n_heads: int, d_head: int, dtype: str) -> KernelSource:
    """e_qkv (M, 3·H·D), the rate of ``attention_back``'s g_qkv, from that of g, e (M, H·D).

    With B = A − rowsum(P A), Z = P B and their rates A' = e vᵀ + g v'ᵀ, B' = A' − rowsum(P' A + P A') and
    Z' = P' B + P B': [Z' k + Z k', Z'ᵀ q + Zᵀ q', P'ᵀ g + Pᵀ e].
    """
    s, d = Source(dtype), n_heads * d_head
    s.array("level", n_heads), s.array("d_level", n_heads), s.array("d_qkv"), s.array("d_weight")
    s.array("g"), s.array("e"), s.array("e_qkv")
    scratch, blocks = ("p", "d_p", "z", "d_z"), ("q", "d_q", "o", "d_o")
    _start_heads(s, n_heads, d_head, scratch, blocks, at_atom=_clear("e_qkv", 3 * d))
    s.add(*_take_block("q", "qkv", 3 * d, d_head), *_take_block("d_q", "d_qkv", 3 * d, d_head), indent=DEEP)
    s.add(*_take_block("o", "g", d, d_head, zeros=True), *_take_block("d_o", "e", d, d_head, zeros=True), indent=DEEP)
    s.add(*_take_line("level", 0), *_take_line("d_level", LANES), indent=DEEP)
    s.add(
        *_products("p", "q", ("qkv", d), 3 * d, d_head),
        *_products("z", "o", ("qkv", 2 * d), 3 * d, d_head),
        indent=DEEP,
    )
    s.add(*_rates_of_products("d_p", "q", d, 3 * d, d_head), indent=DEEP)
    s.add(*_rates_of_products("d_z", "o", 2 * d, 3 * d, d_head), indent=DEEP)
    s.add(f"high, rate, along, change = load(line, 0), load(line, {LANES}), splat(ZERO), splat(ZERO)", indent=DEEP)
    s.add("for b in range(tokens):", indent=DEEP)
    s.add(f"share, heavy = exp(sub(load(p, b * {LANES}), high)), splat_at(weight, base + b)", indent=DEEPER)
    s.add("part = mul(share, heavy)", indent=DEEPER)
    s.add(f"faster = mul(share, fma(heavy, load(d_p, b * {LANES}), splat_at(d_weight, base + b)))", indent=DEEPER)
    s.add("faster = sub(faster, mul(part, rate))", indent=DEEPER)
    s.add(f"store(p, b * {LANES}, part)", f"store(d_p, b * {LANES}, faster)", indent=DEEPER)
    s.add(f"along = fma(part, load(z, b * {LANES}), along)", indent=DEEPER)
    s.add(f"change = fma(faster, load(z, b * {LANES}), fma(part, load(d_z, b * {LANES}), change))", indent=DEEPER)
    s.add("for b in range(tokens):", indent=DEEP)
    s.add(f"part, apart = load(p, b * {LANES}), sub(load(z, b * {LANES}), along)", indent=DEEPER)
    s.add(f"store(z, b * {LANES}, mul(part, apart))", indent=DEEPER)
    s.add(f"faster = fma(load(d_p, b * {LANES}), apart, mul(part, sub(load(d_z, b * {LANES}), change)))", indent=DEEPER)
    s.add(f"store(d_z, b * {LANES}, faster)", indent=DEEPER)
    s.add(*_combine("d_z", ("qkv", d), 3 * d, d_head), indent=DEEP)
    s.add(*_combine("z", ("d_qkv", d), 3 * d, d_head, adds=True), *_put_block("e_qkv", 3 * d, d_head), indent=DEEP)
    for shares, block, column in (("d_z", "q", d), ("z", "d_q", d), ("d_p", "o", 2 * d), ("p", "d_o", 2 * d)):
        s.add(*_spread(shares, block, ("e_qkv", column), 3 * d, d_head), indent=DEEP)
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
    s.array("first", dtype="int64"), s.array("longest", dtype="int64"), s.array("qkv"), s.array("weight")
    s.prologue += [f"    {name} = empty(longest[0] * {LANES}, {s.dtype})" for name in scratch]
    for name in (*blocks, "result"):
        s.buffer(f"{name}_t", d_head * LANES), s.buffer(f"{name}_r", d_head * LANES)
    s.buffer("line", 2 * LANES)
    s.add("base = first[n]", "tokens = first[n + 1] - base", *at_atom, f"for head in range({n_heads}):")
    s.add(f"offset = head * {d_head}", f"for start in range(0, tokens, {LANES}):", indent=EDGE)
    s.add(f"present = min({LANES}, tokens - start)", indent=DEEP)


def _clear(array: str, width: int) -> list[str]:
    """Zeros in the rows of an atom."""
    loop = f"for c in range(base * {width}, (base + tokens) * {width}, {LANES}):"
    return [loop, f"    store({array}, c, splat(ZERO))"]


def _take_line(array: str, place: int) -> list[str]:
    """line[place…]: an array (M, H) for 16 queries."""
    return [f"for l in range({LANES}):", f"    line[{place} + l] = {array}[base + min(start + l, tokens - 1), head]"]


def _by_parts(d_head: int, *lines: str) -> list[str]:
    """A loop over the head's channels, 16 at a time from ``c`` on: written out once, for the compiler's sake."""
    return [f"for c in range(0, {d_head}, {LANES}):", *("    " + line for line in lines)]


def _take_block(name: str, array: str, width: int, d_head: int, zeros: bool = False) -> list[str]:
    """NAME_r and NAME_t: the head's first channels of 16 rows.

    Where there are fewer, the last token's over again, or ``zeros``, for what is summed over queries.
    """
    lines = [f"for l in range({LANES}):", f"    at = (base + min(start + l, tokens - 1)) * {width} + offset + c"]
    lines.append(f"    store({name}_r, (c + l) * {LANES}, load({array}, at))")
    if zeros:
        lines += [f"for l in range(present, {LANES}):", f"    store({name}_r, (c + l) * {LANES}, splat(ZERO))"]
    return _by_parts(d_head, *lines, f"transpose({name}_r, {name}_t, c // {LANES})")


def _put_block(array: str, width: int, d_head: int) -> list[str]:
    """The head's first channels of the rows that there are, from ``result_t``."""
    lines = [f"transpose(result_t, result_r, c // {LANES})", "for l in range(present):"]
    lines.append(f"    store({array}, (base + start + l) * {width} + offset + c, load(result_r, (c + l) * {LANES}))")
    return _by_parts(d_head, *lines)


def _rates_of_products(target: str, block: str, column: int, width: int, d_head: int) -> list[str]:
    """Of ``_products`` with qkv, from rates of the block and of qkv."""
    lines = _products(target, f"d_{block}", ("qkv", column), width, d_head)
    return lines + _products(target, block, ("d_qkv", column), width, d_head, adds=True)


def _products(target: str, block: str, rows: tuple[str, int], width: int, d_head: int, adds: bool = False) -> list[str]:
    """target[b] = Σ_d block_d·row_bd, a vector over 16 queries for every token b; rows: an array, from a column on.

    Added to what is there with ``adds``.
    """
    array, column = rows
    start: list[str] = []
    if d_head > LANES and not adds:
        start, adds = ["for b in range(tokens):", f"    store({target}, b * {LANES}, splat(ZERO))"], True
    lines = [f"v{k} = load({block}_t, (c + {k}) * {LANES})" for k in range(LANES)]
    lines += [f"at = base * {width} + {column} + offset + c", "for b in range(tokens):"]
    lines.append(f"    part = {f'load({target}, b * {LANES})' if adds else 'splat(ZERO)'}")
    lines += [f"    part = fma(v{k}, splat_at({array}, at + {k}), part)" for k in range(LANES)]
    return start + _by_parts(d_head, *lines, f"    store({target}, b * {LANES}, part)", f"    at += {width}")


def _combine(
    shares: str, rows: tuple[str, int], width: int, d_head: int, factor: str = "", adds: bool = False
) -> list[str]:
    """result_t: Σ_b shares[b]·row_bd, a vector over 16 queries for every channel d; rows: an array, from a column on.

    Times a ``factor``, or added to what is there with ``adds``.
    """
    array, column = rows
    lines = [f"v{k} = {f'load(result_t, (c + {k}) * {LANES})' if adds else 'splat(ZERO)'}" for k in range(LANES)]
    lines += [f"at = base * {width} + {column} + offset + c", "for b in range(tokens):"]
    lines.append(f"    part = load({shares}, b * {LANES})")
    lines += [f"    v{k} = fma(part, splat_at({array}, at + {k}), v{k})" for k in range(LANES)]
    lines.append(f"    at += {width}")
    value = f"mul(v{{k}}, {factor})" if factor else "v{k}"
    lines += [f"store(result_t, (c + {k}) * {LANES}, {value.format(k=k)})" for k in range(LANES)]
    return _by_parts(d_head, *lines)


def _spread(shares: str, block: str, to: tuple[str, int], width: int, d_head: int) -> list[str]:
    """Columns of ``to`` += Σ_a shares[b, a]·block_a over 16 queries a, a vector over channels for every token b."""
    array, column = to
    lines = [f"v{k} = load({block}_r, (c + {k}) * {LANES})" for k in range(LANES)]
    lines += [f"to = base * {width} + {column} + offset + c", "for b in range(tokens):"]
    lines.append(f"    at, part = b * {LANES}, load({array}, to)")
    lines += [f"    part = fma(v{k}, splat_at({shares}, at + {k}), part)" for k in range(LANES)]
    return _by_parts(d_head, *lines, f"    store({array}, to, part)", f"    to += {width}")
