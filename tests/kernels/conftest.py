import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(request: pytest.FixtureRequest):
    """Keep compiled kernels between runs, but not in the user's cache."""
    before = os.environ.get("EQUIMD_CACHE")
    if before is None:
        os.environ["EQUIMD_CACHE"] = str(request.config.cache.mkdir("equimd"))
    yield
    if before is None:
        os.environ.pop("EQUIMD_CACHE", None)
