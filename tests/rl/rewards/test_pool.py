"""Workers that are killed: every accident that a verifier can have costs its own call and nothing else.

Not covered: other systems than Linux.
"""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards import rules
from glmv_jax.rl.rewards.grade import Grade
from glmv_jax.rl.rewards.pool import Pool, RuleError
from glmv_jax.typing import UserError

HERE = "tests.rl.rewards.hostile"
VERDICT = rules.spec(f"{HERE}:verdict")
PID, NAP = rules.function(f"{HERE}:pid"), rules.function(f"{HERE}:nap")
CHILD = rules.function(f"{HERE}:child")
IMPORTED = rules.spec(f"{HERE}:imported")
FAILS = rules.function(f"{HERE}:fails_to_build", {})
SAMPLE = Sample("s/0", "s", (), "?", "1")
GOOD = Grade(1.0, True, {"score": 1.0})


@pytest.fixture(scope="module")
def pool():
    with Pool([VERDICT, PID, NAP, IMPORTED], workers=1, memory=2 * 2**30) as pool:
        pool.submit(PID, limit=60).result()
        yield pool


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for yet does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(pids, seconds=10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not any(map(alive, pids))


@pytest.mark.parametrize("answer", ["raise", "exit", "tell", "untellable", "memory", "die"])
def test_a_call_that_fails_costs_only_itself(pool, answer):
    with pytest.raises(RuleError) as error:
        pool.submit(VERDICT, answer, SAMPLE, limit=20).result()
    assert len(str(error.value)) < 500
    assert pool.submit(VERDICT, "1", SAMPLE, limit=20).result() == GOOD


@pytest.mark.parametrize(("answer", "flag"), [
    ("nan", "nan"), ("inf", "nan"), ("inner nan", "nan"), ("above", "error"), ("string", "error"), ("name", "error"),
    ("flags", "error"), ("none", "error"), ("closure", "error"),
])  # fmt: skip
def test_a_bad_verdict_does_not_leave_the_worker(pool, answer, flag):
    found, reason = pool.submit(VERDICT, answer, SAMPLE, limit=20).result()
    assert found == flag and len(reason) < 300
    assert pool.submit(VERDICT, "0.5", SAMPLE, limit=20).result() == Grade(0.5, False, {"score": 0.5})


def test_a_call_that_hangs_in_the_interpreter_asleep_or_in_c_is_killed():
    with Pool([VERDICT, PID], workers=1) as pool:
        for answer in ("power", "loop"):
            first = pool.submit(PID, limit=60).result()
            begin = time.monotonic()
            with pytest.raises(TimeoutError):
                pool.submit(VERDICT, answer, SAMPLE, limit=0.3).result()
            assert time.monotonic() - begin < 5.0 and not alive(first)
        assert pool.submit(VERDICT, "1", SAMPLE, limit=60).result() == GOOD


def test_a_worker_serves_many_calls_and_waiting_is_not_charged(pool):
    begin = time.monotonic()
    calls = [pool.submit(NAP, 0.1, limit=1.0) for _ in range(12)]
    assert [call.result() for call in calls] == [0.1] * 12 and time.monotonic() - begin > 1.15
    assert len({pool.submit(PID, limit=20).result() for _ in range(20)}) == 1


def test_a_worker_imports_no_trainer_and_none_of_its_parents_modules(pool):
    assert "pytest" in sys.modules
    assert pool.submit(IMPORTED, "", SAMPLE, limit=20).result() == Grade(0.0, True, {})


def test_one_that_died_between_calls_is_replaced_without_harm(pool):
    before = pool.submit(PID, limit=20).result()
    os.kill(before, signal.SIGKILL)
    assert gone([before])
    assert pool.submit(PID, limit=60).result() != before


def test_functions_that_cannot_be_built_are_the_users_to_mend():
    with Pool([FAILS], workers=2) as pool:
        with pytest.raises(UserError, match="no reward worker starts.*fails_to_build.*no such library"):
            pool.submit(FAILS, limit=1).result()
    with pytest.raises(ValueError, match="none of the pool's functions"):
        pool.submit(PID, limit=1)
    with pytest.raises(UserError, match="workers=0"):
        Pool([PID], workers=0)


def test_closing_ends_calls_in_hand_and_those_that_wait():
    pool = Pool([PID, NAP], workers=1)
    (worker,) = {pool.submit(PID, limit=60).result()}
    running, waiting = pool.submit(NAP, 60.0, limit=60), pool.submit(NAP, 60.0, limit=60)
    while not running.running():
        time.sleep(0.01)
    pool.close()
    assert gone([worker]) and waiting.cancelled() and isinstance(running.exception(), RuleError)
    assert pool.submit(PID, limit=1).cancelled() and pool.pids() == []


KILLED = """
    import time
    from glmv_jax.rl.rewards import rules
    from glmv_jax.rl.rewards.pool import Pool
    where = "tests.rl.rewards.hostile"
    verdict, pid, child = rules.spec(f"{where}:verdict"), *(rules.function(f"{where}:{n}") for n in ("pid", "child"))
    pool = Pool([verdict, pid, child], workers=1)
    print(pool.submit(pid, limit=60).result(), pool.submit(child, limit=60).result(), flush=True)
    pool.submit(verdict, "power", None, limit=600)
    time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_nothing_outlives_a_parent_that_is_killed(tmp_path):
    """Not a worker inside a call that never lets go of the interpreter, nor what an earlier call has started.

    The script has no guard for `__main__`, and needs none.
    """
    (tmp_path / "run.py").write_text(textwrap.dedent(KILLED))
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[3])}
    run = subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, env=environment, text=True)
    worker, child = map(int, run.stdout.readline().split())
    deadline = time.monotonic() + 10
    while "R" not in pathlib.Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[0]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.1)
    assert alive(worker) and alive(child)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert gone([worker, child])


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_a_rule_has_started_ends_with_its_worker():
    with Pool([VERDICT, CHILD], workers=1) as pool:
        first = pool.submit(CHILD, limit=60).result()
        with pytest.raises(RuleError):
            pool.submit(VERDICT, "die", SAMPLE, limit=60).result()
        second = pool.submit(CHILD, limit=60).result()
        assert gone([first]) and alive(second)
    assert gone([second])
