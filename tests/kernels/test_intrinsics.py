"""What compiled kernels call beyond numba: the exponential, wide vectors, prefetching."""

import llvmlite.binding
import numpy as np
import pytest
from numba import carray, cfunc, njit, types

from equimd.kernels.intrinsics import exp, prefetch, use_widest_vectors


@njit
def apply(x, out):
    for k in range(x.size):
        out[k] = exp(x[k])


# Some roundings, of the argument and of the polynomial; processors differ in which of them the compiler joins.
@pytest.mark.parametrize(("dtype", "ulp"), [(np.float32, 1.2e-7), (np.float64, 2e-15)])
def test_is_exact_to_rounding(dtype, ulp):
    limit = 87.0 if dtype == np.float32 else 700.0
    x = np.concatenate([np.linspace(-limit, limit, 40_001), [0.0, 1e-30, -1e-30, np.log(2), 0.5 * np.log(2)]]).astype(
        dtype
    )
    out = np.empty_like(x)
    apply(x, out)
    exact = np.exp(x.astype(np.longdouble))
    assert float(np.abs(out / exact - 1).max()) < ulp
    assert float(np.abs(np.nextafter(out, dtype(np.inf)) / exact - 1).max()) > 0.4 * ulp  # a bit more would be seen


def test_what_is_not_a_number_stays_so():
    x = np.array([np.nan, np.inf, -np.inf, 1e30, -1e30], np.float32)
    out = np.empty_like(x)
    apply(x, out)
    assert np.isnan(out[0])
    assert out[1] == out[3] > 1e37
    assert 0 < out[2] == out[4] < 1e-37


@pytest.mark.skipif(not llvmlite.binding.get_host_cpu_features().get("avx512f"), reason="no vectors of 512 bits here")
def test_widest_vectors_are_used_within_a_c_function():
    signature = types.void(types.CPointer(types.float32), types.int64)

    @cfunc(signature)
    def double(pointer, size):
        use_widest_vectors()
        x = carray(pointer, 1 << 40)
        for k in range(size):
            x[k] = x[k] * np.float32(2)

    assert "zmm" in double._library.get_asm_str()


def test_prefetch_changes_nothing_wherever_it_points():
    @cfunc(types.void(types.CPointer(types.float64), types.int64))
    def touch(pointer, index):
        prefetch(pointer, index)

    x = np.arange(3.0)
    touch.ctypes(x.ctypes.data_as(touch.ctypes.argtypes[0]), 1)
    touch.ctypes(x.ctypes.data_as(touch.ctypes.argtypes[0]), 1 << 40)
    touch.ctypes(None, 0)
    assert x.tolist() == [0.0, 1.0, 2.0]
