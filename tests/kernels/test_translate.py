"""The language of kernels: each of its operations, what it refuses, its exponential, wide vectors and own memory."""

import llvmlite.binding
import numpy as np
import pytest

from equimd.kernels.compiled import assembly, compile_kernel
from equimd.kernels.ir import LANES
from equimd.kernels.translate import KernelSyntaxError, translate


def run(body, out, x=None, constants="", low=0, high=0):
    """A kernel of ``x`` and ``out``, 1-dimensional float or int arrays, applied to them; ``out`` for convenience."""
    x = out if x is None else x
    head = f"def kernel(x: {x.dtype}[:], out: {out.dtype}[:], low: int64, high: int64):\n"
    kernel = compile_kernel(constants + head + "".join(f"    {line}\n" for line in body.splitlines()), 2)
    kernel(x.ctypes.data, out.ctypes.data, low, high)
    return out


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("7 - 2 * 3", 1.0),
        ("7 / 2", 3.5),
        ("7 // 2 + 7 % 4", 6.0),
        ("6 & 3", 2.0),
        ("-x[0] + 0.5", -0.75),
        ("(x[1] - x[0]) ** 3", 1.953125),
        ("min(3, 2) + max(1.5, 1)", 3.5),
        ("2.0 if x[0] < x[1] else 3.0", 2.0),
        ("2.0 if x[0] == x[1] else 3.0", 3.0),
        ("int(x[1]) + low", 2.0),
        ("float32(0.1) - 0.1", float(np.float32(0.1)) - 0.1),
        ("math.sqrt(x[1] + 1.5) + math.sin(0.0) + math.cos(0.0) + math.log(1.0) + math.exp(0.0)", 4.0),
        ("TWO * x[0]", 2.5),
        ("3 * x[0] + high", 3.75),
    ],
)
def test_arithmetic(expression, expected):
    x = np.array([1.25, 2.5])
    assert run(f"out[0] = {expression}", np.zeros(1), x, constants="TWO = float32(2.0)\n")[0] == expected


def test_types_mix_as_in_numpy():
    third = np.float32(1) / np.float32(3)
    x = np.array([third], np.float32)
    assert run("out[0] = x[0] * x[0]", np.zeros(1), x)[0] == float(third * third)  # in float32
    assert run("out[0] = x[0] * float(x[0])", np.zeros(1), x)[0] == float(third) ** 2
    assert run("out[0] = x[0] * 3", np.zeros(1), x)[0] == 3 * float(third)  # an integer makes it float64


def test_loops_conditions_and_rows():
    body = """
total, odd = 0, 0
for n in range(low, high):
    if n % 2 == 0:
        continue
    odd += 1
    if n > 6:
        total += n
    else:
        total -= n
for k in range(10, 20, 3):
    total += k
row = zeros(4, int64)
row[:] = 1
tail = row[2:]
tail[1] += 5
a, row[0] = row[3], total
out[0], out[1] = odd, total + a
out[2] = row[0] + row[1] + row[2] + row[3]
"""
    out = run(body, np.zeros(3, np.int64), low=1, high=10)
    odd = [1, 3, 5, 7, 9]
    total = sum(n if n > 6 else -n for n in odd) + sum(range(10, 20, 3))
    assert out.tolist() == [len(odd), total + 6, total + 1 + 1 + 6]


def test_rows_of_tables_and_functions():
    source = """
def add(to: float64[:], at: int64, source: float64[:], factor: float64):
    for c in range(3):
        to[at + c] += factor * source[c]
def kernel(x: float64[:, 2, 3], order: int64[:], out: float64[:], low: int64, high: int64):
    for n in range(low, high):
        own = x[order[n]]
        add(out, 0, own[1], 10)
        out[3] += own[0, 2] + x[n, 1, 0]
"""
    x, order, out = np.arange(24.0).reshape(4, 2, 3), np.array([3, 0]), np.zeros(4)
    compile_kernel(source, 3)(x.ctypes.data, order.ctypes.data, out.ctypes.data, 0, 2)
    assert out.tolist() == [*(10 * (x[3, 1] + x[0, 1])), x[3, 0, 2] + x[0, 1, 0] + x[0, 0, 2] + x[1, 1, 0]]


@pytest.mark.parametrize("size", [100, 100_000])
def test_memory_of_its_own(size):
    """On the stack and on the heap."""
    body = f"""
row = empty({size}, float64)
for k in range({size}):
    row[k] = k
for k in range({size}):
    out[0] += row[k]
"""
    assert run(body, np.zeros(1))[0] == size * (size - 1) / 2


def test_vectors_of_sixteen():
    rng = np.random.default_rng(0)
    x, out = rng.normal(size=3 * LANES), np.zeros(2 * LANES + 1)
    body = f"""
a, b, c = load(x, 0), load(x, {LANES}), load(x, {2 * LANES})
store(out, 0, maximum(div(sub(mul(a, b), c), splat_at(x, 1)), splat(0.0)))
store(out, {LANES}, exp(fma(a, b, c)))
out[{2 * LANES}] = total(a)
"""
    run(body, out, x)
    a, b, c = x.reshape(3, LANES)
    np.testing.assert_allclose(out[:LANES], np.maximum((a * b - c) / x[1], 0), rtol=1e-13)
    np.testing.assert_allclose(out[LANES:-1], np.exp(a * b + c), rtol=1e-13)
    assert out[-1] == pytest.approx(a.sum(), rel=1e-13)


def test_transpose():
    x, out = np.arange(512.0), np.zeros(512)
    run("transpose(x, out, 1)", out, x)
    assert np.array_equal(out[256:].reshape(16, 16), x[256:].reshape(16, 16).T)
    assert not out[:256].any()


# Some roundings, of the argument and of the polynomial; processors differ in which of them the compiler joins.
@pytest.mark.parametrize(("dtype", "ulp"), [(np.float32, 1.2e-7), (np.float64, 2e-15)])
def test_exponential_is_exact_to_rounding(dtype, ulp):
    limit = 87.0 if dtype == np.float32 else 700.0
    special = [0.0, 1e-30, -1e-30, np.log(2), 0.5 * np.log(2)]
    x = np.concatenate([np.linspace(-limit, limit, 40_001), special]).astype(dtype)
    out = run("for k in range(low, high):\n    out[k] = exp(x[k])", np.empty_like(x), x, high=len(x))
    exact = np.exp(x.astype(np.longdouble))
    assert float(np.abs(out / exact - 1).max()) < ulp
    assert float(np.abs(np.nextafter(out, dtype(np.inf)) / exact - 1).max()) > 0.4 * ulp  # a bit more would be seen


def test_what_is_not_a_number_stays_so():
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30], np.float32)
    out = run("for k in range(5):\n    out[k] = exp(x[k])", np.empty_like(x), x)
    assert np.isnan(out[0])
    assert out[1] == out[3] > 1e37
    assert 0 < out[2] == out[4] < 1e-37


@pytest.mark.skipif(not llvmlite.binding.get_host_cpu_features().get("avx512f"), reason="no vectors of 512 bits here")
def test_widest_vectors_are_used():
    loop = "for k in range(high):\n        x[k] = x[k] * float32(2)"
    assert "zmm" in assembly(f"def kernel(x: float32[:], low: int64, high: int64):\n    {loop}\n")


def test_prefetch_changes_nothing_wherever_it_points():
    x = np.arange(3.0)
    assert run("prefetch(x, low)\nprefetch(out, high)", x, low=1, high=1 << 40).tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("x[0] = unknown", "'unknown' is no expression"),
        ("while True: pass", "is no statement"),
        ("x[0] = [1, 2]", "is no expression"),
        ("x[0, 1] = 2.0", "2 indices for an array of 1"),
        ("a = 1\n    a = 2.5", "was a i64 before and is a double now"),
        ("x[0] = pow(2, 3)", "calls what kernels do not have"),
        ("x[:] = 0.0", "has no size to fill"),
        ("x[0] = x[:2]", "has an end"),
        ("a, b = 1, 2, 3", "takes as many values as names"),
        ("for k in range(3):\n        y = empty(3, float64)", "is within a loop"),
        ("x[0] = True", "is no number"),
        ("import os", "is no statement"),
    ],
)
def test_what_kernels_do_not_have_is_refused(line, message):
    with pytest.raises(TypeError, match=message):
        translate(f"def kernel(x: float64[:], low: int64, high: int64):\n    {line}\n", "kernel")


def test_modules_hold_constants_and_functions_only():
    with pytest.raises(KernelSyntaxError, match="is no constant and no function"):
        translate("import os\ndef kernel(low: int64):\n    a = 1\n", "kernel")
