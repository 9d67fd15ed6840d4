"""Experiment files, strict overrides and the flat form, met as a user would meet them."""

from __future__ import annotations

import json
import pickle

import pytest
from ml_collections import ConfigDict

from glmv_jax import config
from glmv_jax.typing import UserError


def base() -> ConfigDict:
    cfg = ConfigDict()
    cfg.seed = 0
    cfg.optim = ConfigDict(dict(lr=1e-3, clip=1.0, betas=(0.9, 0.99), schedule=dict(decay="cosine", warmup=10)))
    cfg.optim.groups = [(".*/kernel", {"kind": "muon", "wd": 0.1}), (".*", {"kind": "adamw"})]
    cfg.data = ConfigDict(dict(shuffle=True, sources=["caption", "ocr"], init_from=None))
    return cfg


def experiment(folder, body):
    path = folder / "tiny.py"
    path.write_text(body)
    return path


def one_line(match, function, *args):
    with pytest.raises(UserError, match=match) as error:
        function(*args)
    assert "\n" not in str(error.value)


# --- experiment files -------------------------------------------------------------------------------------------------

GOOD = """
from ml_collections import ConfigDict
from glmv_jax.config import parse_arg

def get_config(arg=None):
    arg = parse_arg(arg, size="nano", steps=100, lr=1e-3, debug=False, teacher=None)
    return ConfigDict(dict(size=arg.size, steps=arg.steps, lr=arg.lr, debug=arg.debug, teacher=arg.teacher))
"""


def test_load_reads_file_with_and_without_arguments(tmp_path):
    path = experiment(tmp_path, GOOD)
    assert config.load(path) == ConfigDict(dict(size="nano", steps=100, lr=1e-3, debug=False, teacher=None))
    cfg = config.load(f"{path}:size=base,debug,lr=1,steps=7,teacher=runs/a")
    assert cfg == ConfigDict(dict(size="base", steps=7, lr=1.0, debug=True, teacher="runs/a"))
    assert isinstance(cfg.lr, float)
    assert config.load(f"{path}:debug=false").debug is False


def test_load_names_what_is_wrong_with_the_file(tmp_path):
    path = experiment(tmp_path, GOOD)
    one_line(r"no experiment file .*tyny\.py; nearest: .*tiny\.py", config.load, str(tmp_path / "tyny.py"))
    one_line("no experiment file", config.load, str(tmp_path / "no" / "where.py"))
    one_line("no experiment file", config.load, str(tmp_path))
    one_line(r"tiny\.py:2: syntax error", config.load, experiment(tmp_path, "\ndef get_config(:\n"))
    one_line("No module named 'nope_nope'", config.load, experiment(tmp_path, "import nope_nope"))
    one_line("has no get_config", config.load, experiment(tmp_path, "x = 1"))
    one_line("returned dict", config.load, experiment(tmp_path, "def get_config(arg=None): return {}"))
    with pytest.raises(ZeroDivisionError):  # a bug in the file is shown whole
        config.load(experiment(tmp_path, "def get_config(arg=None): return 1 / 0"))
    one_line("unknown experiment argument 'sise'; nearest: size", config.load, f"{experiment(tmp_path, GOOD)}:sise=s")
    assert path.exists()


def test_parse_arg_is_strict():
    one_line(
        "unknown experiment argument 'dbug'; nearest: debug", lambda: config.parse_arg("dbug", debug=False, size="s")
    )
    one_line("known: debug, size", lambda: config.parse_arg("qqq=1", debug=False, size="s"))
    one_line("steps is int, but 'many' is str", lambda: config.parse_arg("steps=many", steps=1))
    one_line("steps is int, but '1.5' is float", lambda: config.parse_arg("steps=1.5", steps=1))
    one_line("lr is float, but 'x' is str", lambda: config.parse_arg("lr=x", lr=1.0))
    one_line("debug is bool .true or false., but '1' is int", lambda: config.parse_arg("debug=1", debug=False))
    one_line("needs a value, for example size=nano", lambda: config.parse_arg("size", size="nano"))
    one_line("given twice", lambda: config.parse_arg("a=1,a=2", a=0))
    with pytest.raises((AttributeError, KeyError)):
        config.parse_arg("", size="nano").siez = "s"


# --- overrides --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("seed=7", 7),
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr=2", 2.0),
        ("optim.clip=None", None),
        ("optim.betas=(0.5,1)", (0.5, 1.0)),
        ("optim.betas=[0.5]", (0.5,)),
        ("optim.schedule.decay=linear", "linear"),
        ("optim.schedule.decay=a=b", "a=b"),
        ("data.shuffle=False", False),
        ("data.sources=caption,chart", ["caption", "chart"]),
        ("data.sources=['zh']", ["zh"]),
        ("data.sources=", []),
        ("data.init_from=runs/a", "runs/a"),
        ("data.init_from=3", 3),
        ("optim.groups=[('.*', {'kind': 'frozen'})]", [(".*", {"kind": "frozen"})]),
    ],
)
def test_override_keeps_the_type(assignment, value):
    before = base()
    after = config.override(before, [assignment])
    got = after
    for key in assignment.partition("=")[0].split("."):
        got = got[key]
    assert got == value and type(got) is type(value)
    assert before == base(), "the config given must not change"


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optim.Ir=1", "no key 'optim.Ir'; nearest: optim.lr"),
        ("lr=1", "no key 'lr'; nearest: optim.lr"),
        ("optim.lr.x=1", "no key 'optim.lr.x'; nearest: optim.lr"),
        ("zzzzzz=1", "no key 'zzzzzz'; known: data, "),
        ("seed", "has no value: write seed=VALUE"),
        ("optim=3", "'optim' is a group, set a value inside it: optim.betas, "),
        ("seed=abc", "seed is int, but 'abc' is str"),
        ("seed=1.0", "seed is int, but '1.0' is float"),
        ("seed=True", "seed is int, but 'True' is bool"),
        ("optim.lr=fast", "optim.lr is float, but 'fast' is str"),
        ("optim.lr=(1,2)", r"optim.lr is float, but '\(1,2\)' is tuple"),
        ("data.shuffle=3", "data.shuffle is bool .true or false., but '3' is int"),
        ("optim.betas=0.9", "optim.betas is tuple, but '0.9' is float"),
        ("optim.betas=('a',)", "tuple of float, but 'a' is str"),
    ],
)
def test_override_refuses(assignment, message):
    one_line(message, config.override, base(), [assignment])


def test_override_order_reference_and_locked_or_frozen_input():
    cfg = base()
    cfg.twice = cfg.get_ref("seed") * 2
    cfg.lock()
    assert config.override(cfg, ["seed=2", "seed=5"]).twice == 10
    assert config.override(config.freeze(cfg), ["seed=5"]).seed == 5


# --- freeze and flat --------------------------------------------------------------------------------------------------


def test_freeze_is_read_only_hashable_and_picklable():
    frozen = config.freeze(base())
    with pytest.raises((AttributeError, TypeError)):
        frozen.seed = 1
    with pytest.raises(TypeError):
        frozen.optim.groups[0][1]["kind"] = "adamw"
    assert frozen.optim.groups[0][1]["kind"] == "muon" and dict(frozen.optim.groups[1][1]) == {"kind": "adamw"}
    assert hash(frozen) == hash(config.freeze(base()))
    assert pickle.loads(pickle.dumps(frozen)) == frozen


@pytest.mark.parametrize("make", [base, lambda: config.freeze(base())])
def test_flat_survives_json_and_unflat(make):
    cfg = ConfigDict(make()) if isinstance(make(), ConfigDict) else make()
    flat = config.flat(cfg)
    assert list(flat) == sorted(flat)
    assert flat["optim.schedule.warmup"] == 10 and flat["optim.betas"] == [0.9, 0.99]
    assert json.loads(json.dumps(flat)) == flat
    back = config.unflat(flat)
    assert config.flat(back) == flat
    assert back.optim.betas == (0.9, 0.99) and back.optim.groups[0] == (".*/kernel", {"kind": "muon", "wd": 0.1})


def test_flat_keeps_empty_groups_and_refuses_what_json_cannot_hold():
    assert config.flat(ConfigDict(dict(a=dict(b={}), c=1))) == {"a.b": {}, "c": 1}
    assert config.unflat({"a.b": {}, "c": 1}) == ConfigDict(dict(a=dict(b={}), c=1))
    one_line("config key a.f holds .*function", config.flat, ConfigDict(dict(a=dict(f=base))))
    one_line("nan", config.flat, ConfigDict(dict(a=float("nan"))))


def test_a_file_that_is_no_python_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x = 1")
    with pytest.raises(UserError, match=r"notes.txt is no Python file; an experiment is FILE.py"):
        config.load(tmp_path / "notes.txt")
