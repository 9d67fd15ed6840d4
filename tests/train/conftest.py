"""All runs here share compiled programs: they are few and small, and compiling is most of the time."""

from __future__ import annotations

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache


@pytest.fixture(scope="session", autouse=True)
def compiled_once(tmp_path_factory):
    """Also shows that a program that comes from the cache computes the same."""
    folder = str(tmp_path_factory.mktemp("cache"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOY_CACHE", folder)  # for runs, also those in a process of their own
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        jax.config.update("jax_compilation_cache_dir", folder)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compilation_cache.reset_cache()
        yield
        jax.config.update("jax_disable_most_optimizations", False)
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
