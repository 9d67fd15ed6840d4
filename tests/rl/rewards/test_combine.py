"""What several verdicts make of one answer, and how strictly a configuration of them is read."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from ml_collections import ConfigDict

from glmv_jax import config as configs
from glmv_jax.data.records import Sample
from glmv_jax.rl.rewards import config
from glmv_jax.rl.rewards.combine import Combination
from glmv_jax.rl.rewards.grade import Answered, Grade
from glmv_jax.typing import UserError

ANSWER = Answered(Sample("s/0", "s", (), "?", "!"), "x")
RIGHT, HALF, WRONG = Grade(1.0, True, {"format": 1.0}), Grade(0.5, False, {"format": 0.5}), Grade(0.0, False, {})
LATE, STYLED = Grade(0.0, False, {}, ("timeout",)), Grade(1.0, True, {"style": 1.0})


def combined(combination: Combination, **grades: Grade) -> tuple[Grade, list[str]]:
    """The grade, and which parts were asked."""
    asked = []

    def part(name):
        async def ask(answered):
            assert answered is ANSWER
            asked.append(name)
            return grades[name]

        return ask

    combination.check("s", tuple(grades))
    return asyncio.run(combination.grade({name: part(name) for name in grades}, ANSWER)), asked


def test_one_part_is_handed_on_as_it_is():
    for grade in (RIGHT, HALF, Grade(0.1, False, {"score": 0.0, "format": 1.0}, ("no_box",))):
        assert combined(Combination(), rule=grade)[0] is grade


def test_weighted_sum():
    grade, asked = combined(Combination(weights=(("a", 0.75), ("b", 0.25))), a=HALF, b=RIGHT)
    assert (grade.reward, grade.correct) == (0.625, False) and sorted(asked) == ["a", "b"]
    assert grade.components == {"a": 0.5, "b": 1.0, "a/format": 0.5, "b/format": 1.0, "format": 0.5}
    assert combined(Combination(), a=HALF, b=RIGHT)[0].reward == 0.75
    careless = Grade(0.0, False, {}, ("repetition",))
    styled, _ = combined(Combination(manner=frozenset({"style"})), a=RIGHT, style=careless)
    assert (styled.reward, styled.correct, styled.flags) == (0.5, True, ("repetition",))


def test_the_smallest():
    assert combined(Combination("min"), a=RIGHT, b=HALF)[0].reward == 0.5
    assert combined(Combination("min"), a=RIGHT, b=RIGHT)[0].correct


def test_a_gate_that_is_shut_asks_no_further():
    gated = Combination(gate=("style", "form"), lowest=-0.5)
    grade, asked = combined(gated, judge=RIGHT, form=RIGHT, style=Grade(0.0, False, {"style": 0.0}, ("repetition",)))
    assert (grade.reward, grade.correct, grade.flags, asked) == (-0.5, False, ("repetition",), ["style"])
    grade, asked = combined(gated, judge=HALF, form=RIGHT, style=STYLED)
    assert (grade.reward, grade.correct, asked) == (0.5, False, ["style", "form", "judge"])
    assert grade.components == {"judge": 0.5, "form": 1.0, "style": 1.0, "judge/format": 0.5, "form/format": 1.0,
                                "format": 0.5}  # fmt: skip


def test_the_first_that_matches():
    first = Combination("first", order=("exact", "close", "judge"))
    for grades, reward, correct, asked in (
        ((RIGHT, WRONG, HALF), 1.0, True, ["exact"]), ((WRONG, RIGHT, HALF), 1.0, True, ["exact", "close"]),
        ((WRONG, WRONG, HALF), 0.5, False, ["exact", "close", "judge"]),
        ((HALF, WRONG, WRONG), 0.0, False, ["exact", "close", "judge"]), ((LATE, RIGHT, HALF), 0.0, False, ["exact"]),
    ):  # fmt: skip
        grade, found = combined(first, **dict(zip(("exact", "close", "judge"), grades)))
        assert (grade.reward, grade.correct, found) == (reward, correct, asked)


@pytest.mark.parametrize("how", [Combination(lowest=-1.0), Combination("min", lowest=-1.0)])
def test_a_part_that_fails_makes_the_whole_fail(how):
    grade, _ = combined(how, a=RIGHT, b=LATE)
    assert (grade.reward, grade.correct, grade.flags, grade.failed) == (-1.0, False, ("timeout",), True)
    assert combined(how, b=LATE)[0].reward == -1.0


# --- configurations ---------------------------------------------------------------------------------------------------

RULE = {"kind": "rule", "rule": "number"}


@pytest.mark.parametrize(("given", "complaint"), [
    ({"part": {}}, "rewards of s: no key 'part'; nearest: parts"),
    ({"parts": {"a": {**RULE, "limt": 1}}}, "part a: no key 'limt'; nearest: limit"),
    ({"parts": {"a": {"kind": "role"}}}, "part a: no kind 'role'; nearest: rule"),
    ({"parts": {"a": {"kind": "rule"}}}, "'rule' has to be given"),
    ({"parts": {"a": {"kind": "judge", "judge": "lage"}}}, "a: no judge 'lage'; nearest: large"),
    ({"parts": {"a": {"kind": "style", "langauge": 1}}}, "no key 'langauge'"),
    ({"parts": {"a": RULE}, "how": "som"}, "no way 'som' to combine; nearest: sum"),
    ({"parts": {"answer": RULE, "b": RULE}, "gate": ("anwser",)}, "no part 'anwser'; nearest: answer"),
    ({"parts": {"a": RULE}, "gate": ("a",)}, "every part is a gate"),
    ({"parts": {"a": RULE, "b": RULE}, "how": "first"}, "order of 'first' has to name each of a, b"),
    ({"parts": {"a": RULE, "b": RULE}, "weights": {"a": 0.5}}, "for each of a, b"),
    ({"parts": {"a": RULE, "b": RULE}, "weights": {"a": 0.5, "b": 0.6}}, "add up to 1"),
    ({"parts": {"a": RULE, "b": RULE}, "weights": {"a": 1.5, "b": -0.5}}, "not negative"),
    ({"parts": {"a": {"kind": "environment", "low": 1}}}, "a: low=1 is not below high=1.0"),
    ({}, "neither parts nor a group"), ({"parts": 3}, "int"),
    ({"group": {"form": "algorithm1"}}, "'comparator' has to be given"),
    ({"group": {"comparator": {"kind": "rule", "rule": "a:b"}, "form": "equation8"}}, "nearest: equation9"),
    ({"group": {"comparator": {"kind": "judge", "judge": "x"}}}, "no judge 'x'"),
])  # fmt: skip
def test_mistakes_are_named(given, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        config.source("s", given, ["large"])


def test_a_configuration_survives_being_kept():
    """Through ml_collections, frozen, flat and JSON: keys are sorted on the way, and nothing depends on their order."""
    given = {
        "judges": {"large": {"url": "http://x/v1", "model": "m"}},
        "sources": {
            "chart": {
                "parts": {"style": {"kind": "style"}, "exact": {**RULE, "args": {"relative": 0.05}},
                          "a_judge": {"kind": "judge", "judge": "large"}},
                "gate": ("style",), "how": "first", "order": ("exact", "a_judge"),
            },
            "code": {"parts": {}, "group": {"comparator": {"kind": "judge", "judge": "large"}, "polish": True}},
            "two": {"parts": {"b": RULE, "a": RULE}, "weights": {"b": 0.75, "a": 0.25}},
        },
    }  # fmt: skip
    kept = configs.unflat(json.loads(json.dumps(configs.flat(configs.freeze(ConfigDict(given))))))
    for table in (kept, configs.freeze(ConfigDict(given))):
        judges = config.judges(table["judges"])
        assert judges == config.judges(given["judges"]) and judges["large"].connections == 16
        for name, source in given["sources"].items():
            found, wanted = (config.source(name, s, judges) for s in (table["sources"][name], source))
            plain = lambda s: json.loads(json.dumps([s.parts, s.group], default=dict, sort_keys=True))  # noqa: E731
            assert plain(found) == plain(wanted)
            assert found.combination.order == wanted.combination.order
            assert dict(found.combination.weights) == dict(wanted.combination.weights)
    with pytest.raises(UserError, match="needs a url and a model"):
        config.judges({"x": {"url": "http://x/v1"}} | {"x": {"model": "m"}})
    with pytest.raises(UserError, match="nearest: connections"):
        config.judges({"x": {"conections": 3}})


def test_an_answer_without_a_sample_has_to_say_where_it_is_from():
    assert Answered(None, "x", 1.0, "desk").source == "desk"
    with pytest.raises(ValueError, match="has to be given its source"):
        Answered(None, "x")
