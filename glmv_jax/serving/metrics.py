"""What a server counts, in the text form of Prometheus (version 0.0.4). Seconds are of the monotonic clock."""

from __future__ import annotations

import bisect
import collections
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glmv_jax.inference.front import Front
    from glmv_jax.serving.answers import Ended, Part

BOUNDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Seconds, counted by upper bounds."""

    def __init__(self) -> None:
        self.counts, self.total = [0] * (len(BOUNDS) + 1), 0.0

    def add(self, seconds: float) -> None:
        self.counts[bisect.bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def lines(self, name: str) -> list[str]:
        below, lines = 0, []
        for bound, count in zip([*BOUNDS, "+Inf"], self.counts):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        return [*lines, f"{name}_sum {self.total:.6f}", f"{name}_count {below}"]


class Metrics:
    """Counts of one server."""

    def __init__(self) -> None:
        self.replies: collections.Counter[tuple[str, int]] = collections.Counter()  # by path and status
        self.ended: collections.Counter[str] = collections.Counter()
        self.prompt_tokens = self.drawn_tokens = 0
        self.first, self.whole = Histogram(), Histogram()
        self._lately: collections.deque[float] = collections.deque(maxlen=64)

    def began(self, prompt_tokens: int) -> Watch:
        """An answer was begun."""
        self.prompt_tokens += prompt_tokens
        return Watch(self)

    def seconds_an_answer(self) -> float:
        """How long the last answers took, on average; 1 before any was done."""
        return sum(self._lately) / len(self._lately) if self._lately else 1.0

    def ended_answer(self, reason: str, seconds: float) -> None:
        self.ended[reason] += 1
        self.whole.add(seconds)
        self._lately.append(seconds)

    def text(self, front: Front, running: int) -> str:
        """All of it. front: whose engine is counted too; running: answers that are not done."""
        engine, lines = front.engine, []

        def family(name: str, kind: str, about: str, *values: str) -> None:
            lines.extend([f"# HELP glmv_{name} {about}", f"# TYPE glmv_{name} {kind}", *values])

        def one(name: str, kind: str, about: str, value: float) -> None:
            family(name, kind, about, f"glmv_{name} {value}")

        replies = [f'{{path="{path}",status="{status}"}} {n}' for (path, status), n in sorted(self.replies.items())]
        family("http_replies_total", "counter", "Replies by path and status.",
               *(f"glmv_http_replies_total{labels}" for labels in replies))  # fmt: skip
        family("answers_total", "counter", "Answers that ended, by why.",
               *(f'glmv_answers_total{{reason="{r}"}} {n}' for r, n in sorted(self.ended.items())))  # fmt: skip
        one("prompt_tokens_total", "counter", "Tokens of prompts, images included.", self.prompt_tokens)
        one("drawn_tokens_total", "counter", "Tokens of answers.", self.drawn_tokens)
        one("answers_running", "gauge", "Answers that run or wait.", running)
        one("engine_rows_running", "gauge", "Rows of the engine that work.", engine.running)
        one("engine_rows", "gauge", "Rows of the engine.", engine.settings.slots)
        one("engine_waiting", "gauge", "Requests without a row.", engine.waiting)
        one("engine_read_tokens_total", "counter", "Tokens of prompts that were read.", engine.counts.read)
        one("engine_reused_tokens_total", "counter", "Tokens of prompts that had been read.", engine.counts.reused)
        one("engine_encoded_pictures_total", "counter", "Pictures that were encoded.", engine.counts.encoded)
        one("engine_drafts_judged_total", "counter", "Tokens that the MTP head drafted.", engine.counts.reached.sum())
        one("engine_drafts_kept_total", "counter", "Drafts that were kept.", engine.counts.accepted.sum())
        one("engine_compilations_total", "counter", "Programs of the engine that were compiled.", engine.traces)
        family("first_token_seconds", "histogram", "Until an answer's first token.",
               *self.first.lines("glmv_first_token_seconds"))  # fmt: skip
        family("answer_seconds", "histogram", "Until an answer's end.", *self.whole.lines("glmv_answer_seconds"))
        return "\n".join(lines) + "\n"


class Watch:
    """The clock of one answer."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._start, self._reason, self._begun = metrics, time.monotonic(), "", False

    def part(self, part: Part | Ended) -> None:
        """Told of each part."""
        if reason := getattr(part, "reason", ""):  # it has ended
            self._reason = reason
            return
        drawn: Any = part.tokens
        if not self._begun and len(drawn):
            self._begun = True
            self._metrics.first.add(time.monotonic() - self._start)
        self._metrics.drawn_tokens += len(drawn)

    def done(self) -> None:
        """The answer ended, or whoever asked has gone."""
        self._metrics.ended_answer(self._reason or "left", time.monotonic() - self._start)
