"""Part 1: the machine, the versions, which kernels there are, and what the device can do at best."""

import subprocess
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch

from equimd import kernels
from gpu_parts.runner import Case, Skip
from gpu_parts.systems import Options
from gpu_parts.timing import measure


def cases(options: Options) -> list[Case]:
    """The machine; each backend of the convolution; bandwidth and rates, the ceilings of what comes after."""
    named = [Case({"what": "machine"}, partial(_machine, options))]
    named += [Case({"what": f"backend {name}"}, partial(_backend, options, name)) for name in get_args(kernels.Backend)]
    named.append(Case({"what": "copy on the device"}, partial(_copy, options)))
    precisions = {"float32": torch.float32, "float32 as TF32": torch.float32, "bfloat16": torch.bfloat16}
    for name, dtype in precisions.items():
        named.append(Case({"what": f"matrix product, {name}"}, partial(_product, options, dtype, "TF32" in name)))
    return named


def _machine(options: Options) -> dict[str, Any]:
    facts: dict[str, Any] = {"cuda": torch.version.cuda or "none", "driver": _driver()}
    if options.kind == "cuda":
        properties = torch.cuda.get_device_properties(options.device)
        facts |= {
            "device": properties.name,
            "memory_mib": properties.total_memory / 2**20,
            "multiprocessors": properties.multi_processor_count,
            "capability": f"{properties.major}.{properties.minor}",
        }
    return facts


def _driver() -> str:
    """The driver's version, by its tool, or by the kernel where there is none."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def _backend(options: Options, name: kernels.Backend) -> dict[str, Any]:
    """Whether a backend takes this device: 2 · 3 · 5 by one edge from one atom to itself."""
    one = torch.ones(1, 1, 1, device=options.device)
    index = torch.zeros(1, dtype=torch.int64, device=options.device)
    plan = kernels.make_layer_plan(0)
    try:
        out = kernels.convolve(2 * one, 3 * one[0], 5 * one, index, index, plan, backend=name)
    except ValueError as error:
        raise Skip(str(error)) from error
    return {"passed": float(out) == 30.0}


def _copy(options: Options) -> dict[str, Any]:
    """GB/s of a copy, bytes read and bytes written; of random numbers, many times the cache."""
    n = 2**16 if options.quick else 2**28
    source = torch.rand(n, device=options.device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), options.device, options.sizes.block_seconds)
    return timing | {"gb_per_s": 2 * 4 * n / timing["ms"] / 1e6}


def _product(options: Options, dtype: torch.dtype, tf32: bool) -> dict[str, Any]:
    """TFLOP/s of a square matrix product of random numbers."""
    n = 128 if options.quick else 8192
    a, b = (torch.randn(n, n, device=options.device).to(dtype) for _ in range(2))
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        timing = measure(lambda: a @ b, options.device, options.sizes.block_seconds)
    finally:
        torch.set_float32_matmul_precision("highest")
    return timing | {"tflop_per_s": 2 * n**3 / timing["ms"] / 1e9}
