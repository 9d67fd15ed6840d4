"""Worker processes: the same items in order, errors come through, none outlives a killed run."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from glmv_jax.data.stream import Stream, UniqueBatchIterDataset, Workers, prefetched
from glmv_jax.typing import UserError


class Squares:
    """Squares, or an error at one index."""

    def __init__(self, length: int, broken: int = -1):
        self.length, self.broken = length, broken

    def __len__(self):
        return self.length

    def __getitem__(self, i: int):
        if i == self.broken:
            raise UserError("record is broken; mend it")
        return i * i


class Keyed:
    """Rows with ten keys that come again and again."""

    def __len__(self):
        return 10**6

    def __getitem__(self, i: int):
        return {"key": np.int32(i * i // 3 % 10), "index": np.int32(i)}


def test_workers_give_the_same_items_in_order_and_pass_errors_on():
    alone = list(Stream(Squares(25)))
    assert alone == [i * i for i in range(25)]
    iterator = iter(Stream(Squares(25, broken=23), workers=2, chunk=4))
    assert [next(iterator) for _ in range(10)] == alone[:10]
    assert iterator.get_state() == {"next_index": 10}
    with pytest.raises(UserError, match="record is broken"):
        for _ in range(20):
            next(iterator)
    iterator.set_state({"next_index": 5})
    assert next(iterator) == 25
    start = time.monotonic()
    iterator.close()
    assert time.monotonic() - start < 5


class Process:
    """The number of the process that an item is made in, and the item."""

    def __init__(self, first: int):
        self.first = first

    def __len__(self):
        return 10**6

    def __getitem__(self, i: int):
        return os.getpid(), self.first + i


def test_streams_share_processes_until_the_last_is_closed():
    workers = Workers(1)
    one, two = (iter(Stream(Process(first), workers, chunk=3)) for first in (0, 1000))
    made = [next(stream) for _ in range(4) for stream in (one, two)]
    assert [item for _, item in made] == [0, 1000, 1, 1001, 2, 1002, 3, 1003]
    (pid,) = {pid for pid, _ in made}
    assert pid != os.getpid()
    one.set_state({"next_index": 7})
    assert next(two) == (pid, 1004) and next(one) == (pid, 7)
    one.close()
    assert [next(two) for _ in range(10)] == [(pid, 1005 + n) for n in range(10)]
    two.close()
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(pid)
    assert next(one)[1] == 8, "and start again"
    one.close()


def test_prefetched_state_is_that_of_the_batch_returned():
    iterator = prefetched(Stream(Squares(25)), ahead=4)
    assert iterator.get_state() == {"next_index": 0}
    assert [next(iterator) for _ in range(3)] == [0, 1, 4]
    time.sleep(0.1)  # the thread has gone on by now
    state = iterator.get_state()
    assert state == {"next_index": 3}
    assert next(iterator) == 9
    iterator.set_state(state)
    assert next(iterator) == 9
    iterator.close()


def test_unique_batches():
    rows = iter(UniqueBatchIterDataset(Stream(Keyed()), 8, "key"))
    state = rows.get_state()
    batches = [next(rows) for _ in range(20)]
    for batch in batches:
        assert len(set(batch["key"])) == 8
    rows.set_state(state)
    np.testing.assert_equal(next(rows), batches[0])
    with pytest.raises(UserError, match="lower the batch size"):
        next(iter(UniqueBatchIterDataset(Stream(Keyed()), 11, "key")))


KILLED = """
    import multiprocessing, time
    from glmv_jax.data.stream import Stream
    if __name__ == "__main__":
        iterator = iter(Stream(range(10**6), workers=1))
        next(iterator)
        print(*(p.pid for p in multiprocessing.active_children()), flush=True)
        time.sleep(60)
"""


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and that nobody has waited for yet does not."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not pathlib.Path("/proc/self/stat").exists(), reason="looks into /proc")
def test_workers_end_when_the_run_is_killed(tmp_path):
    (tmp_path / "run.py").write_text(textwrap.dedent(KILLED))
    root = str(pathlib.Path(__file__).parents[2])
    environment = os.environ | {"PYTHONPATH": root}
    run = subprocess.Popen([sys.executable, tmp_path / "run.py"], stdout=subprocess.PIPE, env=environment, text=True)
    workers = [int(pid) for pid in run.stdout.readline().split()]
    assert workers and all(map(_alive, workers))
    run.send_signal(signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 10
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, workers))
