"""What stages 3 to 5 are measured by: held-out loss with and without images, answers to held-out questions, and how
many drafts of the MTP head are taken."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from glmv_jax.data import heldout, texts
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.eval import drafts
from glmv_jax.eval import vlm as vlm_eval
from glmv_jax.inference.sampler import Prompts, Sampler, Sampling
from glmv_jax.inference.speculative import SpeculativeSampler
from glmv_jax.losses.select import behind_image
from glmv_jax.models import cogvit, vlm
from glmv_jax.train.stages.base import Stage
from glmv_jax.typing import Batch, Params


def held_out(kinds: Sequence[str], n: int) -> dict[str, list]:
    """`n` held-out samples of each kind of question or task."""
    from glmv_jax.rl import tasks  # which come with their graders

    return heldout.heldout_questions(list(kinds), n, source=tasks.source)


class MeasuredVLM(Stage):
    """The evaluations of a stage with a vision-language model; `vlm.VLMStage` has the rest.

    Attributes that it gives: form, model, tokenizer, heads (of the model); builder, asker: of a document, and of one
    question a row; names: of the sources. Methods: `predicted`, what the heads make of a batch, and `whole`.
    """

    form: str
    model: vlm.VLMConfig
    tokenizer: Tokenizer
    builder: DocumentBuilder
    asker: DocumentBuilder
    names: list[str]
    heads: int

    @functools.cached_property
    def questions(self) -> dict[str, list]:
        """Held-out questions by kind, the same in every stage."""
        return held_out(self.cfg.eval.kinds, self.cfg.eval.questions)

    @functools.cached_property
    def greedy(self) -> Sampler:
        return Sampler(self.model, Sampling.chat(self.tokenizer, self.cfg.eval.max_new_tokens, temperature=0.0))

    @functools.cached_property
    def drawing(self) -> Sampler:
        return Sampler(self.model, Sampling.chat(self.tokenizer, self.cfg.eval.max_new_tokens))

    @functools.cached_property
    def score(self) -> vlm_eval.Score:
        from glmv_jax.rl import score, tasks

        return functools.partial(score, verifiers=tasks.verifiers(self.questions))

    def evaluate(self, params, extra, *, full: bool):
        metrics = self.heldout_loss(params)
        if full and self.drafting:
            metrics |= self.accept_lengths(params)
        if self.form == "chat":
            samples = [s for kind in self.questions.values() for s in (kind if full else kind[: self.cfg.eval.few])]
            metrics |= vlm_eval.evaluate(
                self.greedy, params, samples, self.asker, self.score, self.cfg.eval.batch, controls=full,
                drawing=self.drawing if full else None,
            )  # fmt: skip
        return metrics

    def notes(self):
        if self.form != "chat":
            return {}
        samples = [s for kind in self.questions.values() for s in kind]
        note = "chance: the best constant answer to each task and language"
        guessed = vlm_eval.best_constant(samples, self.score)
        return {name: {"chance": share, "note": note} for name, share in guessed.items()}

    @functools.cached_property
    def _heldout(self) -> list[Batch]:
        kinds = held_out(self.cfg.eval.kinds, self.cfg.eval.documents)
        samples = [s for kind in zip(*kinds.values()) for s in kind]
        if "text" in self.names:
            source = texts.Texts("heldout", 1)
            samples += [source[i] for i in range(self.cfg.eval.documents)]
        by_token = dataclasses.replace(self.builder, per="token")
        return heldout.packed_batches(samples, by_token, self.form, self.cfg.batch, [*self.names, *kinds])

    @functools.cached_property
    def _measure(self):
        """(params, batch, 0: grey images) -> {name: (sums [n], sums of weights [n])}, n the heads it is a mean of."""

        def sums(params, batch, seen):
            v = self.model.vision
            shown = cogvit.normalised(batch["patches"], v.channels, v.temporal_patch, v.patch)
            batch = batch | {"patches": shown * seen}
            p = self.predicted(params, batch, self.whole(batch)["weight_H"])
            behind_BT = behind_image(batch["segments"], batch["image_row"] >= 0)
            behind_BJ = jnp.take_along_axis(behind_BT, p.targets.at_BJ, axis=1)
            found = {}
            for suffix, counts_BJ in (("", 1.0), (" in text alone", ~behind_BJ), (" behind images", behind_BJ)):
                weight_HBJ = p.weight_HBJ * counts_BJ
                total_H, weight_H = (weight_HBJ * p.nll_HBJ).sum((1, 2)), weight_HBJ.sum((1, 2))
                found |= {f"loss{suffix}": (total_H[:1], weight_H[:1]), f"mtp{suffix}": (total_H[1:], weight_H[1:])}
            if self.heads > 1:
                found["mtp_accuracy"] = (p.hits(1, p.targets.tokens_BJ)[None], p.weight_H[1:2])
                found["mtp_agreement"] = (p.hits(1, p.said_HBJ[0])[None], p.weight_H[1:2])
            return found

        return jax.jit(sums)

    def measured(self, params: Params, batches: Sequence[Batch], *, seen: bool) -> dict[str, float]:
        """Means over the learnt tokens of packed batches, of what there is: the loss a token of the main head, "mtp",
        that of the drafts, both again of tokens behind an image and of those without, and how often drafts are right.

        seen: with the images, or with grey ones in their place.
        """
        rows = [jax.device_get(self._measure(params, batch, np.float32(seen))) for batch in batches]
        means = {}
        for name in rows[0]:
            total, weight = (np.sum([row[name][i] for row in rows], axis=0, dtype=np.float64) for i in (0, 1))
            if weight.size and weight.all():
                means[name] = float((total / weight).mean())
        return means

    def heldout_loss(self, params) -> dict[str, float]:
        """What `measured` says of held-out documents, and the loss with a grey image in each one's place."""
        found = {f"heldout {name}": mean for name, mean in self.measured(params, self._heldout, seen=True).items()}
        return found | {"heldout loss without image": self.measured(params, self._heldout, seen=False)["loss"]}

    @functools.cached_property
    def drafting(self) -> SpeculativeSampler | None:
        """Greedy decoding with cfg.eval.drafts drafts of the MTP head; None for 0, and for stages that do not say."""
        sampling = Sampling.chat(self.tokenizer, drafts.NEW, temperature=0.0)
        n = self.cfg.eval.get("drafts", 0)
        return SpeculativeSampler(self.model, sampling, n) if n else None

    @functools.cached_property
    def _continued(self) -> dict[str, Prompts]:
        kinds, n = list(self.cfg.eval.kinds), self.cfg.eval.documents
        asked = held_out(kinds, -(-n // len(kinds))) if kinds else {}
        pictures = [sample for kind in zip(*asked.values()) for sample in kind][:n]
        read = texts.Texts("heldout", 1)
        return drafts.continued([read[i] for i in range(n)], pictures, self.builder, self.form)

    def accept_lengths(self, params) -> dict[str, float]:
        """Tokens a pass of speculative decoding after a text, and after an image."""
        found = drafts.accept_lengths(drafts.counts(self.drafting, params, self._continued))
        return {f"accept length {kind}": length for kind, length in found.items()}

    def write_samples(self, params, extra, folder):
        if self.form == "chat":
            samples = [s for kind in self.questions.values() for s in kind[: self.cfg.eval.shown]]
            answers = vlm_eval.answers(self.greedy, params, samples, self.asker, self.cfg.eval.batch)
            vlm_eval.write_samples(Path(folder), samples, answers, self.score)
