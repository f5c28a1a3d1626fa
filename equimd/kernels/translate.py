"""The language of the CPU's kernels, a small part of Python, and its translation to LLVM's text.

A kernel is a module with constants and functions; the last function is called from outside:

    C0 = float32(2.0)
    def kernel(x: float32[:, 32], order: int64[:], low: int64, high: int64):
        row = empty(32, float32)                  # memory of the call's own
        for n in range(low, high):
            own = x[order[n]]                     # a row where it lies, no copy
            for c in range(32):
                row[c] = C0 * own[c]

Sizes are literals, so that LLVM sees which rows do not overlap; the first may be unknown (``:``). Numbers are int64,
float32 and float64, and a name keeps the type of its first value. Indices are not negative, and nothing checks them.
There are assignments, ``for`` over a range, ``if``, ``continue``, arithmetic, comparisons, and the calls of ``_CALLS``.
Anything else is refused as it is translated. ``ir`` says how types mix.
"""

import ast
import functools
import math
from collections.abc import Callable
from typing import NamedTuple, NoReturn

from equimd.kernels.ir import BOOL, FLOATS, INT, Array, Builder, Value, constant, llvm_type

_OPERATORS: dict[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div",
    ast.FloorDiv: "floordiv", ast.Mod: "mod", ast.BitAnd: "and",
}  # fmt: skip
_COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne",
}  # fmt: skip
_STACK = 1 << 16  # bytes of a call's own memory that are on the stack; more comes from the heap
_WIDEST = 'noinline nounwind "prefer-vector-width"="512"'  # on most Intel processors LLVM prefers 256 bits


class _Variable(NamedTuple):
    """A number that changes: where it lies. LLVM makes registers of these."""

    place: Array


class _Function(NamedTuple):
    """Another function of the module: its symbol and types of its parameters, ``ptr`` for arrays."""

    symbol: str
    kinds: tuple[str, ...]


_Meaning = Value | Array | _Variable | _Function


class KernelSyntaxError(TypeError):
    """A kernel's source says what its language does not have: a mistake of whoever wrote it."""


def translate(source: str, symbol: str) -> str:
    """LLVM's text of a module; its last function gets the name ``symbol``."""
    names: dict[str, _Meaning] = {}
    functions: list[str] = []
    declarations: set[str] = set()
    body = [node for node in ast.parse(source).body if not _is_docstring(node)]
    last = [node for node in body if isinstance(node, ast.FunctionDef)][-1]
    for node in body:
        if isinstance(node, ast.Assign):
            names |= _constants(node)
        elif isinstance(node, ast.FunctionDef):
            translator = _Translator(names, node)
            linkage, name = ("", symbol) if node is last else ("internal ", node.name)
            functions.append(translator.function(node, linkage, f"@{name}"))
            declarations |= translator.b.declarations
            names[node.name] = _Function(f"@{name}", translator.kinds)
        else:
            _refuse(node, "is no constant and no function")
    return "\n".join([*functions, *sorted(declarations), ""])


def _refuse(node: ast.AST, why: str) -> NoReturn:
    raise KernelSyntaxError(f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)!r} {why}")


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _constants(node: ast.Assign) -> dict[str, _Meaning]:
    """``NAME = float32(2.0)``."""
    match node:
        case ast.Assign([ast.Name(name)], ast.Call(ast.Name("float32" | "float64" as dtype), [argument])):
            return {name: constant(float(ast.literal_eval(argument)), llvm_type(dtype))}
    _refuse(node, "is no constant")


def _annotation(node: ast.expr | None) -> tuple[str, tuple[int, ...] | None]:
    """Type of an element and shape of ``float32[:, 32]``; no shape for a number."""
    match node:
        case ast.Name(dtype):
            return llvm_type(dtype), None
        case ast.Subscript(ast.Name(dtype), sizes):
            axes = sizes.elts if isinstance(sizes, ast.Tuple) else [sizes]
            return llvm_type(dtype), tuple(0 if isinstance(a, ast.Slice) else int(ast.literal_eval(a)) for a in axes)
    raise KernelSyntaxError("a parameter is annotated by a number's or an array's type")


class _Translator:
    def __init__(self, names: dict[str, _Meaning], node: ast.FunctionDef) -> None:
        self.b = Builder()
        self.names = dict(names)
        self.next: list[str] = []  # where ``continue`` goes, loop by loop
        self.heap: list[str] = []
        self.on_stack = 0
        parameters, kinds = [], []
        for argument in node.args.args:
            element, shape = _annotation(argument.annotation)
            name = f"%p_{argument.arg}"
            kinds.append(element if shape is None else "ptr")
            parameters.append(f"{kinds[-1]} {name}")
            self.names[argument.arg] = Value(name, element) if shape is None else Array(name, element, shape)
        self.kinds, self.parameters = tuple(kinds), ", ".join(parameters)

    def function(self, node: ast.FunctionDef, linkage: str, symbol: str) -> str:
        self.block(node.body)
        for pointer in self.heap:
            self.b.do(f"call void @free(ptr {pointer})")
        lines = [f"define {linkage}void {symbol}({self.parameters}) {_WIDEST} {{", "entry:", *self.b.entry]
        return "\n".join([*lines, *self.b.lines, "  ret void", "}"])

    # Statements

    def block(self, body: list[ast.stmt]) -> None:
        for node in body:
            match node:
                case ast.Assign(targets, value):
                    for target in targets:
                        self.assign(target, value)
                case ast.AugAssign(target, operator, value):
                    self.add_to(target, _OPERATORS[type(operator)], value)
                case ast.For(ast.Name(name), ast.Call(ast.Name("range"), bounds), inner):
                    self.loop(name, bounds, inner)
                case ast.If(test, yes, no):
                    self.condition(test, yes, no)
                case ast.Continue():
                    self.b.jump(self.next[-1])
                    self.b.label(self.b.name("unreached"))
                case ast.Expr(ast.Call() as call):
                    self.call(call)
                case _ if _is_docstring(node):
                    pass
                case _:
                    _refuse(node, "is no statement of kernels")

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            if not (isinstance(value, ast.Tuple) and len(value.elts) == len(target.elts)):
                _refuse(target, "takes as many values as names")
            found = [self.meaning(element) for element in value.elts]
            for element, meaning in zip(target.elts, found, strict=True):
                self.bind(element, meaning)
        else:
            self.bind(target, self.meaning(value))

    def bind(self, target: ast.expr, meaning: Value | Array) -> None:
        """Let a name or a place in memory be a number, a name also an array."""
        if isinstance(target, ast.Name) and isinstance(meaning, Array):
            self.names[target.id] = meaning
        elif isinstance(target, ast.Name) and isinstance(meaning, Value):
            self.set(target, meaning)
        elif isinstance(target, ast.Subscript) and isinstance(meaning, Value):
            place = self.place(target)
            if isinstance(target.slice, ast.Slice):
                self.fill(target, place, meaning)
            else:
                self.b.store(meaning, place)
        else:
            _refuse(target, "cannot be assigned to")

    def set(self, target: ast.Name, value: Value) -> None:
        known = self.names.get(target.id)
        if not isinstance(known, _Variable):
            known = self.names[target.id] = _Variable(Array(self.b.stack(value.type), value.type, ()))
        if value.type.startswith("<"):
            if known.place.element != value.type:
                _refuse(target, f"was a {known.place.element} before")
            self.b.do(f"store {value.type} {value.text}, ptr {known.place.pointer}")
            return
        if known.place.element != value.type and (known.place.element != "double" or value.type == BOOL):
            _refuse(target, f"was a {known.place.element} before and is a {value.type} now")
        self.b.store(value, known.place)

    def fill(self, node: ast.AST, place: Array, value: Value) -> None:
        size = math.prod(place.shape)
        if not size:
            _refuse(node, "has no size to fill")
        counter = self.b.name("fill")
        flat = Array(place.pointer, place.element, (size,))
        value = self.b.cast(value, place.element)
        self.count(counter, constant(0, INT), constant(size, INT), constant(1, INT),
                   lambda k: self.b.store(value, self.b.at(flat, k)))  # fmt: skip

    def add_to(self, target: ast.expr, operation: str, value: ast.expr) -> None:
        if isinstance(target, ast.Subscript):
            place = self.place(target)
            self.b.store(self.b.arithmetic(operation, self.b.load(place), self.number(value)), place)
        elif isinstance(target, ast.Name):
            self.set(target, self.b.arithmetic(operation, self.number(target), self.number(value)))
        else:
            _refuse(target, "cannot be added to")

    def loop(self, name: str, bounds: list[ast.expr], body: list[ast.stmt]) -> None:
        numbers = [self.number(bound) for bound in bounds]
        start, stop = ([constant(0, INT)] + numbers)[-2:] if len(numbers) < 3 else numbers[:2]
        step = numbers[2] if len(numbers) == 3 else constant(1, INT)

        def inside(counter: Value) -> None:
            self.names[name] = counter
            self.block(body)

        self.count(name, start, stop, step, inside)

    def count(self, name: str, start: Value, stop: Value, step: Value, inside: Callable[[Value], None]) -> None:
        """A loop over ``start``, ``start`` + ``step``, … below ``stop``."""
        b, place = self.b, Array(self.b.stack(INT), INT, ())
        test, body, following, end = (b.name(stem) for stem in ("test", "body", "next", "end"))
        b.store(start, place)
        b.jump(test)
        b.label(test)
        counter = b.load(place)
        b.branch(b.compare("lt", counter, stop), body, end)
        b.label(body)
        self.next.append(following)
        inside(counter)
        self.next.pop()
        b.jump(following)
        b.label(following)
        b.store(b.arithmetic("add", counter, step), place)
        b.jump(test)
        b.label(end)

    def condition(self, test: ast.expr, yes: list[ast.stmt], no: list[ast.stmt]) -> None:
        b = self.b
        then, otherwise, end = b.name("then"), b.name("else"), b.name("end")
        b.branch(self.number(test), then, otherwise if no else end)
        b.label(then)
        self.block(yes)
        b.jump(end)
        if no:
            b.label(otherwise)
            self.block(no)
            b.jump(end)
        b.label(end)

    # Expressions

    def number(self, node: ast.expr) -> Value:
        meaning = self.meaning(node)
        if not isinstance(meaning, Value):
            _refuse(node, "is no number")
        return meaning

    def array(self, node: ast.expr) -> Array:
        meaning = self.meaning(node)
        if not isinstance(meaning, Array):
            _refuse(node, "is no array")
        return meaning

    def meaning(self, node: ast.expr) -> Value | Array:
        match node:
            case ast.Constant(bool() | str() | None):
                _refuse(node, "is no number")
            case ast.Constant(int() as value):
                return constant(value, INT)
            case ast.Constant(float() as value):
                return constant(value, "double")
            case ast.Name(name):
                known = self.names.get(name)
                if isinstance(known, _Variable):
                    kind = known.place.element
                    return self.b.emit(f"load {kind}, ptr {known.place.pointer}", kind)
                if isinstance(known, Value | Array):
                    return known
            case ast.BinOp(left, operator, right) if type(operator) in _OPERATORS:
                return self.b.arithmetic(_OPERATORS[type(operator)], self.number(left), self.number(right))
            case ast.BinOp(left, ast.Pow(), ast.Constant(int() as power)) if power > 0:
                base = self.number(left)
                return functools.reduce(lambda x, y: self.b.arithmetic("mul", x, y), [base] * power)
            case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as value)):
                return constant(-value, INT if isinstance(value, int) else "double")
            case ast.UnaryOp(ast.USub(), operand):
                return self.b.negative(self.number(operand))
            case ast.Compare(left, [operator], [right]) if type(operator) in _COMPARISONS:
                return self.b.compare(_COMPARISONS[type(operator)], self.number(left), self.number(right))
            case ast.IfExp(test, yes, no):
                return self.b.select(self.number(test), self.number(yes), self.number(no))
            case ast.Subscript():
                place = self.place(node)
                return place if place.shape else self.b.load(place)
            case ast.Call():
                found = self.call(node)
                if found is not None:
                    return found
        _refuse(node, "is no expression of kernels, or names nothing")

    def place(self, node: ast.Subscript) -> Array:
        """What ``x[i]``, ``x[i, j]``, ``x[start:]`` or ``x[:]`` means, a row or a number."""
        array, index = self.array(node.value), node.slice
        if isinstance(index, ast.Slice):
            if index.upper or index.step:
                _refuse(node, "has an end, which slices of kernels have not")
            if index.lower is None:
                return array
            return Array(self.b.at(array, self.number(index.lower)).pointer, array.element, (0, *array.shape[1:]))
        indices = index.elts if isinstance(index, ast.Tuple) else [index]
        return self.b.at(array, *(self.number(i) for i in indices))

    def call(self, node: ast.Call) -> Value | Array | None:
        name, given, b = ast.unparse(node.func), node.args, self.b
        known = self.names.get(name)
        if isinstance(known, _Function):
            return self.call_function(known, given)
        if name in ("empty", "zeros"):
            return self.memory(node, name)
        if name not in _CALLS or node.keywords:
            _refuse(node, "calls what kernels do not have")
        return _CALLS[name](self, b, *given)

    def call_function(self, function: _Function, given: list[ast.expr]) -> None:
        arguments = []
        for node, kind in zip(given, function.kinds, strict=True):
            text = self.array(node).pointer if kind == "ptr" else self.b.cast(self.number(node), kind).text
            arguments.append(f"{kind} {text}")
        self.b.do(f"call void {function.symbol}({', '.join(arguments)})")

    def memory(self, node: ast.Call, name: str) -> Array:
        """``empty(96, float32)``, or filled with zeros; a size that is no literal is for the heap."""
        if self.next:
            _refuse(node, "is within a loop")
        kind, size = llvm_type(ast.unparse(node.args[1])), self.number(node.args[0])
        count = int(size.text) if size.text.isdigit() else 0
        width = constant(4 if kind == "float" else 8, INT)
        self.on_stack += count * int(width.text)
        if count and self.on_stack <= _STACK:
            pointer = self.b.stack(kind, count, align=64)
        else:
            self.b.declarations |= {"declare noalias ptr @malloc(i64)", "declare void @free(ptr)"}
            n_bytes = self.b.arithmetic("mul", size, width)
            pointer = self.b.emit(f"call noalias align 16 ptr @malloc(i64 {n_bytes.text})", "ptr").text
            self.heap.append(pointer)
        array = Array(pointer, kind, (count,))
        if name == "zeros":
            self.fill(node, array, constant(0, kind))
        return array


_Call = Callable[..., Value | None]


def _of_numbers(function: Callable[..., Value]) -> _Call:
    return lambda t, b, *nodes: function(b, *(t.number(node) for node in nodes))


def _extreme(sign: str) -> Callable[..., Value]:
    return lambda b, x, y: b.select(b.compare(sign, *b.alike(y, x)), *b.alike(y, x))


def _math(name: str) -> _Call:
    return _of_numbers(lambda b, x: b.function(name, x if x.type in FLOATS else b.cast(x, "double")))


_CALLS: dict[str, _Call] = {
    "float": _of_numbers(lambda b, x: b.cast(x, "double")),
    "float64": _of_numbers(lambda b, x: b.cast(x, "double")),
    "float32": _of_numbers(lambda b, x: b.cast(x, "float")),
    "int": _of_numbers(lambda b, x: b.cast(x, INT)),
    "min": _of_numbers(_extreme("lt")),
    "max": _of_numbers(_extreme("gt")),
    **{f"math.{name}": _math(name) for name in ("sqrt", "sin", "cos", "exp", "log")},
    "exp": _of_numbers(Builder.exp),  # of a number or of 16, where LLVM may vectorise it
    # Vectors of 16, read from and written to consecutive elements.
    "load": lambda t, b, array, index: b.load_lanes(b.at(t.array(array), t.number(index))),
    "store": lambda t, b, array, index, value: b.store_lanes(t.number(value), b.at(t.array(array), t.number(index))),
    "splat": _of_numbers(Builder.splat),
    "splat_at": lambda t, b, array, index: b.splat(b.load(b.at(t.array(array), t.number(index)))),
    "fma": _of_numbers(Builder.fma),
    "mul": _of_numbers(lambda b, x, y: b.operation("fmul", x, y)),
    "sub": _of_numbers(lambda b, x, y: b.operation("fsub", x, y)),
    "div": _of_numbers(lambda b, x, y: b.operation("fdiv", x, y)),
    "maximum": _of_numbers(lambda b, x, y: b.choose("ogt", x, y, x, y)),
    "total": _of_numbers(Builder.total),
    "transpose": lambda t, b, x, y, block: b.transpose(t.array(x), t.array(y), t.number(block)),
    "prefetch": lambda t, b, array, index: b.prefetch(b.at(t.array(array)._replace(shape=(0,)), t.number(index))),
    "read_cycles": lambda t, b: b.read_cycles(),
}
