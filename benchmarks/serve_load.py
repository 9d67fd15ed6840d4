"""Does `glmv serve` hold under load? Many streams at once, in both wire formats, and SIGTERM in the middle of them.

    python benchmarks/serve_load.py [RUN] [--streams 200] [--seconds 300] [--out benchmarks/results/serve_load_cpu.json]

RUN: a run's folder or a checkpoint; without one a fresh nano model, whose answers are as long as they may be. A real
server is started as a process, on any port. --streams clients each ask one question after the other: half of them as
OpenAI's, half as Anthropic's; a third shows images, a fifth has tools or their results, one of twelve leaves early, one
of twenty wants its answer in one body; answers of 8 to 512 tokens, p ~ length^-0.8. Halfway --burst more come at once,
past what the server lets in, to be refused and to come back when they are told to. After --seconds nobody asks anew,
and the server gets SIGTERM while all streams run.

Prints a table; --out keeps it as a line of JSON, the courses of memory and latency beside it as .svg. Exits with 1 when
an answer was lost or was not as its format has it, the server compiled anything, did not end by itself with 0, or
refused without saying when to come back. Times are those of the client, on the same cores as the server.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any

from serve_client import Outcome, ask
from serve_questions import Questions
from serve_report import plot, table, told, wrong

ROOT = pathlib.Path(__file__).resolve().parent.parent
DRAIN, SPARE = 25, 10  # seconds: of the server after SIGTERM, and until it is said to hang

# --- the server -------------------------------------------------------------------------------------------------------


def fresh(folder: pathlib.Path) -> None:
    """A nano model without any training, in the form of a finished stage."""
    import jax
    import jax.numpy as jnp

    from glmv_jax import config, models
    from glmv_jax.models import build
    from glmv_jax.train.checkpoint import Checkpoints, quiet_orbax
    from glmv_jax.train.state import TrainState

    quiet_orbax()
    cfg = config.load(f"{ROOT}/experiments/vlm_sft.py:size=nano")
    params = models.init_params(build.vlm(cfg.model), jax.random.key(0))
    checkpoints = Checkpoints(folder / "checkpoints")
    checkpoints.save(0, TrainState(jnp.int32(0), params, {}, {}), {})
    checkpoints.wait()
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps(config.flat(cfg)), encoding="utf-8")
    (folder / "results.json").write_text("{}", encoding="utf-8")


class Server:
    """The process, its port, and what it says."""

    def __init__(self, checkpoint: pathlib.Path, log: pathlib.Path, args: argparse.Namespace) -> None:
        words = ["serve", "--checkpoint", checkpoint, "--name", "it", "--port", "0", "--slots", args.slots,
                 "--length", "1024", "--image-patches", "256", "--requests", args.requests, "--drain", DRAIN,
                 *args.serve]  # fmt: skip
        env = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_LOG_COMPILES": "1"}
        env.pop("GLMV_API_KEY", None)
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen([sys.executable, "-m", "glmv_jax.cli", *map(str, words)], cwd=ROOT, env=env,
                                            text=True, stdout=subprocess.PIPE, stderr=file)  # fmt: skip
        line = self.process.stdout.readline()
        if (found := re.search(r"it at http://127\.0\.0\.1:(\d+)/v1", line)) is None:
            self.process.kill()
            raise SystemExit(f"serve_load: the server did not start: {log.read_text()[-2000:]}")
        self.port, self._said = int(found[1]), log.stat().st_size

    def compiled(self) -> list[str]:
        """What was compiled since it listens, by its log."""
        return re.findall(r"Compiling (\S+)", self.log.read_text()[self._said :])

    def megabytes(self) -> float:
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def processor_seconds(self) -> float:
        fields = pathlib.Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def metrics(self) -> dict[str, float]:
        """What /metrics says, by name with labels."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        text = (await reader.read()).decode().partition("\r\n\r\n")[2]
        writer.close()
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, _, value in lines if name.startswith("glmv_")}


# --- the load ---------------------------------------------------------------------------------------------------------


class Load:
    """All clients of one run. rows: a second each, what the server holds then."""

    def __init__(self, server: Server, args: argparse.Namespace) -> None:
        self.server, self.args, self.questions = server, args, Questions("it")
        self.outcomes: list[Outcome] = []
        self.rows: list[dict[str, float]] = []
        self.running, self.over = 0, False
        self.start = time.monotonic()
        self.ended: dict[str, Any] = {}

    async def run(self) -> None:
        args, self.start = self.args, time.monotonic()
        before = await self.server.metrics()
        watch = asyncio.create_task(self._watch())
        clients = [asyncio.create_task(self._client(3.0 * n / args.streams)) for n in range(args.streams)]
        await asyncio.sleep(args.seconds / 2)
        clients += [asyncio.create_task(self._until_answered()) for _ in range(args.burst)]
        await asyncio.sleep(args.seconds / 2)
        self.over = True
        watch.cancel()
        metrics = await self.server.metrics()
        await asyncio.sleep(0.3)  # what was asked just now has arrived
        at = time.monotonic()
        self.ended = {"running": self.running, "at": at - self.start, "metrics": metrics,
                      "compiled_at_start": before["glmv_engine_compilations_total"]}  # fmt: skip
        self.server.process.send_signal(signal.SIGTERM)
        late = [await ask(self.server.port, self.questions.draw(8)) for _ in range(3)]
        ended = asyncio.create_task(asyncio.to_thread(self._exit, at))
        await asyncio.gather(*clients)
        self.ended["answers"] = max(x.asked + x.took for x in self.outcomes) - at
        await ended
        self.ended["late"] = [f"refused {x.status}" if x.status else "no connection" for x in late]

    def _exit(self, at: float) -> None:
        try:
            self.ended["code"] = self.server.process.wait(DRAIN + SPARE)
        except subprocess.TimeoutExpired:
            self.ended["code"] = None
            self.server.process.kill()
            self.server.process.wait()
        self.ended["seconds"] = time.monotonic() - at

    async def _client(self, after: float) -> None:
        await asyncio.sleep(after)
        while not self.over:
            await self._until_answered()

    async def _until_answered(self) -> None:
        """One question, again and again as long as it is refused for now."""
        question = self.questions.draw()
        while True:
            self.running += 1
            outcome = await ask(self.server.port, question)
            self.running -= 1
            self.outcomes.append(outcome)
            if outcome.after is None:
                return
            await asyncio.sleep(outcome.after)
            if self.over:
                return

    async def _watch(self) -> None:
        """Once a second: memory, files, and who runs."""
        for second in itertools.count():
            await asyncio.sleep(max(0.0, self.start + second - time.monotonic()))
            metrics = await self.server.metrics()
            self.rows.append({
                "second": time.monotonic() - self.start, "megabytes": self.server.megabytes(),
                "files": self.server.files(), "processor": self.server.processor_seconds(), "streams": self.running,
                "rows": metrics["glmv_engine_rows_running"], "waiting": metrics["glmv_engine_waiting"],
                "drawn": metrics["glmv_drawn_tokens_total"],
            })  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=pathlib.Path, help="what is served (default: a fresh nano model)")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--burst", type=int, help="clients that come at once halfway (default: 0.4 of --streams)")
    parser.add_argument("--slots", type=int, default=64, help="rows of the server's engine")
    parser.add_argument("--requests", type=int, help="answers that the server lets in (default: 1.2 of --streams)")
    parser.add_argument("--serve", nargs=argparse.REMAINDER, default=[], help="more options of the server; last")
    parser.add_argument("--out", type=pathlib.Path, help="file for the JSON line; the plot goes beside it")
    args = parser.parse_args()
    args.burst = int(0.4 * args.streams) if args.burst is None else args.burst
    args.requests = args.requests or int(1.2 * args.streams)
    sys.path.insert(0, str(ROOT))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from contest import environment, save

    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary)
        if args.run is None:  # in a process of its own, which takes its memory with it
            with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                pool.submit(fresh, folder / "fresh").result()
        server = Server(args.run or folder / "fresh", folder / "log", args)
        load = Load(server, args)
        try:
            asyncio.run(load.run())
        finally:
            server.process.kill()
            server.process.wait()
        found = told(load.outcomes, load.rows, load.ended, load.start) | {"compiled": server.compiled()}
    print(table(found))
    problems = wrong(found, DRAIN)
    for problem in problems:
        print(f"WRONG: {problem}")
    sizes = {name: getattr(args, name) for name in ("streams", "seconds", "burst", "slots", "requests", "serve")}
    record = {"benchmark": "serve_load", **sizes, **found, "wrong": problems, "load": os.getloadavg()[0],
              "environment": environment(), "courses": load.rows}  # fmt: skip
    if args.out:
        save(record, args.out)
        args.out.with_suffix(".svg").write_text(plot(load.outcomes, load.rows, load.start), encoding="utf-8")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
