"""Eight emulated devices on the CPU for every test, and programs that are compiled quickly and once: compiling is most
of the time of these tests. Set before anything imports jax, and in the environment, so that other processes have it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# So a gradient of a small VLM compiles in a sixth of the time: most of it are LLVM's passes, and MLIR's for fusions.
if os.environ["JAX_PLATFORMS"] == "cpu":
    os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
FLAGS = {"xla_force_host_platform_device_count": 8, "xla_cpu_use_fusion_emitters": "false",
         "xla_cpu_parallel_codegen_split_count": 1}  # fmt: skip
_given = os.environ.get("XLA_FLAGS", "")
_more = [f"--{name}={value}" for name, value in FLAGS.items() if name not in _given]
os.environ["XLA_FLAGS"] = " ".join([_given, *_more]).strip()
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers have that of the process that starts them
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="glmv_tests_programs_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)

import jax  # noqa: E402
import pytest  # noqa: E402
from jax.experimental.compilation_cache import compilation_cache  # noqa: E402

FOR_USERS = {"aot", "test_vision_memory"}  # folders and files that read what the TPU's compiler makes of a program


@pytest.fixture(scope="module", autouse=True)
def _programs(request):
    """Programs are of use to the tests of one file; kept, those of all files were 7 GB a worker."""
    quickly = not {request.path.stem, request.path.parent.name} & FOR_USERS
    wanted = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") == "1"
    jax.config.update("jax_disable_most_optimizations", quickly and wanted)
    jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"] if quickly else None)
    compilation_cache.reset_cache()  # jax decides once whether there is one
    yield
    jax.clear_caches()
