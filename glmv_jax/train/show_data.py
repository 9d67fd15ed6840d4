"""`glmv show-data`: what a config's sources give, before it is packed or batched."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from glmv_jax.data import looking, looking_html, looking_terminal
from glmv_jax.data.stream import Batches
from glmv_jax.models import teachers
from glmv_jax.train import main
from glmv_jax.train.panel import clock
from glmv_jax.typing import UserError

EVERY = 10.0  # seconds between lines of progress where there is no terminal


def show_data(cfg: ConfigDict, draws: int = 256, each: int = 2, page: str | None = None,
              console: Console | None = None) -> list[looking.Tally]:  # fmt: skip
    """Prints what the first `draws` of the sources are, with `each` examples of every source, or writes it as a page.

    A source that is broken is told of and ends nothing. UserError: a config that reads nothing, a path that is wrong,
    a page that cannot be written.
    """
    if draws < 1 or each < 0:
        raise UserError(f"--draws {draws}, --examples {each}: give at least 1 draw, and 0 or more examples")
    with tempfile.TemporaryDirectory() as folder:
        faults = Path(folder) / "faults.jsonl"  # of the run's own nothing is written
        with cfg.unlocked():
            cfg.faults = str(faults)
        stage = _stage(cfg)
        with contextlib.closing(_batches(stage)) as batches, _progress(draws) as tick:
            look = looking.Looking(_decoder(stage), stage.model.vision.patch)
            tallies = look.look(batches.items, draws, each, tick)
        notes = [*dict.fromkeys(_of_files(faults)), *_not_read(stage)]
    title = f"{cfg.stage}: the first {draws:,} draws of {len(tallies)} sources"
    if page is None:
        looking_terminal.show(tallies, title, notes, console or Console(), _half_blocks)
        return tallies
    try:
        Path(page).write_text(looking_html.page(tallies, title, notes), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--html {page} cannot be written ({error.strerror}); give another file") from None
    print(f"{title}: {page}")
    return tallies


def _stage(cfg: ConfigDict) -> Any:
    """The stage. Teachers of stage 1 are asked nothing, so one that needs no file stands in for each; only a cache of
    theirs is held against those that are given."""
    cls: Any = main.stage_class(cfg.stage)
    if cfg.stage != "mim" or cfg.data.get("teacher_cache", ""):
        return cls(cfg)
    return cls(cfg, make=lambda name, entry, student, crop: teachers.hog(name, student.patch))


def _batches(stage: Any) -> Batches:
    """What training reads. Of stage 5 the questions; its environments are played, not read."""
    if stage.cfg.stage != "rl":
        return stage.train_data()
    from glmv_jax.rl.prompts import prompts

    weights = stage.episodes.weights if stage.episodes else dict(stage.cfg.data.weights)
    if not any(weights.values()):
        raise UserError("this config asks no questions (data.weights), and environments are played, not read; "
                        "look at the samples.jsonl of a run")  # fmt: skip
    return prompts(weights, stage.questioner, batch=1, seed=stage.data_seed, faults=stage.cfg.faults)


def _decoder(stage: Any) -> Any:
    """What turns ids into text; stage 1 has none."""
    tokenizer = getattr(stage, "tokenizer", None)
    return getattr(tokenizer, "vocabulary", tokenizer)



def _of_files(faults: Path) -> Iterator[str]:
    """What was said of whole files; records are in the tallies."""
    if faults.exists():
        for line in faults.read_text(encoding="utf-8").splitlines():
            fault = json.loads(line)
            if fault["index"] is None:
                yield f"{fault['source']}: {fault['id']}: {fault['reason']}"


def _not_read(stage: Any) -> Iterator[str]:
    """Environments of stage 5, beside its questions."""
    if getattr(stage, "episodes", None):
        yield f"not shown: {', '.join(stage.episodes.parts)}, which are played, not read; see a run's samples.jsonl"


def _half_blocks(pixels: np.ndarray, columns: int) -> Any:
    from glmv_jax.rl.showing import half_blocks

    return half_blocks(Image.fromarray(pixels), min(columns, 64))


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """Tells on standard error how far it is and what time is left: a bar, or a line now and then."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TextColumn("eta"), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("", total=total)
            yield lambda done, of: bar.update(task, completed=done)
        return
    start = last = time.monotonic()

    def tick(done: int, of: int) -> None:
        nonlocal last
        if (now := time.monotonic()) - last > EVERY:
            last = now
            left = clock((now - start) / done * (of - done))
            print(f"glmv show-data: {done} of {of} read, eta {left}", file=sys.stderr, flush=True)

    yield tick
