import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def _kernel_cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    """Keep compiled kernels between runs where pytest has a cache, but never in the user's own."""
    before = os.environ.get("EQUIMD_CACHE")
    if before is None:
        cache = getattr(request.config, "cache", None)  # absent under -p no:cacheprovider
        folder = cache.mkdir("equimd") if cache else tmp_path_factory.mktemp("equimd")
        os.environ["EQUIMD_CACHE"] = str(folder)
    yield
    if before is None:
        os.environ.pop("EQUIMD_CACHE", None)
