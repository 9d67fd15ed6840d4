"""What does it bring that a row which is done is refilled at once? The engine against the group sampler.

    python benchmarks/engine.py [--slots 32] [--group 8] [--prompts 64] [--new 256] [--rounds 3] [--out FILE]
    python benchmarks/engine.py --prompts 64 --slots 512 --rows 128 --new 14 --means 5 9   # a step of stage 5 at nano
    python benchmarks/engine.py --group 1 --prompts 512 --slots 64 --new 24 --means 5 9    # an evaluation

The language model and the encoder of size=nano, prompts of its reinforcement learning (a picture and a question each),
`--group` answers to each. The sampler answers slots / group prompts a call, and a call ends with its longest answer;
the engine has as many rows (or --rows), gets all requests at once, and reads a prompt once for its group, too. Answers
are the same token for token, which is checked first: so both do the same work.

Weights are written by hand, so that lengths have a heavy tail as those of reasoning models have: a text is of one of
two kinds, told by its last token, of which four in five end after 12 tokens on average and one in five after 150, or
--means.

Prints one JSON line: lengths, steps of decoding, and tokens/s of whole runs in turns, prompts included, on the clock
and of processor time; and what the host had to do with a round, which on a CPU is its thread's own time.
"""

from __future__ import annotations

import argparse
import os
import time
from typing import Any

import numpy as np
from contest import emit, environment, in_turns, significant, spread

SHORT, MEANS = 0.8, (12.0, 150.0)
KINDS = ("count", "ground", "read")


def model() -> tuple[Any, Any, Any]:
    """(config, tokenizer, prompt batches' builder)."""
    from glmv_jax import presets
    from glmv_jax.data.building import DocumentBuilder
    from glmv_jax.data.naflex import Patcher
    from glmv_jax.data.tokenizer import Tokenizer
    from glmv_jax.models import build

    sizes = presets.DOCUMENTS["nano"]
    cfg, tokenizer = build.vlm(presets.vlm("nano")), Tokenizer()
    patcher = Patcher(patch=cfg.vision.patch, max_patches=sizes["image_patches"])
    return cfg, tokenizer, DocumentBuilder(tokenizer, patcher, sizes["prompt_tokens"], sizes["image_patches"])


def weights(cfg: Any, tokenizer: Any, means: tuple[float, float]) -> Any:
    """Fresh ones, in which all branches are 0, so that the next token depends on the last alone: of its own kind almost
    surely, or the end with the probability that makes the mean length of the kind."""
    import jax
    import jax.numpy as jnp

    from glmv_jax import models

    params = models.init_params(cfg, jax.random.key(0))
    rng, (V, D) = np.random.default_rng(0), (cfg.decoder.vocab, cfg.decoder.width)
    kind = np.where(rng.random(V) < SHORT, 1.0, -1.0)
    table, head = rng.normal(size=(V, D)), 0.02 * rng.normal(size=(D, V))
    table[:, 0], table[:, 1] = 8 * kind, 8.0
    table[tokenizer.special["</think>"], :2] = 0  # what a prompt ends with has no kind, and no answer is empty
    scale = 8 / ((table**2).mean(axis=1)).mean() ** 0.5  # of the first two numbers of a hidden state
    head[0], head[1] = 3 * kind / scale, 0
    drawn = np.setdiff1d(np.arange(V), list(tokenizer.special.values()))
    counts = [(kind[drawn] == sign).sum() for sign in (1, -1)]
    wanted = [3 + np.log(count / mean) for count, mean in zip(counts, means)]  # logits of the end, after either kind
    for stop in tokenizer.stops:
        head[:, stop] = 0
        head[1, stop] = -9
    end = tokenizer.eos
    head[0, end], head[1, end] = (wanted[0] - wanted[1]) / 2 / scale, sum(wanted) / 2 / scale
    params["decoder"]["embed"]["embedding"] = jnp.asarray(table, jnp.float32)
    params["decoder"]["head"] = jnp.asarray(head, jnp.float32)
    return params


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=256, help="tokens of an answer at most")
    parser.add_argument("--rows", type=int, help="slots of the engine, in place of --slots")
    parser.add_argument("--lanes", type=int, default=16, help="prompts that it reads at once")
    parser.add_argument("--means", type=float, nargs=2, default=MEANS, help="tokens of an answer of either kind")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="also write the JSON line there")
    args = parser.parse_args()

    import jax

    from glmv_jax.inference import Prompts, Sampler, Sampling
    from glmv_jax.inference.engine import Engine
    from glmv_jax.inference.requests import Prompt, Request
    from glmv_jax.inference.settings import Settings
    from glmv_jax.parallel.host import prepare_memory
    from glmv_jax.rl.prompts import prompts

    prepare_memory()
    cfg, tokenizer, builder = model()
    params = jax.device_put(weights(cfg, tokenizer, tuple(args.means)))
    sampling = Sampling.chat(tokenizer, args.new)
    per_call, N = args.slots // args.group, args.prompts * args.group
    data = prompts(dict.fromkeys(KINDS, 1.0), builder, batch=per_call)
    batches = [next(data) for _ in range(args.prompts // per_call)]

    sampler = Sampler(cfg, sampling, args.group)

    def by_sampler() -> list[np.ndarray]:
        found = []
        for n, batch in enumerate(batches):
            out = jax.device_get(sampler(params, Prompts.of(batch), jax.random.key(n)))
            found += [tokens[:length] for tokens, length in zip(out.tokens, out.lengths)]
        return found

    settings = Settings(
        args.rows or args.slots, length=builder.max_tokens + args.new, alone=min(args.new, 64), lanes=args.lanes,
        chunks=(16, 48), patches=(builder.max_patches,), queue=N,
    )  # fmt: skip
    engine = Engine(cfg, params, sampling, settings)
    engine.warm()
    traces = engine.traces
    requests = [Request(prompt, seed=n, draw=i * args.group + g)
                for n, batch in enumerate(batches) for i in range(per_call)
                for prompt in [Prompt.of_row(batch, i)] for g in range(args.group)]  # fmt: skip

    def by_engine() -> list[np.ndarray]:
        engine.set_params(params, 0)  # forgets what it has read
        found: list[Any] = [None] * N
        for n, request in enumerate(requests):
            engine.submit(request, lambda done, n=n: found.__setitem__(n, done.tokens))
        engine.run()
        return found

    def timed(run: Any) -> tuple[float, ...]:
        """Seconds on the clock, of processors, and of the thread that calls the programs."""
        clocks = time.perf_counter, time.process_time, time.thread_time
        began = [clock() for clock in clocks]
        run()
        return tuple(clock() - start for clock, start in zip(clocks, began))

    answers = {"sampler": by_sampler(), "engine": by_engine()}
    same = np.mean([np.array_equal(a, b) for a, b in zip(*answers.values())])
    lengths = np.array([len(tokens) for tokens in answers["engine"]])
    if same < 0.99:
        raise SystemExit(f"engine.py: only {same:.3f} of the answers agree; nothing was timed")
    counts = engine.counts
    before = counts.places, counts.drawn
    seconds = in_turns({"sampler": lambda: timed(by_sampler), "engine": lambda: timed(by_engine)}, args.rounds, 600.0)
    if engine.traces != traces:
        raise SystemExit(f"engine.py: {engine.traces - traces} programs were compiled after warm-up")
    rates = {name: lengths.sum() / np.array(times) for name, times in seconds.items()}  # [rounds, 3]
    longest = [lengths[i : i + args.slots].max() for i in range(0, N, args.slots)]
    record = {
        "benchmark": "engine", **{k: v for k, v in vars(args).items() if k != "out"},
        "device": jax.devices()[0].device_kind,
        "answers equal": float(same),
        "lengths": {"mean": significant(lengths.mean())} | {
            f"p{q}": int(np.percentile(lengths, q)) for q in (50, 90, 99, 100)},
        "steps of decoding": {
            "sampler": int(sum(longest)), "engine": (counts.places - before[0]) // settings.slots // args.rounds},
        "rows busy": {
            "sampler": significant(lengths.sum() / (sum(longest) * args.slots), 3),
            "engine": significant((counts.drawn - before[1]) / (counts.places - before[0]), 3)},
        "tokens a second": {name: spread(x[:, 0]) for name, x in rates.items()},
        "tokens a processor second": {name: spread(x[:, 1]) for name, x in rates.items()},
        "engine / sampler": significant(np.median(rates["engine"][:, 0]) / np.median(rates["sampler"][:, 0]), 3),
        "engine / sampler, a processor second": significant(
            np.median(rates["engine"][:, 1]) / np.median(rates["sampler"][:, 1]), 3),
        "host seconds a round": {name: spread(np.array(times)[:, 2]) for name, times in seconds.items()},
        "load": significant(os.getloadavg()[0], 2),  # of all that ran on the machine at the end
        **environment(),
    }  # fmt: skip
    emit(record, args.out)


if __name__ == "__main__":
    main()
