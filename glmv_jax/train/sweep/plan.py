"""What a sweep runs: values of the command line to runs with names."""

from __future__ import annotations

import dataclasses
import itertools
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glmv_jax import config
from glmv_jax.config import ConfigDict
from glmv_jax.typing import UserError


@dataclasses.dataclass
class Run:
    """One run of a sweep.

    name: of its folder in the sweep's. values: {config key: value}, what sets it apart. overrides: the same as
    `key=text`. steps: that it has to take. max_seconds: of its steps, 0: no limit. status: one of waiting, running,
    finished, failed, interrupted. seconds and peak_rss (bytes): of its processes in all calls, and the largest.
    """

    name: str
    values: dict[str, Any]
    overrides: list[str]
    steps: int
    max_seconds: float = 0.0
    status: str = "waiting"
    exit_code: int | None = None
    seconds: float = 0.0
    peak_rss: int = 0
    error: str = ""

    def record(self) -> dict[str, Any]:
        """What sweep.json says of it."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "overrides"}


@dataclasses.dataclass(frozen=True)
class Shared:
    """What all runs of a sweep share, as the command line has it. jobs: at a time, None: the launcher's own choice."""

    experiment: str
    overrides: tuple[str, ...]
    workdir: Path
    jobs: int | None = None

    def of(self, run: Run) -> list[str]:
        """All overrides of a run."""
        return [*self.overrides, *run.overrides]

    def folder(self, run: Run) -> Path:
        return self.workdir / run.name


def plan(cfg: ConfigDict, sets: Sequence[str], seeds: str | None = None) -> list[Run]:
    """Every combination, the seed changing last: a sweep that is stopped early has whole seeds.

    Args:
      cfg: the config all runs share.
      sets: `key=value,value,...`; commas inside brackets or quotes do not separate. Of the key `seed` as `seeds`.
      seeds: `0..4` (both ends count), `0,1,5` or both, for the key `seed`; None: the config's own seed.

    Raises: UserError for an unknown key (names the nearest), a value of another type, a key or value given twice, and
      nothing to sweep over.
    """
    table: dict[str, dict[str, Any]] = {}  # key -> text -> value
    for item in sets:
        key, equals, text = item.partition("=")
        if not equals or not text:
            raise UserError(f"--set {item} has no values; write --set KEY=VALUE,VALUE")
        if key in table:
            raise UserError(f"--set {key} is given twice; write all values in one")
        words = list(map(str, parse_seeds(text, "--set seed="))) if key == "seed" else split(text)
        table[key] = _values(cfg, key, words)
    if seeds is not None:
        if "seed" in table:
            raise UserError("--seeds and --set seed say the same; give one of them")
        table["seed"] = _values(cfg, "seed", list(map(str, parse_seeds(seeds))))
    if "seed" in table:
        table = {"seed": table.pop("seed")} | table
    if not table:
        raise UserError("nothing to sweep over; give --set KEY=VALUE,VALUE or --seeds 0..4")

    short = _short_names(table)
    runs = []
    for texts in itertools.product(*table.values()):
        values = {key: table[key][text] for key, text in zip(table, texts)}
        name = ",".join(f"{short[key]}={_word(values[key])}" for key in [*(k for k in table if k != "seed"), "seed"]
                        if key in table)  # fmt: skip
        overrides = [f"{key}={text}" for key, text in zip(table, texts)]
        whole = config.override(cfg, overrides)
        runs.append(Run(name, values, overrides, whole.get("steps", 0), float(whole.get("max_seconds", 0.0))))
    return runs


def _values(cfg: ConfigDict, key: str, texts: Sequence[str]) -> dict[str, Any]:
    """Text -> the value that the config takes it for."""
    found: dict[str, Any] = {}
    for text in texts:
        value = config.flat(config.override(cfg, [f"{key}={text}"]))[key]
        if text in found or value in found.values():
            raise UserError(f"--set {key} has {text} twice; give each value once")
        found[text] = value
    return found


def split(text: str) -> list[str]:
    """Text between commas that stand in no bracket and no quotes: `1,(2,3),'a,b'` is three values."""
    parts, depth, quote = [""], 0, ""
    for c in text:
        if quote:
            quote = "" if c == quote else quote
        elif c in "'\"":
            quote = c
        depth += (c in "([{") - (c in ")]}") if not quote else 0
        if c == "," and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def parse_seeds(text: str, option: str = "--seeds ") -> list[int]:
    """`0..4` is 0, 1, 2, 3, 4; `0..2,7` is 0, 1, 2, 7. Raises UserError for anything else, and for a seed twice."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", part.strip())
        if not match or match[2] and int(match[2]) < int(match[1]):
            raise UserError(f"{option}{text} are no seeds; write 0..4, or 0,1,5")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{option}{text} names a seed twice; give each once")
    return seeds


def _short_names(keys: Mapping[str, Any]) -> dict[str, str]:
    """For each key the shortest end of it that no other one has: optim.lr -> lr."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = (".".join(parts[n:]) for n in range(len(parts) - 1, -1, -1))
        short[key] = next(end for end in ends if sum(other == end or other.endswith(f".{end}") for other in keys) == 1)
    return short


def _word(value: Any) -> str:
    """A value as part of a folder's name; what has to be changed for that carries a check sum of the whole."""
    text = str(value)
    word = re.sub(r"[^\w.+-]+", "-", text).strip("-")[:40]
    return word if word == text else f"{word}-{zlib.crc32(text.encode()):08x}"
