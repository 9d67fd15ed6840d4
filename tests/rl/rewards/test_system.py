"""The whole reward system: processes, judges over HTTP and comparisons behind one call.

The times are the requirement's: 64 answers, a judge that takes 0.2 s and 16 connections are four rounds, 0.8 s, and
have to be done in 1.3 s. The clock is the machine's, so the best of five tries counts.
"""

from __future__ import annotations

import asyncio
import collections
import threading
import time

import pytest
from PIL import Image

from glmv_jax.data.records import Sample
from glmv_jax.rl import tasks
from glmv_jax.rl.rewards import score
from glmv_jax.rl.rewards.config import of_tasks
from glmv_jax.rl.rewards.grade import Answered, Grade
from glmv_jax.rl.rewards.system import RewardSystem
from glmv_jax.rl.task import box
from glmv_jax.typing import UserError
from tests.rl.rewards.fake_judge import between, running, word

HERE = "tests.rl.rewards.hostile"
VERDICT = {"kind": "rule", "rule": f"{HERE}:verdict"}
# Math-Verify, issue 65: five to the five to the five to the five to the five
TOWER = "\\dfrac{5^{\\left(5^{\\left(5^{\\left(5^5\\right)}\\right)} - 4\\right)} - 5}{16}"
PICTURE = Image.new("RGB", (8, 8))


def sample(source: str, answer: str = "1", number: int = 0, **meta) -> Sample:
    return Sample(f"{source}/{number}", source, (PICTURE,), "How many?", answer, meta=meta)


def system(sources: dict, **options) -> RewardSystem:
    return RewardSystem({"sources": sources, "workers": 1, **options})


def gathered(rewards: RewardSystem, answered) -> list[Grade]:
    async def run():
        return await asyncio.gather(*(rewards.grade(a) for a in answered))

    return asyncio.run(run())


def judges(judge, **options):
    return {"main": {"url": judge.url, "model": "m", "backoff": 0.01, **options}}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def test_64_answers_with_a_slow_judge_in_four_rounds():
    source = {"free": {"parts": {"judge": {"kind": "judge", "judge": "main", "box": False, "images": False}}}}
    answered = [Answered(sample("free", number=n), "an essay") for n in range(64)]
    took = []
    with running(lambda body, n: 0.2) as judge, system(source, judges=judges(judge, connections=16)) as rewards:
        while len(took) < 5 and min(took, default=9.0) >= 1.3:
            begin = time.monotonic()
            grades = gathered(rewards, answered)
            took.append(time.monotonic() - begin)
            assert [g.reward for g in grades] == [1.0] * 64 and judge.most == 16
    assert 0.8 <= min(took) < 1.3, took


def test_an_expression_that_never_returns_and_an_endless_loop_cost_two_of_64():
    sources = {
        "maths": {"parts": {"rule": {"kind": "rule", "rule": "maths", "limit": 2.0}}},
        "own": {"parts": {"rule": {**VERDICT, "limit": 2.0}}},
    }
    answered = [Answered(sample("maths", "\\frac{1}{2}", n), box("0.5" if n % 2 else "2")) for n in range(31)]
    answered += [Answered(sample("own", number=n), str(n % 3 / 2)) for n in range(31)]
    answered[7:7] = [Answered(sample("maths", "\\dfrac{x - 5}{16}", 99), box(TOWER))]
    answered[40:40] = [Answered(sample("own", number=99), "loop")]
    with system(sources, workers=2) as rewards:
        grades = gathered(rewards, answered)
        counters = rewards.counters()
    for answer, grade in zip(answered, grades):
        if answer.sample.id in ("maths/99", "own/99"):
            assert grade == Grade(0.0, False, {}, ("timeout",))
        elif answer.source == "maths":
            assert (grade.correct, grade.flags) == (answer.text == box("0.5"), ())
        else:
            assert grade == Grade(float(answer.text), answer.text == "1.0", {"score": float(answer.text)})
    for name in sources:
        assert counters[name]["graded"] == 32 and counters[name]["timeout"] == 1 and "error" not in counters[name]
        assert counters[name]["seconds"] > 2.0


def test_whatever_a_verifier_does_the_others_are_graded():
    accidents = {"raise": "error", "die": "error", "exit": "error", "memory": "error", "nan": "nan", "inf": "nan",
                 "above": "error", "string": "error", "none": "error", "no number": "error"}  # fmt: skip
    texts = [text for name in accidents for text in (name, "1")]
    with system({"own": {"parts": {"rule": VERDICT}, "lowest": 0.0}}, memory_gb=2.0, limit=20.0) as rewards:
        grades = rewards.score([sample("own", number=n) for n in range(len(texts))], texts)
        counts = rewards.counters()["own"]
    for text, grade in zip(texts, grades):
        flags = (accidents[text],) if text in accidents else ()
        assert grade == Grade(float(not flags), not flags, {} if flags else {"score": 1.0}, flags)
    assert (counts["graded"], counts["error"], counts["nan"]) == (20, 8, 2)


def test_a_judge_that_cannot_be_had_is_data_too():
    source = {"free": {"parts": {"judge": {"kind": "judge", "judge": "main", "box": False}}, "lowest": -1.0}}
    with running(lambda body, n: 500) as judge:
        with system(source, judges=judges(judge, retries=1)) as rewards:
            grades = rewards.score([sample("free", number=n) for n in range(3)], ["a"] * 3)
            assert rewards.counters() == {
                "free": {"graded": 3, "error": 3, "seconds": rewards.counters()["free"]["seconds"]},
                "judge main": {"requests": 6, "retries": 3, "throttled": 0, "garbled": 0},
            }
            with pytest.raises(UserError, match="the judge main at http.*cannot be used.*500"):
                rewards.check()
    assert grades == [Grade(-1.0, False, {}, ("error",))] * 3


def test_a_judge_is_asked_only_where_the_rule_found_nothing():
    chart = {
        "parts": {
            "exact": {"kind": "rule", "rule": "number", "args": {"relative": 0.05}},
            "judge": {"kind": "judge", "judge": "main", "rubric": "Be kind."}, "style": {"kind": "style"},
        },
        "gate": ("style",), "how": "first", "order": ("exact", "judge"),
    }  # fmt: skip
    texts = [box("41"), box("40 of them"), box("many") + " 很多很多很多很多", box("50")]
    with running(lambda body, n: f"VERDICT {word(body)} {8 if 'of them' in between(body, 'ANSWER') else 1}") as judge:
        with system({"chart": chart}, judges=judges(judge)) as rewards:
            grades = rewards.score([sample("chart", "40", n) for n in range(4)], texts)
    assert [g.reward for g in grades] == [1.0, 0.8, 0.0, 0.1]
    assert [g.correct for g in grades] == [True, True, False, False]
    assert [len(judge.bodies), grades[2].flags, grades[0].components["format"]] == [2, ("mixed_language",), 1.0]


def test_the_environments_own_reward():
    source = {"gui": {"parts": {"done": {"kind": "environment", "low": -1.0, "high": 1.0}}}}
    rewards = {1.0: 1.0, -1.0: 0.0, 0.0: 0.5, 3.0: 1.0, None: "error", float("nan"): "nan", float("inf"): "nan"}
    with system(source) as graders:
        found = gathered(graders, [Answered(None, "", reward, "gui") for reward in rewards])
    for grade, wanted in zip(found, rewards.values()):
        assert grade.flags == (wanted,) if isinstance(wanted, str) else grade.reward == wanted
    assert [g.correct for g in found] == [True, False, False, True, False, False, False]


def test_rules_get_pictures_only_when_they_ask():
    sources = {name: {"parts": {"rule": {"kind": "rule", "rule": f"{HERE}:imported", "images": name == "seen"}}}
               for name in ("seen", "unseen")}  # fmt: skip
    with system(sources) as rewards:
        assert [g.correct for g in rewards.score([sample("seen"), sample("unseen")], ["", ""])] == [False, True]
        (grade,) = gathered(rewards, [Answered(None, "", 1.0, "seen")])
    assert grade.flags == ("error",), "a rule cannot grade without a sample"


def test_tasks_are_graded_as_by_their_own_verifiers():
    """The synchronous stage's `score`, in this process, and the system's, in workers, say the same."""
    samples = [tasks.get(name).source("train", 3)[i] for name in ("count", "name", "ground") for i in range(4)]
    texts = [box(s.answer) if i % 2 else s.answer + "?" for i, s in enumerate(samples)]
    with RewardSystem(of_tasks(["count", "name", "ground"], workers=1)) as rewards:
        assert rewards.score(samples, texts) == score(samples, texts, tasks.verifiers())
    assert collections.Counter(g.reward for g in score(samples, texts, tasks.verifiers())) == {1.0: 6, 0.0: 6}


def test_every_task_is_graded_in_workers_as_here():
    """Gold answers of all tasks, and wrong ones; programs and pages in processes of the workers' own."""
    names = list(tasks.verifiers())
    samples = [sample for name in names for sample in [tasks.source(name, "train", 5)[0]] * 2]
    texts = [box(s.answer if i % 2 else s.answer[: len(s.answer) // 2]) for i, s in enumerate(samples)]
    with RewardSystem(of_tasks(names, workers=1, limit=30.0)) as rewards:
        grades = rewards.score(samples, texts)
    assert [g for g, s in zip(grades[1::2], samples[1::2]) if not g.correct or g.reward != 1.0] == []
    assert grades == score(samples, texts, tasks.verifiers())


def test_a_task_for_a_judge_is_graded_by_its_rubric():
    """The judge is given rubric, picture and reference; a box in an answer, or an endless one, costs it all."""
    sample = tasks.source("captioning", "train", 0)[0]

    def reply(body, number):
        assert tasks.get("captioning").rubric in body["messages"][0]["content"]
        assert between(body, "REFERENCE") == sample.answer and between(body, "QUESTION") == sample.prompt
        kinds = [part["type"] for part in body["messages"][1]["content"]]
        assert kinds == ["image_url"] * len(sample.images) + ["text"]
        return f"VERDICT {word(body)} {len(between(body, 'ANSWER'))}"

    texts = ["a circle", "a cat", box("a circle"), "a circle " * 200]
    with running(reply) as judge:
        with RewardSystem(of_tasks(["captioning", "count"], judge="main", judges=judges(judge), workers=1)) as rewards:
            grades = rewards.score([sample] * 4, texts)
        assert len(judge.bodies) == 2
    assert [g.reward for g in grades] == [0.8, 0.5, 0.0, 0.0] and [g.correct for g in grades] == [True] + [False] * 3
    with pytest.raises(UserError, match="task captioning is graded by a model: name a judge, or leave the task out"):
        of_tasks(["count", "captioning"])
    with pytest.raises(UserError, match="task 'cuont' does not exist; nearest: count"):
        of_tasks(["cuont"])


# --- groups -----------------------------------------------------------------------------------------------------------


def drawing(**options):
    comparator = {"kind": "rule", "rule": f"{HERE}:nearer"}
    group = {"comparator": comparator, "render": f"{HERE}:grey", "limit": 20.0, **options}
    return {"draw": {"parts": {}, "group": group}}


def test_groups_are_rendered_and_compared_in_workers():
    texts = ["90", "100", "bad", "80", "110", "raise"]
    with system(drawing()) as rewards:
        assert rewards.needs_group("draw")
        grades = rewards.score([sample("draw", "100")] * 6, texts)
    assert [g.reward for g in grades] == [2.5, 4.0, -1.0, 1.0, 2.5, -1.0]
    assert [g.correct for g in grades] == [True, True, False, True, True, False]
    assert [g.flags for g in grades] == [(), (), ("no_render",), (), (), ("no_render",)]
    assert grades[0].components == {"render": 1.0}


def test_polishing_begins_with_the_version_before():
    with system(drawing(polish=True)) as rewards:
        polished = rewards.score([sample("draw", "100", previous="85")] * 3, ["80", "90", "100"])
        (lost,) = rewards.score([sample("draw", "100", previous="bad")], ["80"])
    assert [g.reward for g in polished] == [0.0, 1.0, 2.0]
    assert lost == Grade(0.0, False, {}, ("error",))


def test_two_tasks_of_a_batch_are_two_groups_and_parts_may_be_graded_before():
    """As an episode's completion does: its parts at once, the comparison when the last of the group is there."""
    source = drawing()
    source["draw"]["parts"] = {"rule": {"kind": "rule", "rule": f"{HERE}:fixed", "args": {"value": 1.0}}}
    a, b = sample("draw", "100", 0), sample("draw", "0", 1)
    with system(source) as rewards:
        assert [g.reward for g in rewards.score([a, a, b, b], ["90", "100"] * 2)] == [1.0, 2.0, 2.0, 1.0]
        answered = [Answered(a, text) for text in ("90", "100")]
        parts = gathered(rewards, answered)
        assert parts == [Grade(1.0, True, {"score": 1.0})] * 2
        whole = asyncio.run(rewards.grade_group(answered, parts))
        parts[1] = Grade(0.0, False, {}, ("timeout",))
        torn = asyncio.run(rewards.grade_group(answered, parts))
        assert rewards.counters()["draw"]["graded"] == 6 and rewards.counters()["draw"]["grouped"] == 8
    assert [g.reward for g in whole] == [1.0, 2.0] and whole[0].components == {"score": 1.0, "render": 1.0}
    assert [g.reward for g in torn] == [1.0, -1.0] and torn[1].flags == ("timeout", "no_render")


def test_groups_compared_by_a_judge():
    """The judge thinks long answers good, and is shown both in one request."""

    def reply(body, n):
        lengths = [len(between(body, name)) for name in "AB"]
        return f"A or B? VERDICT?\nVERDICT {word(body)} {lengths[0]} {lengths[1]}"

    group = {"comparator": {"kind": "judge", "judge": "main", "images": False}, "form": "equation9"}
    with running(reply) as judge, system({"draw": {"group": group}}, judges=judges(judge)) as rewards:
        grades = rewards.score([sample("draw")] * 4, ["xx", "xxxx", "x", "x"])
    assert [g.reward for g in grades] == [2.0, 3.0, 0.0, 0.0] and len(judge.bodies) == 6


def test_a_comparator_that_breaks_gives_nothing():
    source = drawing(render=None)
    with system(source) as rewards:
        grades = rewards.score([sample("draw", "0")] * 3, ["breaks", "1", "2"])
    assert [g.reward for g in grades] == [1.0, 2.0, 1.0] and {g.flags for g in grades} == {("no_comparison",)}


# --- around it --------------------------------------------------------------------------------------------------------


def test_mistakes_stop_at_once():
    with system({"count": {"parts": {"rule": VERDICT}}}) as rewards:
        with pytest.raises(UserError, match="no rewards for data source 'cuont'; nearest: count"):
            rewards.score([sample("cuont")], ["x"])
        with pytest.raises(ValueError, match="1 samples but 2 answers"):
            rewards.score([sample("count")], ["x", "y"])
    with pytest.raises(UserError, match="no rule 'nunber'; nearest: number"):
        system({"count": {"parts": {"rule": {"kind": "rule", "rule": "nunber"}}}})
    with pytest.raises(UserError, match="rewards: no key 'worker'; nearest: workers"):
        RewardSystem({"worker": 1})
    with system({"count": {"parts": {"rule": {"kind": "rule", "rule": "tasks/cuont"}}}}) as rewards:
        with pytest.raises(UserError, match="task 'cuont' does not exist; nearest: count"):
            rewards.score([sample("count")], ["x"])


def test_closing_cancels_what_is_being_graded_and_leaves_no_thread():
    before = set(threading.enumerate())
    with running(lambda body, n: 30.0) as judge:
        source = {"free": {"parts": {"judge": {"kind": "judge", "judge": "main", "box": False}}}}
        rewards = system(source, judges=judges(judge))

        async def run():
            task = asyncio.create_task(rewards.grade(Answered(sample("free"), "a")))
            while not judge.bodies:
                await asyncio.sleep(0.01)
            rewards.close()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(run())
        rewards.close()
    assert set(threading.enumerate()) <= before | {threading.current_thread()}
