"""What holds of every registered task: its grader pays for the gold answer and for nothing else, no string makes it
raise, its samples are sound. A new task is tested here by being registered. Careless graders are caught by that check.

Not covered: whether a person can answer from the picture; pictures were looked at by hand (`glmv tasks --html`).
"""

from __future__ import annotations

import collections
import functools
import json
import pickle
import random
import sys

import pytest

from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.questions import DESCRIPTIONS, KINDS
from glmv_jax.data.tokenizer import SPECIALS, Tokenizer
from glmv_jax.rl import tasks
from glmv_jax.rl.prompts import prompts
from glmv_jax.rl.rewards import boxed, geometry, text
from glmv_jax.rl.rewards.grade import RIGHT, WRONG, Grade
from glmv_jax.rl.task import LOW, Task, box
from glmv_jax.rl.tasks import visual
from glmv_jax.train.stages.vlm_measures import held_out
from glmv_jax.typing import UserError

SPLITS = ("train", "heldout")
RULED = [name for name, task in tasks.TASKS.items() if not task.rubric]
TOKENIZER = Tokenizer()
NANO = DocumentBuilder(TOKENIZER, Patcher(max_patches=96), max_tokens=288, max_patches=512)
# Samples of tasks whose grading starts a process or draws a picture.
FEW = {"code": 4, "svg": 20, "ui_code": 4}


@functools.cache
def samples(name: str, split: str) -> tuple:
    if reason := tasks.get(name).missing():
        pytest.skip(reason)
    source = tasks.source(name, split, 3)
    return tuple(source[i] for i in range(FEW.get(name, 40)))


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", tasks.TASKS)
def test_the_grader_pays_for_the_gold_answer_only(name, split):
    samples(name, split)  # skips where an extra is missing
    tasks.get(name).validate(count=FEW.get(name, 80) // 4, split=split)


@pytest.mark.parametrize("name", tasks.TASKS)
def test_samples_are_sound(name):
    """Random access, complete, in the splits they say, and such as worker processes and logs can take."""
    seen = {}
    for split in SPLITS:
        source = pickle.loads(pickle.dumps(tasks.source(name, split, 3)))
        for i, sample in enumerate(samples(name, split)):
            assert (sample.id, sample.source) == (f"{name}/{split}/{i}", name)
            assert sample.prompt and sample.answer and json.loads(json.dumps(sample.meta)) is not None
            assert all(picture.mode == "RGB" and min(picture.size) >= 16 for picture in sample.images)
            assert not any(special in sample.prompt + sample.answer for special in SPECIALS)
        for i in (len(samples(name, split)) - 1, 1):  # out of order
            again, sample = source[i], samples(name, split)[i]
            assert (again.prompt, again.answer, again.meta) == (sample.prompt, sample.answer, sample.meta)
            assert [p.tobytes() for p in again.images] == [p.tobytes() for p in sample.images]
        seen[split] = {(s.prompt, *(p.tobytes() for p in s.images)) for s in samples(name, split)}
        assert len(seen[split]) >= 0.9 * len(samples(name, split)), "one in ten samples is the same as another"
    assert not seen["train"] & seen["heldout"]
    assert tasks.source(name, "train", 4)[0] != samples(name, "train")[0]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_gold_answers_can_be_said_in_a_nano_row(name):
    """Question, pictures and answer fit 288 tokens and the answer survives the shipped vocabulary."""
    for sample in samples(name, "train"):
        assert not NANO.too_long(NANO.chat(sample)), sample.id
        if name in RULED:
            said = TOKENIZER.decode(TOKENIZER.encode(sample.answer))
            assert tasks.get(name).verifier(box(said), sample).correct, sample.id


def mutated(gold: str, rng: random.Random) -> str:
    """A gold answer with characters lost, doubled or exchanged, parts said twice, signs and digits of other scripts."""
    text = list(gold)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(len(text))
        odd = rng.choice("[]{}()<>,.:;-+eE0123456789 \n\t\0\u202e\ud800٣９½“\"'`\\")
        text[at] = rng.choice(("", text[at] * 2, odd, odd * 9, "".join(text[:at]), text[at] + "9" * 40))
    return "".join(text)


def hostile(rng: random.Random, golds: list[str], prompt: str) -> list[str]:
    """Strings that a policy may come to write: random ones of many alphabets, gold answers cut, joined and broken."""
    alphabets = ["[](),.0123456789- ", "<>/tablerd =\"'&;", "\\{}^_frac sqrt$xy12", "是否有没 红色圆形",
                 "\x00\ud800\u202e\uffff٣۴½", "{}\":,[]abc_23d0.9eE+-", "".join(map(chr, range(32, 127)))]  # fmt: skip
    drawn = ["".join(rng.choice(alphabet) for _ in range(rng.randint(1, 120))) for alphabet in alphabets]
    gold = rng.choice(golds)
    at = rng.randrange(len(gold))
    drawn += [gold[:at], gold[at:], gold[:at] + rng.choice("[<{\\-9\x00") + gold[at:], gold.replace("0", "-"), gold * 3,
              gold.replace("1", "1e999"), gold.replace(",", ",,"), prompt, f"{prompt} {gold}", gold[::-1]]  # fmt: skip
    drawn += [mutated(gold, rng) for _ in range(8)]
    drawn += ["[" * 500, "<table>" * 70, "{" * 500, "\\frac" * 100, "9" * 500, "[[" + "9," * 200, "<td>" * 120]
    return drawn + ["(" * 250 + ")" * 250, "\\sqrt{" * 80, "-" * 511, "[[1,1,1,1,1,1,1,1,1]]" + ",[1]" * 100]


@pytest.mark.parametrize("name", RULED)
def test_no_string_makes_a_grader_raise(name):
    rng, verify = random.Random(name), tasks.get(name).verifier
    golds = [sample.answer for sample in samples(name, "train")]
    for sample in samples(name, "train")[: 1 if name in FEW else 12]:
        for content in hostile(rng, golds, sample.prompt)[:: 4 if name in FEW else 1]:
            for answer in (box(content), content, f"<think>{content}</think>{box(content)}"):
                grade = verify(answer, sample)
                assert grade == verify(answer, sample) and 0.0 <= grade.reward <= 1.0
                assert not grade.correct or grade.reward > LOW
        grade = verify(box(sample.prompt), sample)
        assert not grade.correct and grade.reward <= LOW, f"{sample.id}: a copy of the question is paid {grade}"


@pytest.mark.parametrize("name", RULED)
def test_no_constant_answer_is_worth_much(name):
    """The answer that pays best when it is given to every question of its language: chance, and no more."""
    for lang in ("en", "zh"):
        asked = [s for split in SPLITS for s in samples(name, split) if s.meta.get("lang", "en") == lang]
        if len(asked) < 10:
            continue
        common = [gold for gold, _ in collections.Counter(s.answer for s in asked).most_common(6)]
        for gold in common:
            right = sum(tasks.get(name).verifier(box(gold), sample).correct for sample in asked) / len(asked)
            assert right <= 0.66, f"{gold!r} is right for {right:.0%} of {len(asked)} questions"


def test_every_question_with_an_answer_to_check_is_a_task():
    asked = {task.name for task in tasks.TASKS.values() if task.make is None}
    assert asked == set(KINDS) - set(DESCRIPTIONS)


def test_a_task_for_a_judge_says_that_none_is_set():
    """It raises rather than pay or punish by a rule; it has a reference, unboxed, that a judge can hold answers to."""
    (name,) = [name for name, task in tasks.TASKS.items() if task.rubric]
    sample = samples(name, "train")[0]
    assert sample.answer and not sample.boxed
    with pytest.raises(UserError, match=f"{name} is graded by a model and no judge is set"):
        tasks.get(name).verifier("a red circle", sample)
    with pytest.raises(UserError, match=f"task {name} is graded by a model and no judge is set"):
        tasks.verifiers(["count", name])
    assert set(tasks.verifiers()) == {name for name in RULED if not tasks.get(name).missing()}


def mentions(content, sample):
    """The classic mistake: the gold answer somewhere in the text is enough."""
    return RIGHT if sample.answer in content else WRONG


def unboxed(answer_text, sample):
    return Grade(1.0, True, {}) if sample.answer in answer_text else Grade(0.0, False, {})


@pytest.mark.parametrize("task", [
    Task("count", boxed(mentions), visual.other_numbers),
    Task("spatial", boxed(mentions), visual.choices),
    Task("read", unboxed, visual.misread),
    Task("read", boxed(text.exact, format_weight=0.6)),
    Task("ground", boxed(geometry.boxes(threshold=0.01, graded=0.0)), visual.showers),
    Task("point", boxed(geometry.point(reach=1e9, graded=1.0)), visual.scattered),
    Task("count", boxed(lambda content, sample: WRONG)),
], ids=lambda task: task.name)  # fmt: skip
def test_careless_graders_are_caught(task):
    with pytest.raises(ValueError, match=rf"{task.name}/train/\d+: the (gold|wrong) answer"):
        task.validate(count=60)


def test_unknown_tasks_are_named():
    with pytest.raises(UserError, match="task 'cuont' does not exist; nearest: count"):
        tasks.verifiers(["cuont"])
    with pytest.raises(UserError, match="split 'test' of task line"):
        tasks.source("line", "test")


def test_every_task_can_be_asked_at_nano_size(tmp_path):
    """Prompt rows of all tasks together, text alone and several pictures among them; no record is broken."""
    names = [name for name, task in tasks.TASKS.items() if not task.missing()]
    log = tmp_path / "faults.jsonl"
    rows = prompts({name: 1.0 for name in names}, NANO, batch=64, faults=str(log))
    asked = [sample for _ in range(2) for sample in next(rows)["samples"]]
    rows.close()
    assert not log.exists() and {sample.source for sample in asked} >= set(names)
    assert {len(sample.images) for sample in asked} >= {0, 1, 2}
    assert set(held_out(names, 1)) == set(names)


def test_what_this_machine_lacks_is_told_before_anything_is_graded(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert set(tasks.verifiers(["count", "svg"])) == {"count", "svg"}
    with pytest.raises(UserError, match="Chromium"):
        tasks.verifiers(["count", "ui_code"])
    assert "ui_code" not in tasks.verifiers() and "svg" in tasks.verifiers()


def test_reasoning_names_the_extra_that_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(UserError, match=r"needs reasoning-gym; pip install 'glmv_jax\[rl\]', or use riddle"):
        tasks.source("reasoning", "train")[0]
    with pytest.raises(UserError, match="needs reasoning-gym"):
        tasks.verifiers(["count", "reasoning"])
