"""Configs are Python: an experiment is a file with `get_config(arg)`, a run is that file plus strict overrides.

    cfg = load("experiments/vlm_sft.py:size=nano,flag")      # the file's own small arguments, after the colon
    cfg = override(cfg, ["optim.lr=3e-4", "data.seed=1"])    # what the command line gives as --config.optim.lr=3e-4
    json.dump(flat(cfg), file)                               # the whole of it, sorted, one line a value

Inside an experiment file:

    def get_config(arg=None):
        arg = parse_arg(arg, size="nano", seed=0, debug=False)

Nothing is guessed: a misspelt argument or key stops at once and names the nearest one, and a value keeps the type of
the default it replaces.
"""

from __future__ import annotations

import ast
import copy
import difflib
import importlib.metadata
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict, FrozenConfigDict

from glmv_jax import presets
from glmv_jax.typing import UserError

__all__ = [
    "ConfigDict", "FrozenConfigDict", "flat", "freeze", "load", "nearest", "override", "parse_arg", "presets", "unflat",
]  # fmt: skip


# --- experiment files -------------------------------------------------------------------------------------------------


def load(spec: str | Path) -> ConfigDict:
    """Reads an experiment: `"path/to/file.py"` or `"path/to/file.py:size=nano,flag"`.

    Args:
        spec: the file, and after the first colon behind `.py` the text handed to its `get_config`. A name as
            `experiments/vlm_sft.py` is the one that came with glmv_jax, where there is no such file here.

    Returns:
        What `get_config(arg)` returned, a ConfigDict.

    Raises:
        UserError: no such file, a syntax error or a missing import in it, no `get_config`, or a result of another type.
            Any other exception of the file is a bug in it and passes through with its traceback.
    """
    name, arg = _split_spec(str(spec))
    path = Path(name)
    if not path.is_file():
        files = sorted(map(str, path.parent.glob("*.py"))) if path.parent.is_dir() else []
        brought = {} if files else installed()
        if name not in brought:
            raise UserError(f"no experiment file {name}{nearest(name, files or brought, 'nearest', 'files there')}")
        path = brought[name]

    module_spec = importlib.util.spec_from_file_location(f"glmv_experiment_{path.stem}", path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{name} is no Python file; an experiment is FILE.py or FILE.py:ARG=VALUE")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"{error.filename}:{error.lineno}: syntax error: {error.msg}") from error
    except ImportError as error:
        raise UserError(f"{name}: {error}; an experiment imports ml_collections and glmv_jax.config only") from error

    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{name} has no get_config(arg=None): an experiment file defines one and returns a ConfigDict")
    cfg = module.get_config(arg)
    if not isinstance(cfg, ConfigDict):
        raise UserError(f"{name}: get_config returned {type(cfg).__name__}, not ml_collections.ConfigDict")
    return cfg


def installed() -> dict[str, Path]:
    """Experiments that a wheel of glmv_jax brought: "experiments/NAME.py" -> the file. None of a checkout's, which has
    them beside the package."""
    try:
        files = importlib.metadata.files("glmv_jax") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    share = ("share", "glmv_jax", "experiments")
    return {f"experiments/{file.name}": Path(str(file.locate())) for file in files if file.parts[-4:-1] == share}


def _split_spec(spec: str) -> tuple[str, str | None]:
    head, colon, arg = spec.partition(".py:")
    return (head + ".py", arg) if colon else (spec, None)


def parse_arg(arg: str | None, **defaults: bool | int | float | str | None) -> ConfigDict:
    """Reads the small arguments of an experiment, typed by their defaults.

    Args:
        arg: `"size=nano,seed=3,debug"`, or None or "" for all defaults. A bool is switched on by its name alone, or set
            with `debug=false`. A default of None takes a Python literal, or else the text.
        **defaults: every argument the experiment knows.

    Returns:
        A locked ConfigDict with one value per default.

    Raises:
        UserError: an unknown argument (names the nearest), one given twice or without a value, a value of another type.
    """
    values = dict(defaults)
    seen = set()
    for item in filter(None, (part.strip() for part in (arg or "").split(","))):
        key, equals, text = item.partition("=")
        if key not in defaults:
            raise UserError(f"unknown experiment argument {key!r}{nearest(key, defaults, 'nearest', 'known')}")
        if key in seen:
            raise UserError(f"experiment argument {key!r} is given twice in {arg!r}")
        seen.add(key)
        if equals:
            values[key] = _parse_value(f"experiment argument {key}", text, defaults[key])
        elif isinstance(defaults[key], bool):
            values[key] = True
        else:
            raise UserError(f"experiment argument {key!r} needs a value, for example {key}={defaults[key]}")
    return ConfigDict(values).lock()


# --- overrides --------------------------------------------------------------------------------------------------------


def override(cfg: ConfigDict, assignments: Iterable[str]) -> ConfigDict:
    """Returns a copy of the config with `"a.b=value"` applied in order; the config itself is left as it was.

    The value takes the type of the one it replaces: an int may stand for a float, `None` for anything but a bool; lists
    and tuples are Python literals, or words between commas where the old one holds strings; a value that was None takes
    any Python literal, or else the text.

    Raises:
        UserError: not of the form key=value, an unknown key (names the nearest), a group instead of a value, a value of
            another type (names both).
    """
    cfg = _thaw(cfg)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise UserError(f"config override {assignment!r} has no value: write {path}=VALUE")
        *parents, key = path.split(".")
        group = cfg
        for parent in parents:
            group = group.get(parent) if isinstance(group, ConfigDict) else None
        if not isinstance(group, ConfigDict) or key not in group:
            raise UserError(f"the config has no key {path!r}{nearest(path, _paths(cfg), 'nearest', 'known')}")
        if isinstance(group[key], ConfigDict):
            inside = ", ".join(f"{path}.{name}" for name in group[key]) or "nothing"
            raise UserError(f"config key {path!r} is a group, set a value inside it: {inside}")
        value = _parse_value(f"config key {path}", text, group[key])
        with group.ignore_type():  # our check is the stricter one, and ml_collections' would refuse None
            group[key] = value
    return cfg


def _parse_value(what: str, text: str, old: Any) -> Any:
    """Parses `text` as a value that may replace `old`; UserError names `what` and both types."""
    if isinstance(old, bool):
        if text.lower() not in ("true", "false"):
            raise UserError(f"{what} is bool (true or false), but {text!r} is {_kind(text)}")
        return text.lower() == "true"
    if text == "None":
        return None
    if isinstance(old, str):
        return text
    if isinstance(old, float):
        try:
            return float(text)
        except ValueError:
            raise UserError(f"{what} is float, but {text!r} is {_kind(text)}") from None
    if isinstance(old, (list, tuple)):
        return _parse_sequence(what, text, old)
    value = _literal(text)
    if isinstance(old, int) and type(value) is not int:
        raise UserError(f"{what} is int, but {text!r} is {_kind(text)}")
    return value  # an int, or anything in place of None


def _parse_sequence(what: str, text: str, old: list | tuple) -> list | tuple:
    kind = type(old)
    if old and all(isinstance(item, str) for item in old) and text[:1] not in ("(", "["):
        return kind(word.strip() for word in text.split(",") if word.strip())
    value = _literal(text)
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{what} is {kind.__name__}, but {text!r} is {_kind(text)}; write {old!r}")
    of = {type(item) for item in old}
    if of == {float}:
        value = [float(item) if type(item) is int else item for item in value]
    wrong = [item for item in value if of and type(item) not in of]
    if wrong:
        names = " or ".join(sorted(item.__name__ for item in of))
        raise UserError(f"{what} is {kind.__name__} of {names}, but {wrong[0]!r} is {type(wrong[0]).__name__}")
    return kind(value)


def _literal(text: str) -> Any:
    """The Python literal in the text, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _kind(text: str) -> str:
    return type(_literal(text)).__name__


def _paths(cfg: ConfigDict, prefix: str = "") -> list[str]:
    """Every dotted path, groups included."""
    paths = []
    for key in cfg:
        paths.append(prefix + key)
        if isinstance(cfg[key], ConfigDict):
            paths += _paths(cfg[key], f"{prefix}{key}.")
    return paths


def nearest(word: str, known: Iterable[str], label: str = "nearest", all_label: str = "known") -> str:
    """The end of an error message: `"; nearest: size"`, or when nothing is near `"; known: a, b"` (at most 12 names).

    A dotted word is compared whole and by its last part, so that `lr` finds `optim.lr`.
    """
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not close:
        by_tail = {name.rpartition(".")[2]: name for name in reversed(known)}
        close = [by_tail[tail] for tail in difflib.get_close_matches(word.rpartition(".")[2], by_tail, 1, 0.6)]
    if close:
        return f"; {label}: {close[0]}"
    shown = sorted(known)[:12]
    return f"; {all_label}: {', '.join(shown)}{', ...' if len(known) > len(shown) else ''}" if shown else ""


# --- freezing, and the flat form --------------------------------------------------------------------------------------


class FrozenMapping(Mapping):
    """A read-only, hashable, picklable mapping for the dicts inside a list, which FrozenConfigDict refuses to hold."""

    def __init__(self, items: Mapping[str, Any]):
        self._items = {key: _frozen_leaf(value) for key, value in items.items()}

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

    def __hash__(self) -> int:
        return hash(frozenset(self._items.items()))

    def __repr__(self) -> str:
        return repr(self._items)


def _frozen_leaf(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_frozen_leaf(item) for item in value)
    return FrozenMapping(value) if isinstance(value, Mapping) else value


def freeze(cfg: ConfigDict) -> FrozenConfigDict:
    """A read-only copy: lists become tuples, dicts inside lists `FrozenMapping`; references are resolved."""
    cfg = _thaw(cfg).copy_and_resolve_references()
    return FrozenConfigDict(_map_leaves(cfg, _frozen_leaf))


def _thaw(cfg: ConfigDict) -> ConfigDict:
    """An independent, unlocked copy that can be written to; references between its fields live on."""
    return ConfigDict(cfg) if isinstance(cfg, FrozenConfigDict) else copy.deepcopy(cfg).unlock()


def _map_leaves(cfg: ConfigDict, function: Callable[[Any], Any]) -> dict[str, Any]:
    return {
        key: _map_leaves(value, function) if isinstance(value, ConfigDict) else function(value)
        for key, value in cfg.items()
    }


def flat(cfg: ConfigDict) -> dict[str, Any]:
    """The config as one sorted dict `{"optim.lr": 0.001, ...}` that survives JSON unchanged.

    Tuples become lists, an empty group stays as `{}`, so `flat(unflat(flat(cfg))) == flat(cfg)`.

    Raises:
        UserError: a value that JSON cannot hold (a function, an array, nan).
    """
    leaves: dict[str, Any] = {}
    _flatten(cfg, "", leaves)
    return dict(sorted(leaves.items()))


def _flatten(cfg: ConfigDict, prefix: str, leaves: dict[str, Any]) -> None:
    for key, value in cfg.items():
        if isinstance(value, ConfigDict) and len(value):
            _flatten(value, f"{prefix}{key}.", leaves)
        else:
            leaves[prefix + key] = _plain(f"config key {prefix}{key}", value)


def _plain(what: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(what, item) for item in value]
    if isinstance(value, (Mapping, ConfigDict)):
        return {key: _plain(what, item) for key, item in value.items()}
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise UserError(f"{what} holds {value!r} ({type(value).__name__}); configs hold finite numbers, text, lists, None")


def unflat(leaves: Mapping[str, Any]) -> ConfigDict:
    """The nested config of what `flat` wrote; every list is a tuple, so that what is built from it can be hashed."""
    nested: dict[str, Any] = {}
    for path, value in leaves.items():
        *parents, key = path.split(".")
        group = nested
        for parent in parents:
            group = group.setdefault(parent, {})
        group[key] = _with_tuples(value)
    return ConfigDict(nested)


def _with_tuples(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_with_tuples(item) for item in value)
    return {key: _with_tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
