"""How many answers a second does a step of GRPO train on, against TRL's GRPOTrainer on torch?

The same text model (GLM-OCR's decoder with random weights, written by transformers), prompts, group size, lengths,
reward and optimiser on both sides, and no KL: prompts are sampled from with a cache, answers are graded, advantages
computed, and one update made. Ours is what stage 5 is made of: the sampler, which encodes a prompt once for its group,
rows in which the answers of a group share their prompt, `losses.policy` and AdamW. Both run in turns on the same cores.
Before that both compute the loss and its gradient of the same answers, drawn by neither, with the same old
log-probabilities: they have to agree. Two sizes: a short prompt with longer answers, and a long one (as those with
images are) with shorter answers. Where other work shares the cores, seconds of a core tell more than the clock. Prints
one JSON line.

    python benchmarks/grpo_step.py [--cores 1] [--turns 3] [--steps 3] [--out FILE]

TRL without its defaults that would slow it here (gradient checkpointing, bfloat16), with transformers' generate.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from typing import Any

import numpy as np
from contest import Contender, emit, environment, in_turns, log, serve, significant, spread

VOCAB, EOS, PAD = 2048, 1, 0
MODEL = dict(
    vocab_size=VOCAB, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=512, pad_token_id=PAD,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[8, 12, 12], partial_rotary_factor=1.0),
)  # fmt: skip
PROMPTS, GROUP = 4, 8
SIZES = ((32, 64), (128, 32))  # tokens of a prompt, and at most of an answer
RATE, CLIP_LOW, CLIP_HIGH = 1e-5, 0.2, 0.28


def prompts(length: int) -> np.ndarray:
    """[64, length] ids that are no special token."""
    return np.random.default_rng(0).integers(16, VOCAB, (64, length))


def reward(ids: list[int]) -> float:
    """The share of even ids: it differs within a group, and costs nothing."""
    return float(np.mean(np.asarray(ids) % 2 == 0))


def fixed(prompt: int, answer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Prompts, answers [N, length], lengths of the answers, and how much lower the old log-probabilities were."""
    rng = np.random.default_rng(1)
    N = PROMPTS * GROUP
    asked = np.repeat(prompts(prompt)[:PROMPTS], GROUP, axis=0)
    length = rng.integers(4, answer + 1, N)
    return asked, rng.integers(16, VOCAB, (N, answer)), length, rng.normal(0, 0.3, (N, answer)).astype(np.float32)


def moment() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def since(began: tuple[float, float], ended: tuple[float, float]) -> dict[str, float]:
    return {"wall": ended[0] - began[0], "cpu": ended[1] - began[1]}


def write_model(folder: str) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    vision = dict(depth=1, hidden_size=32, num_heads=2, intermediate_size=64, out_hidden_size=256, patch_size=4,
                  image_size=32, spatial_merge_size=2, temporal_patch_size=2)  # fmt: skip
    special = dict(image_token_id=10, video_token_id=11, image_start_token_id=12, image_end_token_id=13,
                   video_start_token_id=14, video_end_token_id=15)  # fmt: skip
    config = transformers.GlmOcrConfig(text_config=MODEL, vision_config=vision, **special)
    transformers.GlmOcrForConditionalGeneration(config).save_pretrained(folder)


# --- ours -------------------------------------------------------------------------------------------------------------


class Ours:
    def __init__(self, spec: dict[str, Any]) -> None:
        import jax
        import optax

        from glmv_jax.inference.sampler import Sampler, Sampling
        from glmv_jax.losses import policy
        from glmv_jax.train import exchange

        self.prompt, self.answer = spec["prompt"], spec["answer"]
        loaded = exchange.load(spec["folder"])
        self.cfg = loaded.cfg
        # The encoder, which has nothing to see here, is left out of the update on both sides.
        self.vision = {name: x for name, x in loaded.params.items() if name != "decoder"}
        params = jax.device_put({"decoder": loaded.params["decoder"]})
        self.objective = policy.Objective(clip_low=CLIP_LOW, clip_high=CLIP_HIGH)
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE, eps=1e-8, weight_decay=0.0))
        self.state = params, self.optimizer.init(params)
        self.sampler = Sampler(self.cfg, Sampling(self.answer, stop=(EOS,), pad=PAD), GROUP)
        self.gradient = jax.jit(jax.value_and_grad(self.loss, has_aux=True))
        self.update = jax.jit(self._update, donate_argnums=0)
        self.taken = 0

    def loss(self, params, batch):
        from glmv_jax.losses import policy
        from glmv_jax.losses.chunked import head_logprobs
        from glmv_jax.losses.select import predictors, select
        from glmv_jax.models import vlm
        from glmv_jax.train.stages.rl_update import at_targets
        from glmv_jax.typing import TokenInput

        params = params | self.vision
        tokens = TokenInput(*(batch[name] for name in TokenInput._fields))
        out = vlm.apply(self.cfg, params, None, tokens)
        targets = select(tokens.tokens, tokens.segments, tokens.loss_weight, GROUP * self.answer)
        hidden_BJD, weight_BJ = predictors(targets, out.hidden, tokens.segments, 1)
        logprob_BJ, _ = head_logprobs(hidden_BJD, vlm.head(self.cfg, params), targets.tokens_BJ)
        answers = policy.Answers.of(tokens.segments, tokens.branches).at(targets.at_BJ)
        old_BJ = at_targets(batch, "old_logprob", targets)
        if "lower" in batch:  # old log-probabilities are what these are now, and so much lower
            old_BJ = logprob_BJ - at_targets(batch, "lower", targets)
        loss, metrics, _ = policy.policy_loss(
            self.objective, logprob_BJ, old_BJ, at_targets(batch, "advantage", targets), weight_BJ, answers=answers
        )
        return loss, metrics

    def _update(self, state, batch):
        import optax

        params, moments = state
        (loss, metrics), grads = self.gradient(params, batch)
        updates, moments = self.optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    def asked(self, which: np.ndarray) -> dict[str, np.ndarray]:
        B, T = which.shape
        positions = np.broadcast_to(np.arange(T, dtype=np.int32)[None, :, None], (B, T, 3))
        return {
            "tokens": which.astype(np.int32), "positions": positions,
            "image_row": np.full((B, T), -1, np.int32), "length": np.full(B, T, np.int32),
            "next_position": np.full(B, T, np.int32), "patches": np.zeros((B, 0, 1), np.uint8),
            "yx": np.zeros((B, 0, 2), np.int32), "frame": np.zeros((B, 0), np.int32),
        }  # fmt: skip

    def packed(self, asked, answers, logprobs, advantages) -> dict[str, np.ndarray]:
        """A row for each prompt with its group."""
        from glmv_jax.rl.batch import to_batch
        from glmv_jax.rl.integrity import checked
        from glmv_jax.rl.rewards import Grade
        from glmv_jax.rl.rollout import Rollout

        grade = Grade(0.0, False, {})
        records = [
            Rollout(str(n), "text", n // GROUP, asked["tokens"][n // GROUP], np.asarray(answer, np.int32), logprob, "",
                    grade, False, "")
            for n, (answer, logprob) in enumerate(zip(answers, logprobs))
        ]  # fmt: skip
        rows, left_out = to_batch(
            records, asked, advantages, rows=(PROMPTS,), patches=0, names=["text"], per="token",
            tokens=self.prompt + GROUP * (self.answer + 1), targets=GROUP * self.answer,
        )  # fmt: skip
        assert not left_out
        return checked(rows)

    def steps(self, n: int) -> list[dict[str, float]]:
        """Seconds of each of n steps, on the clock and of a core."""
        import jax

        from glmv_jax.inference.sampler import Prompts
        from glmv_jax.losses import policy

        seconds = []
        for _ in range(n):
            began = moment()
            at = self.taken * PROMPTS % 64
            asked = self.asked(prompts(self.prompt)[at : at + PROMPTS])
            rest = (asked[name] for name in Prompts._fields[1:])
            out = jax.device_get(self.sampler(self.state[0] | self.vision, Prompts(None, *rest),
                                              jax.random.key(self.taken)))  # fmt: skip
            answers = [ids[:length] for ids, length in zip(out.tokens, out.lengths)]
            rewards = np.array([reward(ids) for ids in answers]).reshape(PROMPTS, GROUP)
            advantages = np.asarray(policy.group_advantages(rewards)).reshape(-1)
            batch = self.packed(asked, answers, [x[: len(a)] for x, a in zip(out.logprobs, answers)], advantages)
            self.state, loss = self.update(self.state, batch)
            float(loss)
            self.taken += 1
            seconds.append(since(began, moment()))
        return seconds

    def check(self) -> dict[str, float]:
        import optax

        asked, answers, lengths, lower = fixed(self.prompt, self.answer)
        short = [a[:n] for a, n in zip(answers, lengths)]
        advantages = np.random.default_rng(2).normal(size=len(short)).astype(np.float32)
        given = [x[:n] for x, n in zip(lower, lengths)]
        batch = self.packed(self.asked(asked[::GROUP]), short, given, advantages)
        batch["lower"] = batch["old_logprob"]
        (loss, _), grads = self.gradient(self.state[0], batch)
        return {"loss": float(loss), "grad_norm": float(optax.tree.norm(grads))}


# --- TRL --------------------------------------------------------------------------------------------------------------


class TRL:
    def __init__(self, spec: dict[str, Any]) -> None:
        import torch
        import transformers
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from trl import GRPOConfig, GRPOTrainer

        self.prompt, self.answer = spec["prompt"], spec["answer"]
        torch.set_num_threads(len(spec["cores"]))
        words = Tokenizer(models.WordLevel({str(n): n for n in range(VOCAB)}, unk_token="2"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token=str(EOS), pad_token=str(PAD))
        model = transformers.GlmOcrForConditionalGeneration.from_pretrained(spec["folder"])
        model.model.visual.requires_grad_(False)
        model.generation_config.eos_token_id = EOS
        times = self.times = []

        class Clock(transformers.TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                times.append(moment())

        def graded(completion_ids, **kwargs):
            return [reward(ids) for ids in completion_ids]

        self.args = GRPOConfig(
            output_dir=spec["folder"] + "/trl", per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
            max_completion_length=self.answer, learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=1.0,
            epsilon=CLIP_LOW, epsilon_high=CLIP_HIGH, loss_type="grpo", beta=0.0, temperature=1.0, max_steps=1,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[], save_strategy="no",
            logging_steps=10**6, disable_tqdm=True, shuffle_dataset=False, dataloader_pin_memory=False,
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": [" ".join(map(str, row)) for row in prompts(self.prompt)]})
        self.trainer = GRPOTrainer(model=model, reward_funcs=graded, args=self.args, train_dataset=data,
                                   processing_class=tokenizer, callbacks=[Clock()])  # fmt: skip

    def steps(self, n: int) -> list[dict[str, float]]:
        """As above, after a step that only starts the trainer."""
        self.times.clear()
        self.args.max_steps = n + 1
        self.trainer.train()
        return [since(a, b) for a, b in zip(self.times, self.times[1:])]

    def check(self) -> dict[str, float]:
        import torch

        asked, answers, lengths, lower = (torch.as_tensor(x) for x in fixed(self.prompt, self.answer))
        mask = (torch.arange(self.answer) < lengths[:, None]).long()
        answers = torch.where(mask > 0, answers, PAD)
        advantages = torch.as_tensor(np.random.default_rng(2).normal(size=len(lengths)).astype(np.float32))
        model = self.trainer.model.eval()
        given = {"prompt_ids": asked, "prompt_mask": torch.ones_like(asked), "completion_ids": answers,
                 "completion_mask": mask, "advantages": advantages}  # fmt: skip
        ids, seen = torch.cat([asked, answers], 1), torch.cat([torch.ones_like(asked), mask], 1)
        with torch.no_grad():
            now, *_ = self.trainer._get_per_token_logps_and_entropies(model, ids, seen, self.answer)
        loss = self.trainer._compute_loss(model, given | {"old_per_token_logps": now - lower})
        loss.backward()
        norm = torch.stack([p.grad.square().sum() for p in model.parameters() if p.grad is not None]).sum().sqrt()
        model.zero_grad()
        return {"loss": loss.item(), "grad_norm": norm.item()}


# --- both -------------------------------------------------------------------------------------------------------------


def build(spec: dict[str, Any]) -> Any:
    return {"glmv_jax": Ours, "trl": TRL}[spec["name"]](spec)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cores", type=int, default=1, help="for each side, the same ones")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="of a turn")
    parser.add_argument("--seconds", type=float, default=600.0, help="no further turn after this")
    parser.add_argument("--out")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        return serve(build, json.loads(args.contender))
    cores = sorted(os.sched_getaffinity(0))[: args.cores]
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        rows = [measured(folder, cores, size, args) for size in SIZES]
    about = environment()
    about["versions"]["trl"] = version("trl")
    emit({
        "benchmark": "grpo_step", "model": MODEL, "prompts": PROMPTS, "group": GROUP, "cores": args.cores,
        "load": significant(os.getloadavg()[0], 2), "rows": rows, "environment": about,
    }, args.out)  # fmt: skip


def measured(folder: str, cores: list[int], size: tuple[int, int], args: argparse.Namespace) -> dict[str, Any]:
    """Samples a second of both sides, and how far their losses of the same answers are apart."""
    env = {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": str(args.cores)}
    spec = {"folder": folder, "cores": cores, "prompt": size[0], "answer": size[1]}
    sides = {name: Contender(__file__, spec | {"name": name}, env) for name in ("glmv_jax", "trl")}
    try:
        losses = {name: side.ask("check") for name, side in sides.items()}
        log(losses)
        for side in sides.values():
            side.ask("steps", n=2)  # ours compiles the update twice, for fresh parameters and for updated ones
        runs = {name: lambda side=side: side.ask("steps", n=args.steps) for name, side in sides.items()}
        turns = in_turns(runs, args.turns, args.seconds)
    finally:
        for side in sides.values():
            side.close()
    of = lambda part: {  # noqa: E731
        name: [step[part] for turn in found for step in turn] for name, found in turns.items()
    }
    rate = {name: spread([PROMPTS * GROUP / x for x in found]) for name, found in of("wall").items()}
    cpu = {name: spread(found) for name, found in of("cpu").items()}
    ours, theirs = losses["glmv_jax"], losses["trl"]
    return {
        "prompt": size[0], "answer": size[1], "samples_per_second": rate, "cpu_seconds": cpu,
        "ratio": significant(rate["glmv_jax"]["median"] / rate["trl"]["median"]),
        "ratio_of_cpu": significant(cpu["trl"]["median"] / cpu["glmv_jax"]["median"]), "losses": losses,
        "difference": {name: significant(abs(ours[name] - theirs[name]) / abs(theirs[name])) for name in ours},
    }  # fmt: skip


if __name__ == "__main__":
    main()
