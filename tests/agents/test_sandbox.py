"""Programs of a model: every way out of the sandbox is tried, and the text-coding task against the sandbox's results.

What is not covered: holes of the kernel itself.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from glmv_jax.agents import sandbox
from glmv_jax.rl import tasks
from glmv_jax.rl.task import box
from glmv_jax.rl.tasks import code

pytestmark = pytest.mark.skipif(bool(sandbox.missing()), reason=sandbox.missing() or "-")

RAISES = sandbox.Result(("",), "")
# Each returns 1 where it gets through.
ESCAPES = {
    "fork": "import os\ndef f(x): return 1 if os.fork() >= 0 else 0",
    "thread": "import _thread\ndef f(x): _thread.start_new_thread(print, ()); return 1",
    "memory": "def f(x): return 1 if len(bytearray(1 << 30)) else 0",
    "list files": "import os\ndef f(x): return 1 if os.listdir('/') else None",
    "read": "def f(x): open('/etc/passwd').read(); return 1",
    "write": "def f(x): open('/new', 'w').write('x'); return 1",
    "memory file": "import os\ndef f(x): os.write(os.memfd_create('a'), b'x'); return 1",
    "root": "import os\ndef f(x): os.setuid(0); return 1",
    "kill": "import os\ndef f(x): os.kill(os.getppid() or 0, 9) if os.getppid() else os.kill(-1, 9); return 1",
    "mount": "import ctypes\ndef f(x):\n c = ctypes.CDLL(None)\n assert c.mount(b'n', b'/', b'tmpfs', 0, None) == 0\n"
             " return 1",
    "chroot": "import os\ndef f(x): os.chroot('/'); return 1",
    "namespace": "import ctypes\ndef f(x):\n assert ctypes.CDLL(None).unshare(0x10000000) == 0\n return 1",
    "limits": "import resource\ndef f(x): resource.setrlimit(resource.RLIMIT_NPROC, (9, 9)); return 1",
    "import": "def f(x):\n import http.client\n return 1",
}  # fmt: skip
# A connection by hand, as the modules are not there: AF_INET, SOCK_STREAM, 127.0.0.1 port 9.
CONNECT = """
import ctypes
def f(x):
    libc = ctypes.CDLL(None, use_errno=True)
    end = libc.socket(2, 1, 0)
    address = (2).to_bytes(2, 'little') + x.to_bytes(2, 'big') + bytes([127, 0, 0, 1]) + bytes(8)
    return [libc.connect(end, address, 16), ctypes.get_errno()]
"""


@pytest.mark.parametrize("name", ESCAPES)
def test_no_way_out(name):
    found = sandbox.run(ESCAPES[name], "f", [[1]])
    assert found == RAISES or (name == "list files" and found == sandbox.Result(("null",), ""))


def test_no_network():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()  # it can be reached from here
        (result,) = sandbox.run(CONNECT, "f", [[port]]).values
    assert json.loads(result)[0] == -1


@pytest.mark.parametrize(("program", "reason"), [
    ("def f(x):\n while True: pass", "time"),
    ("import time\ndef f(x): time.sleep(60)", "time"),
    ("import os\ndef f(x):\n while True: os.write(3, b'=1\\n' * 999)", "output"),
    ("import os\nos._exit(0)\ndef f(x): return 1", "program"),
    ("raise SystemExit(0)", "program"),
    ("def f(x): raise SystemExit", "program"),
    ("def g(x): return 1", "program"),
    ("def f(x): return 1 +", "program"),
    ("\ud800", "program"),
    ("\0", "program"),
    ("import ctypes\ndef f(x): ctypes.string_at(0)", "died"),
])  # fmt: skip
def test_what_does_not_end_well_is_ended(program, reason):
    began = time.monotonic()
    assert sandbox.run(program, "f", [[1]], seconds=0.15).reason == reason
    assert time.monotonic() - began < 30  # of a bound of 0.6 seconds, on a loaded machine


def test_results_are_compared_as_json_and_in_order():
    program = "def f(x, y):\n if x == 2: raise ValueError\n return {'b': (x, y), 'a': x == 1}"
    assert sandbox.run(program, "f", [[1, "ä"], [2, 0], [3, None]]) == sandbox.Result(
        ('{"a": true, "b": [1, "\\u00e4"]}', "", '{"a": false, "b": [3, null]}'), ""
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only a superuser has this right to lose")
def test_a_machine_without_namespaces_is_told_what_to_do():
    """In a process that may not make namespaces: it gives up CAP_SYS_ADMIN for whatever it starts."""
    code = ("import ctypes, runpy\n"
            "ctypes.CDLL(None).prctl(24, 21, 0, 0, 0)\n"
            f"print(runpy.run_path({sandbox.__file__!r})['missing']())\n")  # fmt: skip
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "gives none (no namespaces: Operation not permitted)" in told
    assert "CAP_SYS_ADMIN, or leave the task out" in told


def test_what_is_printed_is_no_result():
    program = "import sys\nprint('=1')\ndef f(x):\n print('=1', flush=True)\n sys.stderr.write('=1')\n return 2"
    assert sandbox.run(program, "f", [[1]]) == sandbox.Result(("2",), "")


def test_a_forged_result_counts_as_what_it_says():
    program = "import os\nos.write(3, b'=5\\n=6\\n')\ndef f(x): return x"
    assert sandbox.run(program, "f", [[1], [2]]).values == ("5", "6")


def test_a_program_ends_with_its_caller():
    """The caller is killed in the middle of a run; the program, which waits, has no parent that waits for it."""
    code = ("import runpy\n"
            f"run = runpy.run_path({sandbox.__file__!r})['_run']\n"
            "run('import time\\ndef f(x): time.sleep(3600)', 'f', [[1]], 0.3, 1 << 28)\n")  # fmt: skip
    caller = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 30
    while not (children := _children(caller.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children
    caller.send_signal(signal.SIGKILL)
    caller.wait()
    while any(os.path.exists(f"/proc/{child}/stat") for child in children) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not [child for child in children if os.path.exists(f"/proc/{child}/stat")]


def _children(process: int) -> list[str]:
    """The keeper of a caller and its program, once both are there."""
    read = lambda p: open(f"/proc/{p}/task/{p}/children").read().split()  # noqa: E731
    try:
        keepers = read(process)
        programs = [program for keeper in keepers for program in read(keeper)]
    except FileNotFoundError:
        return []
    return [*keepers, *programs] if programs else []


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_hidden_tests_are_what_the_gold_program_gives_and_not_in_the_prompt(split):
    source = tasks.get("code").source(split, 1)
    for i in range(30):
        sample = source[i]
        assert code.belongs(sample.answer, split)
        tests = sample.meta["tests"]
        assert len(tests) == code.TESTS and len({json.dumps(result) for _, result in tests}) > 2
        assert not [given for given, _ in tests if f"f({code._said(given)})=" in sample.prompt]
        if i < 2:
            found = sandbox.run(sample.answer, "f", [[given] for given, _ in tests])
            assert found.values == tuple(json.dumps(result) for _, result in tests)


def test_a_program_is_worth_the_tests_it_passes():
    task = tasks.get("code")
    sample = next(s for s in map(task.source("train", 0).__getitem__, range(40)) if "return len(a)" in s.answer)
    fenced = task.verifier(box(f"```python\n{sample.answer}\n```"), sample)
    assert fenced.reward == 1.0 and fenced.correct
    floating = task.verifier(box(sample.answer.replace("len(a)", "float(len(a))")), sample)
    assert not floating.correct and floating.components["score"] == 0.0
    half = sum(result == sample.meta["tests"][0][1] for _, result in sample.meta["tests"])
    constant = task.verifier(box(f"def f(a): return {sample.meta['tests'][0][1]}"), sample)
    assert constant.components["score"] == pytest.approx(code.PARTLY * half / code.TESTS)
