"""LLVM's text of one function, instruction by instruction; numbers, vectors of 16 numbers, and rows of arrays.

``translate`` calls it for every operation of a kernel. Types mix as in numpy: integers are int64 and become
float64 beside a float; float32 beside float64 becomes float64. LLVM may reassociate, contract and use
reciprocals, but NaN and infinity stay what they are.
"""

import functools
import math
import struct
from typing import NamedTuple

import numpy as np

LANES = 16
"""Numbers in a vector. LLVM splits vectors that the machine does not have."""

FAST = "reassoc nsz arcp contract"
INT, BOOL, FLOATS = "i64", "i1", ("float", "double")
_DTYPES = {"float32": "float", "float64": "double", "int64": INT}


class Value(NamedTuple):
    """A number or a vector of 16: its name or its constant in LLVM's text, and its type there."""

    text: str
    type: str

    @property
    def is_float(self) -> bool:
        """Whether it is a float, or a vector of floats."""
        return self.type != INT and self.type != BOOL

    @property
    def element(self) -> str:
        """Type of one lane."""
        return self.type[:-1].split()[-1] if self.type.startswith("<") else self.type


class Array(NamedTuple):
    """Numbers in memory: address, type of an element, and how many rows, columns, …; the first is 0 if unknown."""

    pointer: str
    element: str
    shape: tuple[int, ...]


def llvm_type(dtype: str) -> str:
    """LLVM's name of float32, float64 or int64."""
    return _DTYPES[dtype]


def vector(element: str) -> str:
    """Type of 16 numbers."""
    return f"<{LANES} x {element}>"


def constant(value: float, kind: str) -> Value:
    """A number of a type, or 16 times the same number."""
    element = Value("", kind).element
    if element in FLOATS:
        rounded = float(np.float32(value)) if element == "float" else float(value)
        text = f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"
    else:
        text = str(int(value))
    if kind.startswith("<"):
        text = f"<{', '.join([f'{element} {text}'] * LANES)}>"
    return Value(text, kind)


class Builder:
    """Instructions of one function, appended to its current block."""

    def __init__(self) -> None:
        self.entry: list[str] = []  # what is done once, before everything else
        self.lines: list[str] = []
        self.declarations: set[str] = set()
        self._count = 0

    def name(self, stem: str = "v") -> str:
        """A name that nothing else has."""
        self._count += 1
        return f"%{stem}{self._count}"

    def emit(self, text: str, kind: str) -> Value:
        """One instruction with a result."""
        name = self.name()
        self.lines.append(f"  {name} = {text}")
        return Value(name, kind)

    def do(self, text: str) -> None:
        """One instruction without a result."""
        self.lines.append(f"  {text}")

    def label(self, name: str) -> None:
        """Begin a block."""
        self.lines.append(f"{name[1:]}:")

    def jump(self, target: str) -> None:
        """End a block."""
        self.do(f"br label {target}")

    def branch(self, condition: Value, yes: str, no: str) -> None:
        """End a block."""
        self.do(f"br i1 {condition.text}, label {yes}, label {no}")

    def stack(self, kind: str, count: int = 1, align: int = 0) -> str:
        """Address of memory that lives as long as the call."""
        name = self.name("m")
        size = f", i64 {count}" if count > 1 else ""
        self.entry.append(f"  {name} = alloca {kind}{size}{f', align {align}' if align else ''}")
        return name

    # Numbers

    def cast(self, value: Value, kind: str) -> Value:
        """The same number in another type."""
        if value.type == kind:
            return value
        if value.type in FLOATS and kind in FLOATS:
            operation = "fpext" if kind == "double" else "fptrunc"
        elif kind in FLOATS:
            operation = "uitofp" if value.type == BOOL else "sitofp"
        elif value.type in FLOATS:
            operation = "fptosi"
        elif value.type == BOOL:
            operation = "zext"
        else:
            raise TypeError(f"a kernel turns {value.type} into {kind}")
        return self.emit(f"{operation} {value.type} {value.text} to {kind}", kind)

    def alike(self, a: Value, b: Value) -> tuple[Value, Value]:
        """Both in the type of their result."""
        if a.type == b.type:
            return a, b
        kind = "double" if a.is_float or b.is_float else INT
        return self.cast(a, kind), self.cast(b, kind)

    def arithmetic(self, operation: str, a: Value, b: Value) -> Value:
        """One of add, sub, mul, div, floordiv, mod, and."""
        a, b = self.alike(a, b)
        if operation == "div" and not a.is_float:
            a, b = self.cast(a, "double"), self.cast(b, "double")
        if a.is_float:
            return self.emit(f"f{operation} {FAST} {a.type} {a.text}, {b.text}", a.type)
        if operation in ("floordiv", "mod"):  # of numbers that are not negative
            return self.emit(f"{'sdiv' if operation == 'floordiv' else 'srem'} {INT} {a.text}, {b.text}", INT)
        flag = "" if operation == "and" else "nsw "
        return self.emit(f"{operation} {flag}{INT} {a.text}, {b.text}", INT)

    def negative(self, a: Value) -> Value:
        """−a."""
        if a.is_float:
            return self.emit(f"fneg {FAST} {a.type} {a.text}", a.type)
        return self.emit(f"sub nsw {INT} 0, {a.text}", INT)

    def compare(self, sign: str, a: Value, b: Value) -> Value:
        """``sign`` is one of lt, le, gt, ge, eq, ne; false for NaN, but for ne."""
        a, b = self.alike(a, b)
        if a.is_float:
            return self.emit(f"fcmp {'une' if sign == 'ne' else 'o' + sign} {a.type} {a.text}, {b.text}", BOOL)
        return self.emit(f"icmp {sign if sign in ('eq', 'ne') else 's' + sign} {a.type} {a.text}, {b.text}", BOOL)

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        """One of two numbers."""
        yes, no = self.alike(yes, no)
        return self.emit(f"select i1 {condition.text}, {yes.type} {yes.text}, {no.type} {no.text}", yes.type)

    def function(self, name: str, *arguments: Value) -> Value:
        """One of LLVM's functions of floats: sqrt, sin, cos, exp, log, fma."""
        kind = arguments[0].type
        suffix = f"v{LANES}{_SHORT[arguments[0].element]}" if kind.startswith("<") else _SHORT[kind]
        symbol = f"@llvm.{name}.{suffix}"
        self.declarations.add(f"declare {kind} {symbol}({', '.join([kind] * len(arguments))})")
        given = ", ".join(f"{kind} {argument.text}" for argument in arguments)
        return self.emit(f"call {FAST} {kind} {symbol}({given})", kind)

    # Memory

    def at(self, array: Array, *indices: Value) -> Array:
        """A row of an array, or one number of it: an array without a shape."""
        if len(indices) > len(array.shape):
            raise TypeError(f"{len(indices)} indices for an array of {len(array.shape)} dimensions")
        pointer = array.pointer
        for k, index in enumerate(indices):
            stride = math.prod(array.shape[k + 1 :])
            offset = index if stride == 1 else self.arithmetic("mul", index, constant(stride, INT))
            text = f"getelementptr inbounds {array.element}, ptr {pointer}, {INT} {offset.text}"
            pointer = self.emit(text, "ptr").text
        return Array(pointer, array.element, array.shape[len(indices) :])

    def load(self, place: Array) -> Value:
        """A number in memory."""
        return self.emit(f"load {place.element}, ptr {place.pointer}, align {_BYTES[place.element]}", place.element)

    def store(self, value: Value, place: Array) -> None:
        """Write a number."""
        value = self.cast(value, place.element)
        self.do(f"store {value.type} {value.text}, ptr {place.pointer}, align {_BYTES[place.element]}")

    def prefetch(self, place: Array) -> None:
        """Bring a cache line near; a hint, and no error wherever it points."""
        self.declarations.add("declare void @llvm.prefetch.p0(ptr, i32, i32, i32)")
        self.do(f"call void @llvm.prefetch.p0(ptr {place.pointer}, i32 0, i32 3, i32 1)")

    def read_cycles(self) -> Value:
        """The processor's time stamp."""
        self.declarations.add("declare i64 @llvm.readcyclecounter()")
        return self.emit("call i64 @llvm.readcyclecounter()", INT)

    # Vectors of 16, and what is the same for a number and a vector

    def load_lanes(self, place: Array) -> Value:
        """16 numbers in memory."""
        kind = vector(place.element)
        return self.emit(f"load {kind}, ptr {place.pointer}, align {_BYTES[place.element]}", kind)

    def store_lanes(self, value: Value, place: Array) -> None:
        """Write 16 numbers."""
        self.do(f"store {value.type} {value.text}, ptr {place.pointer}, align {_BYTES[place.element]}")

    def splat(self, value: Value) -> Value:
        """The same number in every lane."""
        kind = vector(value.type)
        first = self.emit(f"insertelement {kind} poison, {value.type} {value.text}, i32 0", kind)
        return self.shuffle(first, Value("poison", kind), [0] * LANES)

    def shuffle(self, a: Value, b: Value, mask: list[int]) -> Value:
        """Lanes of a, then of b, by their numbers."""
        text = ", ".join(f"i32 {k}" for k in mask)
        kind = f"<{len(mask)} x {a.element}>"
        return self.emit(f"shufflevector {a.type} {a.text}, {b.type} {b.text}, <{len(mask)} x i32> <{text}>", kind)

    def operation(self, name: str, *values: Value, flags: str = FAST) -> Value:
        """One of fadd, fsub, fmul, fdiv of values of the same type."""
        a, b = values
        return self.emit(f"{name} {flags} {a.type} {a.text}, {b.text}", a.type)

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """a·b + c; not rounded in between if the machine can."""
        return self.operation("fadd", self.operation("fmul", a, b, flags="contract"), c, flags="contract")

    def choose(self, comparison: str, a: Value, b: Value, yes: Value, no: Value) -> Value:
        """``yes`` where a and b compare as LLVM's ``comparison`` says, lane by lane."""
        mask = f"<{LANES} x i1>" if a.type.startswith("<") else BOOL
        condition = self.emit(f"fcmp {comparison} {a.type} {a.text}, {b.text}", mask)
        return self.emit(f"select {mask} {condition.text}, {yes.type} {yes.text}, {no.type} {no.text}", yes.type)

    def exp(self, x: Value) -> Value:
        """eˣ in plain arithmetic, which LLVM can vectorise; NaN stays NaN, ±∞ are taken for ±87 or ±708.

        x = (n + f)·ln 2 with an integer n and |f| ≤ ½; 2^f is a polynomial, and 2ⁿ is written into
        the bits of the exponent.
        """
        is_single, is_vector = x.element == "float", x.type.startswith("<")
        mantissa, largest, degree = (23, 126, 7) if is_single else (52, 1022, 13)
        log2e = float((np.float32 if is_single else np.float64)(1 / math.log(2)))
        rest = 1 / math.log(2) - log2e if is_single else 2.0355273740931033e-17  # of 1/ln 2 after rounding
        integer, bits = (vector(kind) if is_vector else kind for kind in ("i32", "i32" if is_single else "i64"))

        def number(value: float, kind: str = x.type) -> Value:
            return constant(value, kind)

        limit = largest * math.log(2)
        value = self.choose("uno", x, x, number(0.0), x)  # there is no integer for NaN
        value = self.choose("ogt", value, number(limit), number(limit), value)
        value = self.choose("olt", value, number(-limit), number(-limit), value)
        # Truncation rounds to nearest, because the number is made positive and a half is added.
        positive = self.fma(value, number(log2e), number(largest + 0.5))
        shifted = self.emit(f"fptosi {x.type} {positive.text} to {integer}", integer)
        whole = self.emit(f"sub {integer} {shifted.text}, {number(largest, integer).text}", integer)
        n = self.emit(f"sitofp {integer} {whole.text} to {x.type}", x.type)
        minus_n = self.emit(f"fneg {x.type} {n.text}", x.type)
        f = self.fma(value, number(rest), self.function("fma", value, number(log2e), minus_n))
        series = number(0.0)
        for coefficient in reversed(_power_of_two(degree)):
            series = self.fma(series, f, number(coefficient))
        exponent = self.emit(f"add {integer} {shifted.text}, {number(1, integer).text}", integer)
        if not is_single:
            exponent = self.emit(f"zext {integer} {exponent.text} to {bits}", bits)
        shift = self.emit(f"shl {bits} {exponent.text}, {number(mantissa, bits).text}", bits)
        scale = self.emit(f"bitcast {bits} {shift.text} to {x.type}", x.type)
        return self.choose("uno", x, x, x, self.operation("fmul", series, scale))

    def total(self, a: Value) -> Value:
        """The sum over lanes."""
        width = LANES
        while width > 1:
            width //= 2
            lower, upper = (self.shuffle(a, a, list(range(k, k + width))) for k in (0, width))
            a = self.operation("fadd", upper, lower)
        return self.emit(f"extractelement {a.type} {a.text}, i32 0", a.element)

    def transpose(self, source: Array, target: Array, block: Value) -> None:
        """The ``block``-th 16 × 16 numbers of ``target`` become those of ``source``, rows and columns exchanged."""
        first = self.arithmetic("mul", block, constant(LANES * LANES, INT))
        places = [self.arithmetic("add", first, constant(LANES * row, INT)) for row in range(LANES)]
        rows = [self.load_lanes(self.at(source, place)) for place in places]
        distance = 1
        while distance < LANES:  # exchange the blocks off the diagonal, 1 × 1 first, then 2 × 2, …
            lower = [k if not k & distance else LANES + k - distance for k in range(LANES)]
            upper = [k + distance if not k & distance else LANES + k for k in range(LANES)]
            for k in range(LANES):
                if not k & distance:
                    a, b = rows[k], rows[k + distance]
                    rows[k], rows[k + distance] = self.shuffle(a, b, lower), self.shuffle(a, b, upper)
            distance *= 2
        for place, row in zip(places, rows, strict=True):
            self.store_lanes(row, self.at(target, place))


_SHORT = {"float": "f32", "double": "f64"}
_BYTES = {"float": 4, "double": 8, INT: 8}


@functools.cache
def _power_of_two(degree: int) -> list[float]:
    """Coefficients of the polynomial that meets 2^f at the Chebyshev nodes of [−½, ½]."""
    nodes = 0.5 * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    return np.polynomial.polynomial.polyfit(nodes, 2.0**nodes, degree).tolist()
