"""Vectors of 16 numbers for compiled kernels, where the compiler would not find them by itself.

It cannot prove that arrays do not overlap, so loops over several of them stay scalar. A vector is read by
``load(array, index)`` and written by ``store(array, index, vector)``, from consecutive elements; there is no check of
the index. LLVM splits vectors that the machine does not have.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from equimd.kernels.intrinsics import exp_ir
from equimd.kernels.source import LANES


class Lanes(types.Type):
    """The type of a vector of 16 float32 or float64."""

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, dmm: Any, fe_type: Lanes) -> None:
        super().__init__(dmm, fe_type, _vector(fe_type.dtype))


def _vector(dtype: types.Float) -> ir.VectorType:
    return ir.VectorType(ir.FloatType() if dtype == types.float32 else ir.DoubleType(), LANES)


def _address(context: Any, builder: Any, array_type: Any, array: Any, index: Any) -> Any:
    data = context.make_array(array_type)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [index]), _vector(array_type.dtype).as_pointer())


def _splat(builder: Any, dtype: types.Float, value: Any) -> Any:
    nothing = ir.Constant(_vector(dtype), ir.Undefined)
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    return builder.shuffle_vector(builder.insert_element(nothing, value, ir.IntType(32)(0)), nothing, zeros)


@intrinsic
def load(_context: Any, array: Any, index: Any) -> Any:
    """array[index : index + 16] of a contiguous one-dimensional array."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_address(context, builder, signature.args[0], *args))
        value.align = array.dtype.bitwidth // 8
        return value

    return Lanes(array.dtype)(array, types.intp), codegen


@intrinsic
def store(_context: Any, array: Any, index: Any, value: Any) -> Any:
    """array[index : index + 16] = value."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        instruction = builder.store(args[2], _address(context, builder, signature.args[0], *args[:2]))
        instruction.align = array.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(array, types.intp, value), codegen


@intrinsic
def splat(_context: Any, value: Any) -> Any:
    """The same number in every lane."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return _splat(builder, value, args[0])

    return Lanes(value)(value), codegen


@intrinsic
def splat_at(_context: Any, array: Any, index: Any) -> Any:
    """array[index] in every lane."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        return _splat(builder, array.dtype, builder.load(builder.gep(data, [args[1]])))

    return Lanes(array.dtype)(array, types.intp), codegen


@intrinsic
def fma(_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c; not rounded in between where the machine can."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fadd(builder.fmul(args[0], args[1], flags=["contract"]), args[2], flags=["contract"])

    return a(a, b, c), codegen


@intrinsic
def sub(_context: Any, a: Any, b: Any) -> Any:
    """a − b."""
    return a(a, b), lambda _target, builder, _signature, args: builder.fsub(*args)


@intrinsic
def mul(_context: Any, a: Any, b: Any) -> Any:
    """a·b."""
    return a(a, b), lambda _target, builder, _signature, args: builder.fmul(*args)


@intrinsic
def div(_context: Any, a: Any, b: Any) -> Any:
    """a/b."""
    return a(a, b), lambda _target, builder, _signature, args: builder.fdiv(*args)


@intrinsic
def maximum(_context: Any, a: Any, b: Any) -> Any:
    """The larger, lane by lane; b where one is NaN."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", *args), *args)

    return a(a, b), codegen


@intrinsic
def exp(_context: Any, a: Any) -> Any:
    """eˣ, lane by lane, as ``intrinsics.exp``."""
    return a(a), lambda _target, builder, _signature, args: exp_ir(builder, args[0])


@intrinsic
def total(_context: Any, a: Any) -> Any:
    """The sum over lanes."""

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        value, width = args[0], LANES
        while width > 1:
            width //= 2
            upper = ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(width, 2 * width)))
            lower = ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(width)))
            value = builder.fadd(*(builder.shuffle_vector(value, value, part) for part in (lower, upper)))
        return builder.extract_element(value, ir.IntType(32)(0))

    return a.dtype(a), codegen


@intrinsic
def transpose(_context: Any, source: Any, target: Any, block: Any) -> Any:
    """The ``block``-th 16 × 16 numbers of ``target`` become those of ``source``, rows and columns exchanged."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = builder.mul(args[2], args[2].type(LANES * LANES))

        def address(array: int, row: int) -> Any:
            index = builder.add(first, first.type(LANES * row))
            return _address(context, builder, signature.args[array], args[array], index)

        rows = [builder.load(address(0, row)) for row in range(LANES)]
        for row in rows:
            row.align = source.dtype.bitwidth // 8
        distance = 1
        while distance < LANES:  # exchange the blocks off the diagonal, 1 × 1 first, then 2 × 2, …
            lower = [k if not k & distance else LANES + k - distance for k in range(LANES)]
            upper = [k + distance if not k & distance else LANES + k for k in range(LANES)]
            masks = [ir.Constant(ir.VectorType(ir.IntType(32), LANES), mask) for mask in (lower, upper)]
            for k in range(LANES):
                if not k & distance:
                    pair = rows[k], rows[k + distance]
                    rows[k], rows[k + distance] = (builder.shuffle_vector(*pair, mask) for mask in masks)
            distance *= 2
        for row, value in enumerate(rows):
            builder.store(value, address(1, row)).align = source.dtype.bitwidth // 8
        return context.get_dummy_value()

    return types.void(source, target, types.intp), codegen
