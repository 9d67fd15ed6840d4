"""Steps fault little memory in, and their process does not grow. Linux with glibc only."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from glmv_jax.parallel import host

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")

# Large blocks as steps allocate them, and the page faults of ten.
STEPS = """
import ctypes, os, resource, sys
from glmv_jax.parallel import host
if "huge" in sys.argv:
    host.start_with_huge_pages()
if "default" not in sys.argv:
    assert host.prepare_memory()
libc = ctypes.CDLL("libc.so.6")
libc.malloc.restype = ctypes.c_void_p
size = 64 << 20
for i in range(12):
    if i == 2:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(block, 1, size)
    libc.free(ctypes.c_void_p(block))
print(os.getpid(), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before, os.environ.get("GLIBC_TUNABLES"))
"""


def run(mode: str, tunables: str = "") -> tuple[int, str]:
    """(page faults, GLIBC_TUNABLES in the end); the process stays the same one."""
    env = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    process = subprocess.Popen(
        [sys.executable, "-c", STEPS, mode], env=env | ({"GLIBC_TUNABLES": tunables} if tunables else {}),
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    out, _ = process.communicate()
    assert process.returncode == 0
    pid, faults, found = out.split()
    assert int(pid) == process.pid
    return int(faults), found


def test_the_second_allocation_faults_little_in():
    default, kept = run("default")[0], run("kept")[0]
    assert kept * 20 < default, (kept, default)
    if host._mode() == "madvise" and host._glibc() >= (2, 35):
        huge, found = run("huge")
        assert huge * 20 < default, (huge, default)
        assert found == "glibc.malloc.hugetlb=1"


def test_a_persons_own_tunables_stand():
    assert run("huge", "glibc.malloc.hugetlb=0")[1] == "glibc.malloc.hugetlb=0"
    if host._mode() == "madvise" and host._glibc() >= (2, 35):
        assert run("huge", "glibc.malloc.check=0")[1] == "glibc.malloc.check=0:glibc.malloc.hugetlb=1"


@pytest.mark.parametrize(
    "kernel, glibc, tunables, anew",
    [
        ("madvise", (2, 36), "", True), ("always", (2, 36), "", False), ("never", (2, 36), "", False),
        ("", (2, 36), "", False), ("madvise", (2, 34), "", False), ("madvise", (), "", False),
        ("madvise", (2, 36), "glibc.malloc.hugetlb=2", False),
    ],
)  # fmt: skip
def test_a_process_starts_anew_only_where_that_helps(monkeypatch, kernel, glibc, tunables, anew):
    started = []
    monkeypatch.setattr(host, "_mode", lambda: kernel)
    monkeypatch.setattr(host, "_glibc", lambda: glibc)
    monkeypatch.setattr(os, "execv", lambda *args: started.append(args))
    monkeypatch.setenv("GLIBC_TUNABLES", tunables)
    host.start_with_huge_pages()
    assert started == ([(sys.executable, sys.orig_argv)] if anew else [])
    assert ("hugetlb=1" in os.environ["GLIBC_TUNABLES"]) == anew
