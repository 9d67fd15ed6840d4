"""What stages 3 to 5 are measured by: held-out loss with and without images, answers to held-out questions, and how
many drafts of the MTP head are taken."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from glmv_jax.data import heldout, texts
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.tokenizer import Tokenizer
from glmv_jax.eval import drafts
from glmv_jax.eval import vlm as vlm_eval
from glmv_jax.inference.engine import Engine
from glmv_jax.inference.requests import Prompt
from glmv_jax.inference.sampler import Sampling
from glmv_jax.inference.settings import Settings
from glmv_jax.losses.select import behind_image
from glmv_jax.models import cogvit, vlm
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.train.stages.base import Stage
from glmv_jax.typing import Batch, Params


def held_out(kinds: Sequence[str], n: int) -> dict[str, list]:
    """`n` held-out samples of each kind of question or task."""
    from glmv_jax.rl import tasks  # which come with their graders

    return heldout.heldout_questions(list(kinds), n, source=tasks.source)


class MeasuredVLM(Stage):
    """The evaluations of a stage with a vision-language model; `vlm.VLMStage` has the rest.

    Attributes that it gives: form, model, tokenizer (of the model); builder, asker: of a document, and of one question
    a row; names: of the sources.
    """

    form: str
    model: vlm.VLMConfig
    tokenizer: Tokenizer
    builder: DocumentBuilder
    asker: DocumentBuilder
    names: list[str]
    _answering: Engine | None = None
    _drafting: Engine | None = None

    @property
    @abc.abstractmethod
    def heads(self) -> int:
        """Of the model: the main one and the drafts."""

    @abc.abstractmethod
    def predicted(self, params: Params, batch: Batch, weight_H: jax.Array) -> Any:
        """What the heads make of a batch. weight_H: of `whole`."""

    @functools.cached_property
    def questions(self) -> dict[str, list]:
        """Held-out questions by kind, the same in every stage."""
        return held_out(self.cfg.eval.kinds, self.cfg.eval.questions)

    def engine(
        self, params: Params, slots: int, prompt: int, new: int, sampling: Sampling | None = None, **sizes: Any
    ) -> Engine:
        """The inference engine for parameters that lie as these: `slots` answers at a time, or some more, of up to
        `new` tokens to prompts of up to `prompt` tokens. sampling: how they are drawn; None: as of a chat."""
        mesh, shown = _mesh(params), self.asker.max_patches
        slots = -(-slots // mesh_lib.data_shards(mesh)) * mesh_lib.data_shards(mesh)
        settings = Settings(
            slots=slots, length=prompt + new, alone=new, chunks=tuple(sorted({min(64, prompt), prompt})), lanes=16,
            patches=(shown,), pictures=max(shown, self.builder.max_patches) // 4,
            pixels=(self.asker.patcher.channels, "uint8"), queue=max(1024, slots), **sizes,
        )  # fmt: skip
        sampling = sampling or Sampling.chat(self.tokenizer, new)
        return Engine(self.model, None, sampling, settings, mesh=mesh, placed=True)

    def answering(self, params: Params) -> Engine:
        """That of evaluations."""
        if self._answering is None:
            e = self.cfg.eval
            self._answering = self.engine(params, e.batch, self.asker.max_tokens, e.max_new_tokens)
        return self._answering

    @functools.cached_property
    def score(self) -> vlm_eval.Score:
        from glmv_jax.rl import score, tasks

        return functools.partial(score, verifiers=tasks.verifiers(self.questions))

    def evaluate(self, params: Params, extra: Params, *, full: bool) -> dict[str, float]:
        metrics = self.heldout_loss(params)
        if full and self.cfg.eval.get("drafts", 0):
            metrics |= self.accept_lengths(params)
        if self.form == "chat":
            samples = [s for kind in self.questions.values() for s in (kind if full else kind[: self.cfg.eval.few])]
            metrics |= vlm_eval.evaluate(
                self.answering(params), params, samples, self.asker, self.score, controls=full, drawn=full,
                max_new_tokens=self.cfg.eval.max_new_tokens,
            )  # fmt: skip
        return metrics

    def notes(self) -> dict[str, dict[str, Any]]:
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
    def _measure(self) -> Callable:
        """(params, batch, 0: grey images) -> {name: (sums [n], sums of weights [n])}, n the heads it is a mean of."""

        def sums(params: Params, batch: Batch, seen: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
            v = self.model.vision
            shown = cogvit.normalised(batch["patches"], v.channels, v.temporal_patch, v.patch)
            batch = batch | {"patches": shown * seen}
            p = self.predicted(params, batch, self.whole(batch)["weight_H"])
            behind_BT = behind_image(batch["segments"], batch["image_row"] >= 0)
            behind_BJ = jnp.take_along_axis(behind_BT, p.targets.at_BJ, axis=1)
            found: dict[str, tuple[jax.Array, jax.Array]] = {}
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

    def heldout_loss(self, params: Params) -> dict[str, float]:
        """What `measured` says of held-out documents, and the loss with a grey image in each one's place."""
        found = {f"heldout {name}": mean for name, mean in self.measured(params, self._heldout, seen=True).items()}
        return found | {"heldout loss without image": self.measured(params, self._heldout, seen=False)["loss"]}

    @functools.cached_property
    def _continued(self) -> dict[str, list[Prompt]]:
        kinds, n = list(self.cfg.eval.kinds), self.cfg.eval.documents
        asked = held_out(kinds, -(-n // len(kinds))) if kinds else {}
        pictures = [sample for kind in zip(*asked.values()) for sample in kind][:n]
        read = texts.Texts("heldout", 1)
        return drafts.continued([read[i] for i in range(n)], pictures, self.builder, self.form)

    def accept_lengths(self, params: Params) -> dict[str, float]:
        """Tokens a pass of greedy decoding with cfg.eval.drafts drafts of the MTP head, after a text and an image."""
        if self._drafting is None:
            e, longest = self.cfg.eval, self.builder.max_tokens
            self._drafting = self.engine(params, e.documents, longest, drafts.NEW, drafts=e.drafts)
        found = drafts.accept_lengths(drafts.counts(self._drafting, params, self._continued))
        return {f"accept length {kind}": length for kind, length in found.items()}

    def write_samples(self, params: Params, extra: Params, folder: Path) -> None:
        if self.form == "chat":
            samples = [s for kind in self.questions.values() for s in kind[: self.cfg.eval.shown]]
            settings = dict(temperature=0.0, max_new_tokens=self.cfg.eval.max_new_tokens)
            answers = vlm_eval.answers(self.answering(params), params, samples, self.asker, **settings)
            vlm_eval.write_samples(Path(folder), samples, answers, self.score)


def _mesh(params: Params) -> Any:
    """That parameters lie on, if it has more than one device."""
    where = getattr(jax.tree.leaves(params)[0], "sharding", None)
    return where.mesh if isinstance(where, NamedSharding) and where.mesh.size > 1 else None
