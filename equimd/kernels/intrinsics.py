"""What compiled kernels call and numba lacks: an exponential that vectorises, wide vectors, prefetching."""

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic


@intrinsic
def exp(_context: Any, x: Any) -> Any:
    """eˣ of a float32 or float64 scalar, in plain arithmetic; NaN stays NaN, ±∞ are taken for ±87 or ±708.

    x = (n + f)·ln 2 with an integer n and |f| ≤ ½; 2^f is a polynomial, 2ⁿ is written into the bits of the exponent.
    """
    is_single = x == types.float32
    real, bits = (ir.FloatType(), ir.IntType(32)) if is_single else (ir.DoubleType(), ir.IntType(64))
    mantissa, largest, degree = (23, 126, 7) if is_single else (52, 1022, 13)
    log2e = float((np.float32 if is_single else np.float64)(1 / math.log(2)))
    rest = 1 / math.log(2) - log2e if is_single else 2.0355273740931033e-17  # of 1/ln 2 after rounding

    def codegen(_target: Any, b: Any, _signature: Any, args: Any) -> Any:  # b is an IRBuilder, without type hints
        def fma(u: Any, v: Any, w: Any) -> Any:
            return b.fadd(b.fmul(u, v, flags=["contract"]), w, flags=["contract"])

        limit = real(largest * math.log(2))
        is_nan = b.fcmp_unordered("uno", args[0], args[0])
        value = b.select(is_nan, real(0.0), args[0])  # there is no integer for it
        value = b.select(b.fcmp_ordered(">", value, limit), limit, value)
        value = b.select(b.fcmp_ordered("<", value, real(-limit.constant)), real(-limit.constant), value)
        # Truncation rounds to nearest, because the number is made positive and a half is added.
        shifted = b.fptosi(fma(value, real(log2e), real(largest + 0.5)), ir.IntType(32))
        n = b.sitofp(b.sub(shifted, shifted.type(largest)), real)
        f = fma(value, real(rest), b.fma(value, real(log2e), b.fneg(n)))  # fma: not to be rounded in between
        series = real(0.0)
        for coefficient in reversed(_power_of_two(degree)):
            series = fma(series, f, real(coefficient))
        exponent = b.add(shifted, shifted.type(1))
        exponent = exponent if is_single else b.zext(exponent, bits)
        return b.select(is_nan, args[0], b.fmul(series, b.bitcast(b.shl(exponent, bits(mantissa)), real)))

    return x(x), codegen


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
