"""The training loop: one for all five stages. Read `train` from top to bottom.

Keys of the config that the loop reads (everything else is the stage's):

    seed, steps, optim     required; optim as in `optim.build`
    log_every   10         steps between rows of metrics.jsonl
    eval_every  0          steps between short evaluations, 0: only before and after
    save_every  100        steps between checkpoints
    keep        2          checkpoints kept
    max_seconds 0          stop when the steps have taken so long (with their data, without evaluations), 0: never
    init_from   ""         workdir of a finished run whose parameters this one starts from
    init_subtrees ()       only these of them, e.g. ("vision",); the rest starts fresh
    mesh        {"data": -1}, rules "data": see `parallel`
    accumulate  1          pieces that a batch is differentiated in (see `train.step`)
    freeze      ()         regular expressions of parameters that stay as they are
    ema         0.0        decay of a running average of the parameters, 0: none
    evaluate    "params"   what is evaluated, and taken by who starts from this run: those, or their average, "ema"
    lora        {rank: 0}  adapters that are trained in place of the parameters (see `train.lora`)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from jax.profiler import StepTraceAnnotation, TraceAnnotation

from glmv_jax import optim
from glmv_jax.parallel import chips, multihost
from glmv_jax.train import checkpoint, metrics, weights
from glmv_jax.train import goodput as goodput_lib
from glmv_jax.train import profile as profile_lib
from glmv_jax.train import state as state_lib
from glmv_jax.train.disk import write_json
from glmv_jax.train.signals import Interrupted, Signals
from glmv_jax.train.stages.base import Stage
from glmv_jax.train.step import make_train_step
from glmv_jax.typing import UserError

MAX_SKIPPED = 50  # steps in a row without a finite gradient: the run is lost, and should say so


@dataclasses.dataclass
class Totals:
    """What a run has consumed over all its attempts; saved in every checkpoint."""

    seconds: float = 0.0  # everything: set-up, compilation, evaluations, and work that a kill undid
    train_seconds: float = 0.0  # the steps alone, with their data and rollouts
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    skipped: int = 0  # updates left out because a gradient was not finite

    def add(self, counts: dict[str, int], flops: float) -> None:
        """Counts a step."""
        self.samples += counts["samples"]
        self.tokens += counts["tokens"]
        self.flops += flops


def train(stage: Stage, workdir: Path, profiled: str | None = None) -> dict[str, Any]:
    """Trains one stage in `workdir`, from where it stopped if it had begun, and returns what results.json holds.

    profiled: steps to trace, as `profile.Profile` has them. Of several processes the first one writes what is not a
    checkpoint.

    Raises: UserError for what a person can mend, and Interrupted (exit code 130) after SIGINT or SIGTERM, when a
      checkpoint has been written.
    """
    # ------------------------------------------------------------------------------------------------------------------
    # Where everything lives. Shapes first: nothing is allocated before we know that the config makes sense.
    # ------------------------------------------------------------------------------------------------------------------
    began_at, first = time.monotonic(), multihost.is_first()
    goodput = goodput_lib.Goodput(workdir / "goodput.jsonl", writes=first)
    cfg = stage.cfg
    total, max_seconds = cfg.steps, cfg.get("max_seconds", 0)
    log_every, eval_every, save_every = cfg.get("log_every", 10), cfg.get("eval_every", 0), cfg.get("save_every", 100)
    wait = "rollouts" if stage.on_policy else "data wait"
    progress = metrics.Progress(workdir.name, total, headline=stage.headline, wait=wait, quiet=not first)

    placement, optimizer, trainable = prepare(stage)
    train_step = make_train_step(stage, optimizer, placement, trainable=trainable, seed=cfg.seed)
    learning_rates = optim.learning_rates(optim.plan(cfg), total)

    # ------------------------------------------------------------------------------------------------------------------
    # The state. The order matters: 1. a checkpoint of this very run, 2. the parameters of another run, 3. from nothing.
    # ------------------------------------------------------------------------------------------------------------------
    checkpoints = checkpoint.Checkpoints(workdir / "checkpoints", cfg.get("keep", 2), progress.say)
    restored = checkpoints.restore(placement.abstract)
    if restored is not None:
        state, host = restored
        step, totals = int(state.step), Totals(**host["totals"])
        if results := _finished(workdir, step, total, totals, max_seconds):
            progress.say(f"already finished ({step} steps); delete {workdir} to train it again")
            checkpoints.close()
            return results
        progress.say(f"resuming from step {step} of {total}")
    else:
        state, host, step, totals = _initial_state(stage, optimizer, placement), None, 0, Totals()
        progress.say(f"{_count(state.params)} parameters, {total} steps{_origin(cfg)}")
    checkpoints.check_space(state)
    profile = profile_lib.Profile(profiled, workdir / "profile", step, total)
    constants = jax.device_put(stage.constants(), placement.constants)
    state = state._replace(extra=stage.begin(placement, constants, state.extra, fresh=restored is None))
    for shapes in map(placement.batch_shapes, stage.batch_shapes()):
        progress.say(f"compiling the step for {_shapes(shapes)}")
        with goodput.spent_on("compile"):
            train_step.compile(state, constants, shapes)
    data = stage.train_data()
    if host is not None:
        data.set_state(host["data"])

    # From here on the folder says "not finished", also when it had been and the config now asks for more steps.
    results_file, untrained_file = workdir / "results.json", workdir / "untrained.json"
    results_file.unlink(missing_ok=True)
    evaluated_before = untrained_file.exists()
    log = metrics.MetricsLog(workdir, step if evaluated_before else -1, final_step=total, writes=first)
    clock = _Clock(began_at, max(totals.seconds, log.wall))
    devices = list(placement.mesh.devices.flat)
    peak, runs_when_called = chips.peak(devices), devices[0].platform == "cpu"
    recorder = metrics.StepRecorder(log, progress, clock, log_every, totals.skipped, peak)
    signals = Signals(progress.say, interrupts=jax.process_count() == 1)
    saved_step = None if restored is None else step

    def save() -> None:
        """A checkpoint of this moment. The row of its step comes first: a resume removes rows and never adds one."""
        nonlocal saved_step
        recorder.flush()
        totals.seconds, totals.skipped = clock(), recorder.skipped
        with goodput.spent_on("checkpoint"):
            checkpoints.save(step, state, {"data": data.get_state(), "totals": dataclasses.asdict(totals)})
        goodput.row(step)
        saved_step = step

    def evaluate(*, full: bool) -> dict[str, float]:
        with goodput.spent_on("evaluation"), signals.interruptible():
            return stage.evaluate(state_lib.evaluated(cfg, state), state.extra, full=full)

    def stopping() -> bool:
        """Whether a signal asks for it. Several processes look at each other's now and then: all stop at one step."""
        alone = jax.process_count() == 1
        return signals.requested if alone else step % log_every == 0 and multihost.agreed(signals.requested)

    try:
        # --------------------------------------------------------------------------------------------------------------
        # The untrained evaluation. Written before the first step, so that a run that was resumed still has it.
        # --------------------------------------------------------------------------------------------------------------
        goodput.row(step)  # this attempt goes on from here
        if step == 0 and not multihost.agreed(evaluated_before):
            progress.say("evaluating before training")
            numbers = evaluate(full=True)
            log.write(0, clock(), "eval", numbers)
            if first:
                write_json(untrained_file, numbers)
        goodput.turn("steps")

        # --------------------------------------------------------------------------------------------------------------
        # The loop. DO NOT CHANGE THE ORDER within a step:
        #   batch   while the devices are still busy with the step before, so that data cost nothing if they can; one
        #           that needs the new state has to wait for it, and that wait is not its own
        #   step    is only started here; it takes the memory of the old state
        #   log     of the step BEFORE: waiting for this one would leave the devices idle
        #   eval    of the new state, before the save: a resume from there does not repeat it
        #   save    last, when the data have given this step's batch and not the next: a resume goes on right there
        # --------------------------------------------------------------------------------------------------------------
        out_of_time = _is_over(totals, max_seconds)
        while step < total and not out_of_time:
            step_began = time.monotonic()
            if profile.begins(step + 1):
                recorder.flush()
                progress.say(profile.start())
            if stage.on_policy:
                recorder.flush()
            asked = time.monotonic()
            with goodput.spent_on("rollouts" if stage.on_policy else "data wait"), TraceAnnotation(wait):
                batch, host_metrics = _next_batch(stage, data, state)
            waited = time.monotonic() - asked
            if recorder.computing and not stage.on_policy:
                goodput.move(waited, "data wait", "steps")  # the devices had work all the while

            placed = placement.batch(batch)
            if train_step.is_new(placed):
                recorder.flush()
                progress.say(f"compiling the step for {_shapes(batch)}")
                with goodput.spent_on("compile"):
                    train_step.compile(state, constants, placed)
                recorder.meter.reset()
            called = time.monotonic()
            with StepTraceAnnotation("train", step_num=step + 1):
                state, values = train_step(state, constants, placed)
            called = time.monotonic() - called if runs_when_called else 0.0
            step += 1

            counts, flops = _of_all_processes(stage.counts(batch), stage.flops(batch))
            totals.add(counts, flops)
            recorder.started(step, values | host_metrics | learning_rates(step - 1), waited, counts, flops, called)
            if recorder.skipped_in_a_row >= MAX_SKIPPED:
                raise UserError(
                    f"{workdir.name}: no finite gradient for {MAX_SKIPPED} steps (now at {step}); lower optim.lr or "
                    f"set optim.clip, and delete {workdir}"
                )
            goodput.row(step, due=step % log_every == 0)
            asked_to_stop = stopping()
            evaluates = eval_every and step % eval_every == 0 and step < total
            saves = step % save_every == 0 or step == total or asked_to_stop
            if evaluates or saves or profile.ends(step):
                recorder.flush()  # here, so that the time of the step is counted as the step's
            totals.train_seconds += time.monotonic() - step_began
            out_of_time = bool(max_seconds) and multihost.agreed(_is_over(totals, max_seconds))
            if max_seconds:
                progress.seconds_left = max_seconds - totals.train_seconds

            if profile.ends(step):
                for line in profile.stop(train_step.texts):
                    progress.say(line)
                recorder.meter.reset()

            if evaluates:
                numbers = evaluate(full=False)
                log.write(step, clock(), "eval", numbers)
                recorder.meter.reset()

            if saves or out_of_time:
                save()
                recorder.meter.reset()
            if asked_to_stop:
                raise Interrupted

        # --------------------------------------------------------------------------------------------------------------
        # The final evaluation and the results. Written last: results.json says that the stage is finished.
        # --------------------------------------------------------------------------------------------------------------
        with goodput.spent_on("checkpoint"):
            checkpoints.wait()
        progress.close()
        progress.say("evaluating after training")
        numbers = evaluate(full=True)
        with goodput.spent_on("evaluation"), signals.interruptible():
            _write_samples(stage, state, workdir / "samples", first)
        log.write(step, clock(), "eval", numbers)
        totals.seconds = clock()
        goodput.row(step)
        found = goodput.summary()
        progress.say(goodput_lib.line(found))
        results = _results(stage, untrained_file, numbers, step, totals)
        results |= {"step_memory": train_step.memory, "goodput": found}
        if first:
            write_json(results_file, results)
        return results
    except Interrupted:
        if saved_step != step:
            save()
        with goodput.spent_on("checkpoint"):
            checkpoints.wait()
        progress.say(f"stopped at step {step} of {total}, saved; run the same command to go on")
        raise
    finally:
        with contextlib.ExitStack() as leaving:  # all of them, also when one fails on a full disk
            ends = (checkpoints, data, log, progress, profile)
            for close in (*(part.close for part in ends), signals.restore, functools.partial(goodput.row, step)):
                leaving.callback(close)


def prepare(stage: Stage, mesh: Any = None) -> tuple[state_lib.Placement, Any, Any]:
    """Mesh, shardings, optimiser and the mask of trained parameters, from the config alone; nothing is allocated.

    This is the one place that decides where a run lives. mesh: in place of the config's on the devices here,
    a `jax.sharding.Mesh` of others or an AbstractMesh. Raises UserError for a mesh, a rules preset or an optimiser
    config that does not fit.
    """
    cfg = stage.cfg
    mesh, rules = stage.place(mesh)
    shapes = jax.eval_shape(stage.init_params, jax.random.key(0))
    shardings = rules.shardings(mesh, stage.logical_axes(), shapes)
    plan = optim.plan(cfg)
    optimizer = optim.build(plan, shapes, cfg.steps, shardings)
    return state_lib.place(stage, optimizer, mesh, rules), optimizer, optim.trainable(plan, shapes)


# --- parts of the above -----------------------------------------------------------------------------------------------


class _Clock:
    """Seconds that the run has taken, earlier attempts included."""

    def __init__(self, started: float, before: float) -> None:
        self._zero = started - before

    def __call__(self) -> float:
        return time.monotonic() - self._zero


def _next_batch(stage: Stage, data: Any, state: state_lib.TrainState) -> tuple[dict[str, Any], dict[str, float]]:
    try:
        return stage.next_batch(data, state)
    except StopIteration:
        raise UserError(f"{stage.name}: the training data ended; make them repeat, or lower steps") from None


def _of_all_processes(counts: dict[str, int], flops: float) -> tuple[dict[str, int], float]:
    """What this process counted of its rows, times the processes: each has as many."""
    n = jax.process_count()
    return {name: n * count for name, count in counts.items()}, n * flops


def _is_over(totals: Totals, max_seconds: float) -> bool:
    return bool(max_seconds) and totals.train_seconds >= max_seconds


def _initial_state(stage: Stage, optimizer: Any, placement: state_lib.Placement) -> state_lib.TrainState:
    """From nothing, then what the stage reads from files, then what another run gives; the last one counts."""
    cfg = stage.cfg
    params, init_from, subtrees = None, cfg.get("init_from", ""), cfg.get("init_subtrees", ())
    whole = init_from and not subtrees
    given = {} if whole else stage.given_params()
    if given or subtrees and init_from:
        params = state_lib.init_state(stage, optimizer, placement, cfg.seed).params
    if given:
        params = state_lib.replaced(params, given)
    if init_from:
        # What the other run gives in full need not be drawn first.
        params = weights.load(init_from, subtrees, like=placement.abstract.params if whole else params)
    return state_lib.init_state(stage, optimizer, placement, cfg.seed, params)


def _finished(workdir: Path, step: int, total: int, totals: Totals, max_seconds: float) -> dict[str, Any] | None:
    """The results of a run that has nothing left to do; None when it has, also because the config now asks for more."""
    path = workdir / "results.json"
    if not path.exists() or (step < total and not _is_over(totals, max_seconds)):
        return None
    results = json.loads(path.read_text(encoding="utf-8"))
    return results if results.get("step") == step else None


def _results(stage: Stage, untrained: Path, trained: dict[str, float], step: int, totals: Totals) -> dict[str, Any]:
    before = json.loads(untrained.read_text(encoding="utf-8")) if untrained.exists() else {}
    notes = stage.notes()
    rows = {
        name: {"untrained": before.get(name), "trained": value, "chance": None, "note": ""} | notes.get(name, {})
        for name, value in trained.items()
    }
    return {"metrics": rows, "step": step, **dataclasses.asdict(totals)}


def _write_samples(stage: Stage, state: state_lib.TrainState, folder: Path, writes: bool) -> None:
    if not writes:  # a process that takes part in making them
        with tempfile.TemporaryDirectory() as elsewhere:
            return stage.write_samples(state_lib.evaluated(stage.cfg, state), state.extra, Path(elsewhere))
    shutil.rmtree(folder, ignore_errors=True)  # of an attempt that did not get to its results
    os.makedirs(folder)
    stage.write_samples(state_lib.evaluated(stage.cfg, state), state.extra, folder)


def _origin(cfg: Any) -> str:
    if not cfg.get("init_from", ""):
        return ""
    parts = ", ".join(cfg.get("init_subtrees", ()))
    return f", {parts or 'all'} from {cfg.init_from}"


def _count(params: Any) -> str:
    return f"{sum(x.size for x in jax.tree.leaves(params)):,}"


def _shapes(batch: dict[str, Any]) -> str:
    return ", ".join(f"{name}{list(x.shape)}" for name, x in sorted(batch.items()) if hasattr(x, "shape"))
