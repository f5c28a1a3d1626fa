"""What compiled kernels call and numba lacks: a vectorising exponential, wide vectors, prefetching, a clock."""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def read_cycles(_context: Any) -> Any:
    """The processor's time stamp, int64; where ``has_cycles`` says that there is one to read."""

    def codegen(_target: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), [])
        return builder.call(builder.module.declare_intrinsic("llvm.readcyclecounter", (), kind), [])

    return types.int64(), codegen


@intrinsic
def exp(_context: Any, x: Any) -> Any:
    """eˣ of a float32 or float64 scalar, in plain arithmetic; NaN stays NaN, ±∞ are taken for ±87 or ±708."""
    return x(x), lambda _target, builder, _signature, args: exp_ir(builder, args[0])


def exp_ir(b: Any, x: Any) -> Any:  # b is an IRBuilder, without type hints
    """eˣ of a float, a double or a vector of these: instructions appended to the builder ``b``.

    x = (n + f)·ln 2 with an integer n and |f| ≤ ½; 2^f is a polynomial, 2ⁿ is written into the bits of the exponent.
    """
    count = x.type.count if isinstance(x.type, ir.VectorType) else 0
    is_single = (x.type.element if count else x.type) == ir.FloatType()
    mantissa, largest, degree = (23, 126, 7) if is_single else (52, 1022, 13)
    log2e = float((np.float32 if is_single else np.float64)(1 / math.log(2)))
    rest = 1 / math.log(2) - log2e if is_single else 2.0355273740931033e-17  # of 1/ln 2 after rounding

    def type_of(element: Any) -> Any:
        return ir.VectorType(element, count) if count else element

    def constant(value: float, kind: Any = x.type) -> Any:
        return ir.Constant(kind, [value] * count if count else value)

    def fma(u: Any, v: Any, w: Any) -> Any:
        return b.fadd(b.fmul(u, v, flags=["contract"]), w, flags=["contract"])

    integer, bits = type_of(ir.IntType(32)), type_of(ir.IntType(32 if is_single else 64))
    limit = largest * math.log(2)
    is_nan = b.fcmp_unordered("uno", x, x)
    value = b.select(is_nan, constant(0.0), x)  # there is no integer for it
    value = b.select(b.fcmp_ordered(">", value, constant(limit)), constant(limit), value)
    value = b.select(b.fcmp_ordered("<", value, constant(-limit)), constant(-limit), value)
    # Truncation rounds to nearest, because the number is made positive and a half is added.
    shifted = b.fptosi(fma(value, constant(log2e), constant(largest + 0.5)), integer)
    n = b.sitofp(b.sub(shifted, constant(largest, integer)), x.type)
    f = fma(value, constant(rest), _exact_fma(b, value, constant(log2e), b.fneg(n)))
    series = constant(0.0)
    for coefficient in reversed(_power_of_two(degree)):
        series = fma(series, f, constant(coefficient))
    exponent = b.add(shifted, constant(1, integer))
    exponent = exponent if is_single else b.zext(exponent, bits)
    return b.select(is_nan, x, b.fmul(series, b.bitcast(b.shl(exponent, constant(mantissa, bits)), x.type)))


def _exact_fma(b: Any, u: Any, v: Any, w: Any) -> Any:
    """u·v + w, not rounded in between."""
    if not isinstance(u.type, ir.VectorType):
        return b.fma(u, v, w)
    name = f"llvm.fma.v{u.type.count}{u.type.element.intrinsic_name}"
    return b.call(b.module.declare_intrinsic(name, (), ir.FunctionType(u.type, [u.type] * 3)), [u, v, w])


@intrinsic
def use_widest_vectors(_context: Any) -> Any:
    """Let LLVM use 512-bit vectors in the function that calls this; on most Intel processors it prefers 256 bits.

    That function stays one of its own, because what it is inlined into does not inherit the choice.
    """

    def codegen(context: Any, b: Any, _signature: Any, _args: Any) -> Any:
        attributes = b.function.attributes
        attributes.add("noinline")
        set.add(attributes, '"prefer-vector-width"="512"')  # its own ``add`` knows no attributes with a value
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def prefetch(_context: Any, pointer: Any, index: Any) -> Any:
    """Bring the cache line of ``pointer[index]`` near; a hint, and no error wherever it points."""

    def codegen(context: Any, b: Any, _signature: Any, args: Any) -> Any:
        address = b.bitcast(b.gep(args[0], [args[1]]), ir.IntType(8).as_pointer())
        flag = ir.IntType(32)
        signature = ir.FunctionType(ir.VoidType(), [address.type, flag, flag, flag])
        function = b.module.declare_intrinsic("llvm.prefetch", [address.type], signature)
        b.call(function, [address, flag(0), flag(3), flag(1)])  # to read, to keep in all caches, data
        return context.get_dummy_value()

    return types.void(pointer, index), codegen


def _power_of_two(degree: int) -> list[float]:
    """Coefficients of the polynomial that meets 2^f at the Chebyshev nodes of [−½, ½]."""
    nodes = 0.5 * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    return np.polynomial.polynomial.polyfit(nodes, 2.0**nodes, degree).tolist()
