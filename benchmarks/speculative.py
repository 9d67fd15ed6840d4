"""What does the MTP head bring when it drafts? Accept length, tokens a second, and where drafting starts to pay.

    python benchmarks/speculative.py [RUN/pretrain | RUN/sft] [--drafts 1 2 3] [--batch 1 8] [--out FILE]

The argument is a stage's work directory. Without one a model of size=nano is trained here, with the recipe of
experiments/vlm_pretrain.py from a fresh encoder, for --train-steps steps (a minute or two on two idle cores): it tells
how the parts fit together, and little of what a trained model accepts. Prompts are held-out documents, cut after their
first words (a model after sft gets questions in the chat template): text alone, and with an image.

Prints one JSON line. Greedy and at temperature 1, on text and on images: the rate at which each draft is kept, and the
tokens a pass yields (accept length). Then, at each batch size: tokens/s plain and with K drafts, in turns, each the
quickest of its rounds; the costs that were measured apart (a pass over K + 1 tokens and a token of the head, over a
plain step); the speed-up that rates and costs give; and the rate of every draft at which drafting starts to pay
(null: at these costs not even sure drafts would).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import pathlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from contest import emit, environment, in_turns, log, significant

REPO = pathlib.Path(__file__).resolve().parent.parent


def train(folder: str, steps: int) -> None:
    """Stage 3 at size=nano, from nothing."""
    from glmv_jax import config
    from glmv_jax.train import main

    cfg = config.load(f"{REPO}/experiments/vlm_pretrain.py:size=nano")
    cfg.steps, cfg.init_subtrees, cfg.eval.documents, cfg.save_every = steps, (), 16, steps
    main.run(cfg, folder)


@dataclasses.dataclass(frozen=True)
class Subject:
    """A trained model and its prompts (`inference.Prompt`) by kind, text and image."""

    cfg: Any
    params: Any
    tokenizer: Any
    prompts: dict[str, Any]


def load(folder: str, count: int) -> Subject:
    import jax

    from glmv_jax.data import heldout, texts
    from glmv_jax.data.building import DocumentBuilder
    from glmv_jax.data.naflex import Patcher
    from glmv_jax.data.tokenizer import Tokenizer
    from glmv_jax.eval import drafts
    from glmv_jax.models import build
    from glmv_jax.train import checkpoint

    checkpoint.quiet_orbax()
    cfg = checkpoint.load_config(folder)
    model, d = build.vlm(cfg.model), cfg.data
    tokenizer = Tokenizer(d.vocabulary or None)
    patcher = Patcher(patch=model.vision.patch, temporal=model.vision.temporal_patch, max_patches=d.image_patches)
    builder = DocumentBuilder(tokenizer, patcher, d.tokens, d.patches)
    asked = heldout.heldout_questions(list(cfg.eval.kinds), -(-count // len(cfg.eval.kinds)))
    asked = [sample for kind in zip(*asked.values()) for sample in kind][:count]
    read = texts.Texts("heldout", 1)
    form = "pretrain" if cfg.stage == "pretrain" else "chat"
    prompts = drafts.continued([read[i] for i in range(count)], asked, builder, form)
    return Subject(model, jax.device_put(checkpoint.load_params(folder)), tokenizer, prompts)


def engine(subject: Subject, slots: int, new: int, drafts: int, **sampling: Any) -> Any:
    """An engine that decodes without interruption."""
    from glmv_jax.inference import Engine, Sampling, Settings

    asked = [prompt for of_kind in subject.prompts.values() for prompt in of_kind]
    pictures = [picture for prompt in asked for picture in prompt.pictures]
    longest = max(len(prompt.tokens) for prompt in asked)
    settings = Settings(
        slots=slots, length=longest + new, alone=new, chunks=(longest,), lanes=slots, drafts=drafts,
        patches=(max(len(picture.patches) for picture in pictures),),
    )  # fmt: skip
    return Engine(subject.cfg, None, dataclasses.replace(Sampling.chat(subject.tokenizer, new), **sampling), settings)


def acceptances(subject: Subject, drafts: int, new: int) -> dict[str, Any]:
    """Rates and accept length by kind of prompt, greedy and drawn."""

    from glmv_jax.eval import drafts as drafts_eval
    from glmv_jax.inference import acceptance

    found: dict[str, Any] = {}
    drafting = engine(subject, max(map(len, subject.prompts.values())), new, drafts)
    for temperature in (0.0, 1.0):
        counts_of = drafts_eval.counts(drafting, subject.params, subject.prompts, temperature=temperature)
        for kind, counts in counts_of.items():
            rates = acceptance.rates(counts)
            found[f"{kind}, temperature {temperature:g}"] = {
                "rates": [finite(rate) for rate in rates],
                "accept length": significant(acceptance.accept_length(rates), 4), "passes": counts.passes,
            }  # fmt: skip
            log(kind, temperature, found[f"{kind}, temperature {temperature:g}"])
    return found


def costs(subject: Subject, batch: int, widths: list[int], rounds: int, repeats: int = 32) -> dict[int, float]:
    """Seconds of the backbone's pass over T tokens, by T, and, under 0, of one draft: with logits and the likeliest."""
    import jax
    import jax.numpy as jnp

    from glmv_jax.inference.sampler import Prompts, Sampling, likeliest, prefill
    from glmv_jax.models import drafting, vlm
    from glmv_jax.typing import TokenInput

    cfg, sampling = subject.cfg, Sampling.chat(subject.tokenizer, 1, temperature=0.0)
    ids = [prompt.tokens for prompt in subject.prompts["text"][:batch]]
    length = np.array([len(x) for x in ids], np.int32)
    tokens = np.stack([np.pad(x, (0, length.max() - len(x))) for x in ids])
    positions = np.broadcast_to(np.arange(length.max(), dtype=np.int32)[:, None], (*tokens.shape, 3))
    prompts = Prompts(None, tokens, positions, np.full_like(tokens, -1), length, length)

    def steps(width: int, repeats, params, prompts):
        """The same step over and over, each from what the one before said; the number of them is no part of the
        program, so that a call without any tells what a call costs beside them."""
        out = prefill(cfg, params, prompts)
        cache = vlm.share_prompts(cfg, out.cache, 1, 64)
        slots = tokens.shape[1] + 64
        head = drafting.empty_cache(cfg, batch, slots) | {"slots": jnp.arange(slots), "length": prompts.length}
        params, cache = vlm.layers_apart(cfg, params, cache, batch * (width or 2))
        T = max(width, 1)
        positions = jnp.broadcast_to((prompts.next_position[:, None] + jnp.arange(T))[..., None], (batch, T, 3))

        def step(_, state):
            token, h = state
            if width:
                tokens = TokenInput(token, positions, jnp.ones_like(token), -jnp.ones_like(token))
                hidden = vlm.apply(cfg, params, None, tokens, cache).hidden
            else:
                (h, hidden), _ = drafting.step(cfg, params, h, token, positions, head)
            return likeliest(vlm.logits(cfg, params, hidden), sampling), h

        start = jnp.ones((batch, T), jnp.int32), jnp.zeros((batch, T, cfg.decoder.width), cfg.decoder.dtype)
        return jax.lax.fori_loop(0, repeats, step, start)[0]

    def timed(program: Callable, repeats: int) -> float:
        began = time.perf_counter()
        jax.block_until_ready(program(repeats, subject.params, prompts))
        return time.perf_counter() - began

    programs = {width: jax.jit(functools.partial(steps, width)) for width in (0, *widths)}
    runs = {(w, n): functools.partial(timed, program, n) for w, program in programs.items() for n in (0, repeats)}
    for run in runs.values():
        run()  # compiles
    best = {name: min(values) for name, values in in_turns(runs, rounds, 60.0).items()}
    return {width: (best[width, repeats] - best[width, 0]) / repeats for width in programs}


def speeds(subject: Subject, batch: int, drafts: list[int], new: int, rounds: int) -> dict[str, Any]:
    """Greedy tokens/s by kind of prompt, plain (under 0) and with K drafts, each the quickest of the rounds: of whole
    calls, and of the steps after the first token (a call for `new` tokens less a call for one). Answers are as long as
    `new` (nothing stops them), so that all sides write the same tokens."""
    from glmv_jax.inference import Request
    from glmv_jax.inference.batches import complete

    engines = {K: engine(subject, batch, new, K, temperature=0.0, stop=()) for K in (0, *drafts)}
    calls_of = [(K, n) for K in engines for n in (1, new)]
    found = {}
    for kind, prompts in subject.prompts.items():
        asked = prompts[: max(1, 8 // batch) * batch]

        def answer(which: tuple[int, int], asked: list = asked) -> tuple[float, list, int]:
            K, n = which
            before = engines[K].counts.passes
            began = time.perf_counter()
            done = complete(engines[K], subject.params, [Request(prompt, max_new_tokens=n) for prompt in asked])
            return time.perf_counter() - began, [x.tokens.tolist() for x in done], engines[K].counts.passes - before

        for which in calls_of:
            answer(which)  # compiles
        first = {which: answer(which) for which in calls_of}
        same = {K: first[K, new][1] == first[0, new][1] for K in drafts}
        if not all(same.values()):
            raise SystemExit(f"speculative.py: greedy answers with drafts differ from the plain ones: {same}")
        times = in_turns({w: functools.partial(lambda w: answer(w)[0], w) for w in calls_of}, rounds, 90.0)
        best = {which: min(seconds) for which, seconds in times.items()}
        calls = {K: best[K, new] for K in (0, *drafts)}
        steps = {K: best[K, new] - best[K, 1] for K in calls}
        answers = len(asked)
        passes = {K: first[K, new][2] for K in drafts}
        found[kind] = {
            "steps: tokens/s": {K: significant(answers * (new - 1) / seconds) for K, seconds in steps.items()},
            "steps: speed-up": {K: significant(steps[0] / steps[K], 3) for K in drafts},
            "calls: tokens/s": {K: significant(answers * new / seconds) for K, seconds in calls.items()},
            "calls: speed-up": {K: significant(calls[0] / calls[K], 3) for K in drafts},
            "tokens a pass": {K: significant(answers * new / passes[K]) for K in drafts},
        }
        log(batch, kind, found[kind])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", help="a stage's work directory, pretrain or sft")
    parser.add_argument("--drafts", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompts", type=int, default=32, help="of each kind")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each side")
    parser.add_argument("--train-steps", type=int, default=120, help="without a run")
    parser.add_argument("--out", help="also write the JSON line there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.run is None:
            train(folder, args.train_steps)
        subject = load(args.run or folder, args.prompts)
    emit(record(subject, args), args.out)


def finite(value: float) -> float | None:
    """For JSON: None for a rate of a draft that was never reached, and for a break-even that there is not."""
    return significant(value, 3) if math.isfinite(value) else None


def record(subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    import jax

    from glmv_jax.inference import acceptance

    found = acceptances(subject, max(args.drafts), args.new)
    greedy = {
        kind: [rate or 0.0 for rate in found[f"{kind}, temperature 0"]["rates"]] for kind in subject.prompts
    }  # fmt: skip
    rows = []
    for batch in args.batch:
        seconds = costs(subject, batch, [1, *(K + 1 for K in args.drafts)], args.rounds)
        plain, draft = seconds[1], seconds[0] / seconds[1]
        row: dict[str, Any] = {
            "batch": batch,
            "plain step ms": significant(1e3 * plain),
            "draft": significant(draft, 3),
        }
        row["verify"] = {K: significant(seconds[K + 1] / plain, 3) for K in args.drafts}
        row["break-even rate"] = {
            K: finite(acceptance.break_even(K, seconds[K + 1] / plain, draft)) for K in args.drafts
        }  # fmt: skip
        row["speed-up of these rates and costs, greedy"] = {
            kind: {
                K: finite(acceptance.speedup(greedy[kind][:K], seconds[K + 1] / plain, draft)) for K in args.drafts
            }
            for kind in subject.prompts
        }  # fmt: skip
        rows.append(row | speeds(subject, batch, args.drafts, args.new, args.rounds))
    run = {"run": pathlib.Path(args.run).name} if args.run else {"trained here, steps": args.train_steps}
    return {
        "benchmark": "speculative", **run, "new": args.new, "prompts of a kind": args.prompts,
        "device kind": jax.devices()[0].device_kind, "acceptance": found, "rows": rows, **environment(),
    }  # fmt: skip


if __name__ == "__main__":
    main()
