"""Kernels as machine code: translated, optimised by LLVM for the processor at hand, and kept in the cache folder."""

import contextlib
import ctypes
import functools
import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equimd.kernels.cache import cache_folder, keep
from equimd.kernels.codegen import N_POINTERS, kernel_source
from equimd.kernels.plan import ConvolutionPlan
from equimd.kernels.translate import translate

Kernel = Callable[..., None]
_kernels: dict[tuple[str, ConvolutionPlan, int, str], Kernel] = {}
_by_symbol: dict[str, Kernel] = {}
_lock = threading.RLock()


def _after_fork() -> None:
    """In the child: another thread of the parent may have held the lock."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def get_kernel(kind: str, plan: ConvolutionPlan, n_channels: int, dtype: str) -> Kernel:
    """The C function of ``codegen.kernel_source``, called with N_POINTERS addresses and a range; releases the GIL."""
    key = (kind, plan, n_channels, dtype)
    kernel = _kernels.get(key)
    if kernel is None:
        kernel = _kernels[key] = compile_kernel(kernel_source(*key), N_POINTERS)
    return kernel


def compile_kernel(source: str, n_pointers: int) -> Kernel:
    """The C function of a source in the language of ``translate``: so many addresses, then a range.

    It releases the GIL. The same source is compiled once.
    """
    with _lock:
        compiler = _compiler()
        symbol = compiler.symbol(source)
        if symbol not in _by_symbol:
            signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * n_pointers, ctypes.c_int64, ctypes.c_int64)
            kernel: Any = signature(compiler.address(source, symbol))
            kernel.compiler = compiler  # which owns the machine code
            _by_symbol[symbol] = kernel
        return _by_symbol[symbol]


def assembly(source: str) -> str:
    """What the processor executes, for tests and benchmarks."""
    return _compiler().assembly(source)


@functools.cache
def _compiler() -> "_Compiler":
    return _Compiler()


class _Compiler:
    """LLVM, for the processor at hand. It owns the machine code of all its kernels."""

    def __init__(self) -> None:
        from llvmlite import __version__, binding

        with contextlib.suppress(RuntimeError):  # newer versions do it by themselves and say so
            binding.initialize()
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        self._llvm: Any = binding
        processor, features = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
        target = binding.Target.from_default_triple()
        where = "static" if target.name.startswith("x86") else "default"
        self._machine = target.create_target_machine(
            cpu=processor, features=features, opt=3, reloc=where, codemodel="jitdefault", jit=True
        )
        self._engine = binding.create_mcjit_compiler(self._module(""), self._machine)
        here = Path(__file__)
        texts = [here.with_name(name).read_text(encoding="utf-8") for name in ("ir.py", "translate.py", here.name)]
        self._identity = "\n".join([__version__, target.triple, processor, features, *texts])

    def symbol(self, source: str) -> str:
        """A name for what comes of a source on this processor, by this version."""
        return f"equimd_{hashlib.sha256((self._identity + source).encode()).hexdigest()[:32]}"

    def address(self, source: str, symbol: str) -> int:
        """Where the function is in memory; from the cache if it is there and whole."""
        code = _read(cache_folder() / f"{symbol}.o")
        if code is None:
            code = self._machine.emit_object(self._optimised(translate(source, symbol)))
            keep(f"{symbol}.o", hashlib.sha256(code).digest() + code)
        self._engine.add_object_file(self._llvm.ObjectFileRef.from_data(code))
        self._engine.finalize_object()
        return self._engine.get_function_address(symbol)

    def _module(self, text: str) -> Any:
        module = self._llvm.parse_assembly(text)
        module.triple, module.data_layout = self._machine.triple, str(self._machine.target_data)
        module.verify()
        return module

    def assembly(self, source: str) -> str:
        """Text of the machine code."""
        return self._machine.emit_assembly(self._optimised(translate(source, "kernel")))

    def _optimised(self, text: str) -> Any:
        options = self._llvm.create_pipeline_tuning_options(speed_level=3)
        options.loop_vectorization, options.slp_vectorization = True, False
        builder = self._llvm.create_pass_builder(self._machine, options)
        module = self._module(text)
        builder.getModulePassManager().run(module, builder)
        return module


def _read(path: Path) -> bytes | None:
    """Machine code that was kept, unless it is not there or was changed since."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None
