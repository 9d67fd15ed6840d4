"""Broken records are skipped, logged and counted; broken sources and bugs end the run."""

from __future__ import annotations

import json

import pytest

from glmv_jax.data.faults import TRIES, FaultLog, Guarded
from glmv_jax.typing import UserError


class Records:
    """Indices as records; those in `broken` raise."""

    def __init__(self, length: int, broken=(), error: Exception | None = None):
        self.length, self.broken = length, set(broken)
        self.error = error or OSError("image file is truncated")

    def __len__(self):
        return self.length

    def __getitem__(self, i: int):
        if i in self.broken:
            raise self.error
        return f"record/{i}", i


def guarded(records, tmp_path, transform=lambda record, rng: record[1], **options) -> Guarded:
    log = FaultLog(tmp_path / "run" / "faults.jsonl")
    return Guarded(records, transform, name="photos", seed=0, log=log, **options)


def test_a_broken_record_is_replaced_by_the_next(tmp_path):
    source = guarded(Records(10, {3, 4, 9}), tmp_path)
    assert [source[i] for i in range(10)] == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0]
    assert source.faults == 4
    lines = [json.loads(line) for line in (tmp_path / "run" / "faults.jsonl").read_text().splitlines()]
    assert [(f["source"], f["index"], f["id"]) for f in lines] == [("photos", i, f"photos/{i}") for i in (3, 4, 4, 9)]
    assert lines[0]["reason"] == "OSError: image file is truncated"
    assert source.log.counts() == {"photos": 3}  # index 4 was met twice


def test_a_transform_that_fails_is_logged_with_the_records_id(tmp_path):
    def transform(record, rng):
        if record[1] == 2:
            raise UserError("an image is too thin")
        return record[1]

    source = guarded(Records(5), tmp_path, transform)
    assert source[2] == 3
    assert '"id": "record/2"' in source.log.path.read_text()


def test_randomness_belongs_to_the_index_that_was_used(tmp_path):
    draw = guarded(Records(10), tmp_path, lambda record, rng: rng.random())
    holes = guarded(Records(10, {4}), tmp_path, lambda record, rng: rng.random())
    assert len({draw[i] for i in range(10)}) == 10
    assert holes[4] == draw[5] and draw[3] == draw[3]


def test_too_many_faults_end_the_run(tmp_path):
    source = guarded(Records(10**6, range(0, 10**6, 10)), tmp_path, window=100, limit=0.05)
    with pytest.raises(UserError, match=r"of the last 100 records of source 'photos' failed.*truncated.*faults.jsonl"):
        for i in range(200):
            source[i]
    fine = guarded(Records(10**6, range(0, 10**6, 50)), tmp_path, window=100, limit=0.05)
    assert [fine[i] for i in range(49, 52)] == [49, 51, 51]
    for i in range(500):
        fine[i]


def test_a_source_that_always_fails_stops_early(tmp_path):
    with pytest.raises(UserError, match=f"{TRIES} records of source 'photos' in a row failed"):
        guarded(Records(100, range(100)), tmp_path)[0]


@pytest.mark.parametrize("bug", [AttributeError("typo"), NameError("typo"), AssertionError(), MemoryError()])
def test_bugs_are_not_data(tmp_path, bug):
    with pytest.raises(type(bug)):
        guarded(Records(10, {0}, bug), tmp_path)[0]


def test_without_a_file_faults_go_to_standard_error(capsys):
    assert Guarded(Records(3, {0}), lambda record, rng: record[1], name="n", seed=0, log=FaultLog())[0] == 1
    assert '"id": "n/0"' in capsys.readouterr().err
    assert FaultLog().counts() == {}
