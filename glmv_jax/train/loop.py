"""The training loop: one for all five stages. Read `train` from top to bottom.

Keys of the config that the loop reads (everything else is the stage's):

    seed, steps, optim     required; optim as in `optim.build`
    log_every   10         steps between rows of metrics.jsonl
    max_skipped 50         steps in a row without a finite gradient, after which the run stops, 0: never
    spikes      8.0        a loss so many robust deviations above its running median is told (`train.spikes`), 0: never
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
from glmv_jax.train.nonfinite import Suspects, words
from glmv_jax.train.signals import Interrupted, Signals
from glmv_jax.train.spikes import Spikes
from glmv_jax.train.stages.base import Stage
from glmv_jax.train.step import make_train_step
from glmv_jax.typing import UserError


@dataclasses.dataclass
class Totals:
    """What a run has consumed over all its attempts; saved in every checkpoint."""

    seconds: float = 0.0  # everything: set-up, compilation, evaluations, and work that a kill undid
    train_seconds: float = 0.0  # the steps alone, with their data and rollouts
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    skipped: int = 0  # updates left out because a gradient was not finite
    sources: dict[str, dict[str, int]] = dataclasses.field(default_factory=dict)  # name -> {"samples", "tokens"}

    def add(self, counts: dict[str, int], flops: float, sources: dict[str, dict[str, int]]) -> None:
        """Counts a step."""
        self.samples += counts["samples"]
        self.tokens += counts["tokens"]
        self.flops += flops
        for name, more in sources.items():
            so_far = self.sources.setdefault(name, {"samples": 0, "tokens": 0})
            self.sources[name] = {what: n + more[what] for what, n in so_far.items()}

    def seen(self) -> dict[str, int]:
        """Metrics: samples by source."""
        return {f"seen/{name}": counts["samples"] for name, counts in self.sources.items()}


def train(stage: Stage, workdir: Path, profiled: str | None = None) -> dict[str, Any]:
    """Trains one stage in `workdir`, from where it stopped if it had begun, and returns what results.json holds.

    profiled: steps to trace, as `profile.Profile` has them. Of several processes the first one writes what is not a
    checkpoint.

    Raises: UserError for what a person can mend, and Interrupted after SIGINT or SIGTERM, when a checkpoint has been
      written.
    """
    run = _Run(stage, workdir)
    if (results := run.restore()) is not None:
        return results
    run.make_ready(profiled)
    try:
        run.evaluate_untrained()
        run.steps()
        return run.finish()
    except Interrupted:
        run.leave()
        raise
    finally:
        run.close()


class _Run:
    """The run of a stage in a work directory: `train` says what of it is called when.

    Attributes: state: all that a step changes.   step: of the state.   saved_step: of the newest checkpoint.
    """

    # ------------------------------------------------------------------------------------------------------------------
    # Where everything lives. Shapes first: nothing is allocated before we know that the config makes sense.
    # ------------------------------------------------------------------------------------------------------------------

    def __init__(self, stage: Stage, workdir: Path) -> None:
        self.began_at, self.first = time.monotonic(), multihost.is_first()
        self.goodput = goodput_lib.Goodput(workdir / "goodput.jsonl", writes=self.first)
        self.stage, self.workdir, self.cfg = stage, workdir, stage.cfg
        cfg = self.cfg
        self.total, self.max_seconds = cfg.steps, cfg.get("max_seconds", 0)
        self.log_every, self.eval_every = cfg.get("log_every", 10), cfg.get("eval_every", 0)
        self.save_every, self.max_skipped = cfg.get("save_every", 100), cfg.get("max_skipped", 50)
        self.wait = "rollouts" if stage.on_policy else "data wait"
        self.progress = metrics.Progress(
            workdir.name, self.total, stage=stage.name, headline=stage.headline, wait=self.wait, quiet=not self.first
        )
        self.placement, self.optimizer, trainable = prepare(stage)
        self.train_step = make_train_step(stage, self.optimizer, self.placement, trainable=trainable, seed=cfg.seed)
        self.learning_rates = optim.learning_rates(optim.plan(cfg), self.total)

    # ------------------------------------------------------------------------------------------------------------------
    # The state. The order matters: 1. a checkpoint of this very run, 2. the parameters of another run, 3. from nothing.
    # ------------------------------------------------------------------------------------------------------------------

    def restore(self) -> dict[str, Any] | None:
        """Finds the state; the results, if the run has nothing left to do."""
        cfg, say = self.cfg, self.progress.say
        self.checkpoints = checkpoint.Checkpoints(self.workdir / "checkpoints", cfg.get("keep", 2), say)
        restored = self.checkpoints.restore(self.placement.abstract)
        if restored is None:
            self.state, self.host = _initial_state(self.stage, self.optimizer, self.placement), None
            self.step, self.totals, self.saved_step = 0, Totals(), None
            say(f"{_count(self.state.params)} parameters, {self.total} steps{_origin(cfg)}")
            return None
        self.state, self.host = restored
        self.step, self.totals = int(self.state.step), Totals(**self.host["totals"])
        self.saved_step = self.step
        if results := _finished(self.workdir, self.step, self.total, self.totals, self.max_seconds):
            say(f"already finished ({self.step} steps); delete {self.workdir} to train it again")
            self.checkpoints.close()
            return results
        say(f"resuming from step {self.step} of {self.total}")
        return None

    def make_ready(self, profiled: str | None) -> None:
        """Compiles what can be, puts the data where they were, and opens the records."""
        stage, workdir, progress = self.stage, self.workdir, self.progress
        self.checkpoints.check_space(self.state)
        self.profile = profile_lib.Profile(profiled, workdir / "profile", self.step, self.total)
        self.constants = jax.device_put(stage.constants(), self.placement.constants)
        extra = stage.begin(self.placement, self.constants, self.state.extra, fresh=self.host is None)
        self.state = self.state._replace(extra=extra)
        for shapes in map(self.placement.batch_shapes, stage.batch_shapes()):
            self._compile(shapes, shapes)
        self.data = stage.train_data()
        if self.host is not None:
            self.data.set_state(self.host["data"])

        # From here on the folder says "not finished", also when it had been and the config now asks for more steps.
        self.results_file, self.untrained_file = workdir / "results.json", workdir / "untrained.json"
        self.results_file.unlink(missing_ok=True)
        self.evaluated_before = self.untrained_file.exists()
        since = self.step if self.evaluated_before else -1
        self.log = metrics.MetricsLog(workdir, since, final_step=self.total, writes=self.first)
        self.clock = _Clock(self.began_at, max(self.totals.seconds, self.log.wall))
        devices = list(self.placement.mesh.devices.flat)
        self.runs_when_called = devices[0].platform == "cpu"
        self.suspects = Suspects(workdir / "nonfinite", progress.say)
        self.recorder = metrics.StepRecorder(
            self.log, progress, self.clock, self.log_every, self.totals.skipped, chips.peak(devices),
            on_skip=self.suspects.keep, spikes=self._spikes(),
        )  # fmt: skip
        self.signals = Signals(progress.say, interrupts=jax.process_count() == 1)

    def _spikes(self) -> Spikes:
        """What watches the loss; of stage 5, whose loss is about 0 whatever happens, the norm of the gradient."""
        before = (self.host or {}).get("losses", ())
        return Spikes(self.cfg.get("spikes", 8.0), before, "grad_norm" if self.stage.on_policy else "loss")

    # ------------------------------------------------------------------------------------------------------------------
    # The untrained evaluation. Written before the first step, so that a run that was resumed still has it.
    # ------------------------------------------------------------------------------------------------------------------

    def evaluate_untrained(self) -> None:
        self.goodput.row(self.step)  # this attempt goes on from here
        if self.step == 0 and not multihost.agreed(self.evaluated_before):
            self.progress.say("evaluating before training")
            numbers = self._evaluate(full=True)
            if self.first:
                write_json(self.untrained_file, numbers)
        self.goodput.turn("steps")

    # ------------------------------------------------------------------------------------------------------------------
    # The loop. DO NOT CHANGE THE ORDER within a step:
    #   batch   while the devices are still busy with the step before, so that data cost nothing if they can; one
    #           that needs the new state has to wait for it, and that wait is not its own
    #   step    is only started here; it takes the memory of the old state
    #   log     of the step BEFORE: waiting for this one would leave the devices idle
    #   eval    of the new state, before the save: a resume from there does not repeat it
    #   save    last, when the data have given this step's batch and not the next: a resume goes on right there
    # ------------------------------------------------------------------------------------------------------------------

    def steps(self) -> None:
        out_of_time = _is_over(self.totals, self.max_seconds)
        while self.step < self.total and not out_of_time:
            began = time.monotonic()
            batch, told, waited = self._next_batch()
            self._start(batch, told, waited)
            stops = self._stopping()
            evaluates = self.eval_every and self.step % self.eval_every == 0 and self.step < self.total
            saves = self.step % self.save_every == 0 or self.step == self.total or stops
            traced = self.profile.ends(self.step)
            if evaluates or saves or traced:
                self.recorder.flush()  # here, so that the time of the step is counted as the step's
            self.totals.train_seconds += time.monotonic() - began
            if self.max_seconds:
                out_of_time = multihost.agreed(_is_over(self.totals, self.max_seconds))
                self.progress.view.seconds_left = self.max_seconds - self.totals.train_seconds
            if traced:
                for line in self.profile.stop(self.train_step.texts):
                    self.progress.say(line)
            if evaluates:
                self._evaluate(full=False)
            if saves or out_of_time:
                self._save()
            if traced or evaluates or saves or out_of_time:
                self.recorder.meter.reset()
            if stops:
                raise Interrupted(self.signals.number)

    def _next_batch(self) -> tuple[dict[str, Any], dict[str, float], float]:
        """The batch, what was measured while it was made, and the seconds that it took to come."""
        if self.profile.begins(self.step + 1):
            self.recorder.flush()
            self.progress.say(self.profile.start())
        on_policy = self.stage.on_policy
        if on_policy:
            self.recorder.flush()
        asked = time.monotonic()
        with self.goodput.spent_on(self.wait), TraceAnnotation(self.wait):
            try:
                batch, told = self.stage.next_batch(self.data, self.state)
            except StopIteration:
                raise UserError(
                    f"{self.stage.name}: the training data ended; make them repeat, or lower steps"
                ) from None
        waited = time.monotonic() - asked
        if self.recorder.computing and not on_policy:
            self.goodput.move(waited, "data wait", "steps")  # the devices had work all the while
        return batch, told, waited

    def _start(self, batch: dict[str, Any], told: dict[str, float], waited: float) -> None:
        """Starts the step on this batch, and logs the one before."""
        placed = self.placement.batch({name: x for name, x in batch.items() if name not in self.stage.host_only})
        if self.train_step.is_new(placed):
            self.recorder.flush()
            self._compile(placed, batch)
            self.recorder.meter.reset()
        called = time.monotonic()
        with StepTraceAnnotation("train", step_num=self.step + 1):
            self.state, values = self.train_step(self.state, self.constants, placed)
        called = time.monotonic() - called if self.runs_when_called else 0.0
        self.step += 1
        self.suspects.started(self.step, batch)

        counts, flops = _of_all_processes(self.stage.counts(batch)), _of_all_processes(self.stage.flops(batch))
        sources = _of_all_processes(self.stage.counts_by_source(batch))
        self.totals.add(counts, flops, sources)
        said = {**values, **told, **self.learning_rates(self.step - 1), **self.totals.seen()}
        self.recorder.started(self.step, said, waited, counts, flops, called, sources)
        if 0 < self.max_skipped <= self.recorder.skipped_in_a_row:
            self._give_up(placed)
        self.goodput.row(self.step, due=self.step % self.log_every == 0)

    def _give_up(self, placed: dict[str, Any]) -> None:
        self.recorder.flush()
        names = self.train_step.nonfinite(self.state, self.constants, placed)
        raise UserError(
            f"{self.workdir.name}: no finite gradient for {self.max_skipped} steps (now at {self.step}); "
            f"{words(names)}; batches are in {self.suspects.folder}; lower optim.lr or set optim.clip, and delete "
            f"{self.workdir}"
        )

    def _stopping(self) -> bool:
        """Whether a signal asks for it. Several processes look at each other's now and then: all stop at one step."""
        if jax.process_count() == 1:
            return self.signals.requested
        return self.step % self.log_every == 0 and multihost.agreed(self.signals.requested)

    # ------------------------------------------------------------------------------------------------------------------
    # The final evaluation and the results. Written last: results.json says that the stage is finished.
    # ------------------------------------------------------------------------------------------------------------------

    def finish(self) -> dict[str, Any]:
        with self.goodput.spent_on("checkpoint"):
            self.checkpoints.wait()
        self.progress.close()
        self.progress.say("evaluating after training")
        numbers = self._evaluate(full=True)
        with self.goodput.spent_on("evaluation"), self.signals.interruptible():
            _write_samples(self.stage, self.state, self.workdir / "samples", self.first)
        self.totals.seconds = self.clock()
        self.goodput.row(self.step)
        found = self.goodput.summary()
        self.progress.say(goodput_lib.line(found))
        results = _results(self.stage, self.untrained_file, numbers, self.step, self.totals)
        results |= {"step_memory": self.train_step.memory, "goodput": found}
        if self.first:
            write_json(self.results_file, results)
        return results

    def leave(self) -> None:
        """Saves, as it was asked to stop."""
        if self.saved_step != self.step:
            self._save()
        with self.goodput.spent_on("checkpoint"):
            self.checkpoints.wait()
        self.goodput.row(self.step, signal=self.signals.number or 0)
        self.progress.say(f"stopped at step {self.step} of {self.total}, saved; run the same command to go on")

    def close(self) -> None:
        with contextlib.ExitStack() as leaving:  # all of them, also when one fails on a full disk
            ends = (self.checkpoints, self.data, self.log, self.progress, self.profile)
            for close in (*(part.close for part in ends), self.signals.restore):
                leaving.callback(close)
            leaving.callback(self.goodput.row, self.step)

    # --- parts of the above -------------------------------------------------------------------------------------------

    def _compile(self, placed: Any, shown: dict[str, Any]) -> None:
        self.progress.say(f"compiling the step for {_shapes(shown)}")
        with self.goodput.spent_on("compile"):
            self.train_step.compile(self.state, self.constants, placed)

    def _evaluate(self, *, full: bool) -> dict[str, float]:
        """Of the state, and its row in the log."""
        with self.goodput.spent_on("evaluation"), self.signals.interruptible():
            numbers = self.stage.evaluate(state_lib.evaluated(self.cfg, self.state), self.state.extra, full=full)
        self.log.write(self.step, self.clock(), "eval", numbers)
        return numbers

    def _save(self) -> None:
        """A checkpoint of this moment. The row of its step comes first: a resume removes rows and never adds one."""
        self.recorder.flush()
        self.totals.seconds, self.totals.skipped = self.clock(), self.recorder.skipped
        with self.goodput.spent_on("checkpoint"):
            host: dict[str, Any] = {"data": self.data.get_state(), "totals": dataclasses.asdict(self.totals)}
            host["losses"] = self.recorder.spikes.losses
            self.checkpoints.save(self.step, self.state, host)
        self.goodput.row(self.step)
        self.saved_step = self.step


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


def _of_all_processes(counted: Any) -> Any:
    """What this process counted of its rows, numbers in any tree, times the processes: each has as many."""
    return jax.tree.map(lambda n: n * jax.process_count(), counted)


def _is_over(totals: Totals, max_seconds: float) -> bool:
    return bool(max_seconds) and totals.train_seconds >= max_seconds


def _initial_state(stage: Stage, optimizer: Any, placement: state_lib.Placement) -> state_lib.TrainState:
    """From nothing, then what the stage reads from files, then what another run gives; the last one counts."""
    cfg = stage.cfg
    params: Any = None
    init_from, subtrees = cfg.get("init_from", ""), cfg.get("init_subtrees", ())
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
