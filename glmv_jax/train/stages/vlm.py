"""What stages 3 to 5 share: the vision-language model, its documents and its supervised loss.

How they are measured is in `vlm_measures`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from glmv_jax import models
from glmv_jax.data import packing, pipeline, texts
from glmv_jax.data.building import DocumentBuilder
from glmv_jax.data.encoding import Encoder
from glmv_jax.data.naflex import Patcher
from glmv_jax.data.partition import GROUP
from glmv_jax.data.tokenizer import open_tokenizer
from glmv_jax.losses.chunked import CHUNK, head_loss
from glmv_jax.losses.cross_entropy import divide, per_source
from glmv_jax.losses.select import Targets, predictors, select, weights
from glmv_jax.models import build, vlm
from glmv_jax.parallel import dispatch, rules
from glmv_jax.parallel.pipeline import on_last
from glmv_jax.train import exchange
from glmv_jax.train.stages import dispatching, experts
from glmv_jax.train.stages.base import DataIterator
from glmv_jax.train.stages.mim import reading
from glmv_jax.train.stages.vlm_measures import MeasuredVLM
from glmv_jax.typing import Axes, Batch, Dispatched, Params, TokenInput, UserError, VisionInput


def inputs(batch: Batch, most: int = 0) -> tuple[VisionInput | Dispatched, TokenInput]:
    """A vlm batch as the model takes it. most: visual tokens of a row of text."""
    vision = VisionInput(batch["patches"], batch["yx"], batch["frame"])
    if "sent" in batch:
        places = dispatch.places(rules.active_mesh(), len(batch["tokens"]), most)
        vision = Dispatched(vision, batch["sent"], places)
    return vision, TokenInput._make([*(batch[name] for name in TokenInput._fields[:-1]), batch.get("branches")])


def _model(cfg: ConfigDict) -> vlm.VLMConfig:
    """Of the sizes in the config, or of the public checkpoint that it names, which has to be one that sees."""
    if "checkpoint" not in cfg:
        return build.vlm(cfg)
    if not cfg.checkpoint:
        raise UserError("model.checkpoint is not given; name the folder that glmv import-hf wrote")
    sees = {name: cfg[name] for name in ("vision", "merger", "patches_at_once") if name in cfg}
    model = exchange.model_config(cfg.checkpoint, cfg.remat, **sees)
    if model.vision is None:
        raise UserError(f"{cfg.checkpoint} reads text alone; stages 3 to 5 train models that see")
    return model


class Predicted(NamedTuple):
    """What H heads, the main one first and then the drafts, make of the J learnt tokens of each row.

    total: scalar, the mean loss of the main head + cfg.loss.mtp x that of the drafts; the only one with a gradient.
    nll_HBJ: -log p, unweighted; said_HBJ: the most probable token; weight_HBJ: of each token for each head; weight_H:
    their sums over the whole batch, which means are divided by. said: what blocks say about themselves.
    """

    targets: Targets
    total: jax.Array
    nll_HBJ: jax.Array
    said_HBJ: jax.Array
    weight_HBJ: jax.Array
    weight_H: jax.Array
    said: experts.Said

    def hits(self, head: int, of_BJ: jax.Array) -> jax.Array:
        """The weight of the tokens that a head says as `of_BJ` does."""
        return ((self.said_HBJ[head] == of_BJ) * self.weight_HBJ[head]).sum()


class VLMStage(MeasuredVLM):
    """form: "pretrain" (plain documents, loss on all of a caption or text) or "chat" (loss on the answer)."""

    form: str
    splits_rows = True

    def __init__(self, cfg: ConfigDict) -> None:
        super().__init__(cfg)
        self.model = _model(cfg.model)
        self.tokenizer = open_tokenizer(cfg.data.vocabulary or None)
        v, d = self.model.vision, cfg.data
        policy = d.get("sizing", "naflex")
        patcher = Patcher(patch=v.patch, temporal=v.temporal_patch, max_patches=d.image_patches, policy=policy)
        self.builder = DocumentBuilder(
            self.tokenizer, patcher, d.tokens, d.patches, max_targets=d.targets, per=d.per,
            max_images=d.get("images", 0) or None,
        )  # fmt: skip
        self.asker = DocumentBuilder(self.tokenizer, patcher, d.prompt_tokens, d.image_patches)  # one question a row
        self.names = list(d.weights)
        dispatching.size(cfg)  # what does not go with it is said now

    # ------------------------------------------------------------------------------------------------- step
    def init_params(self, key: jax.Array) -> Params:
        return models.init_params(self.model, key)

    def logical_axes(self) -> Axes:
        return models.logical_axes(self.model)

    def init_extra(self) -> Params:
        return experts.no_loads(models.abstract_params(self.model))

    def loss(
        self, params: Params, constants: Params, extra: Params, batch: Batch, key: jax.Array
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], Params]]:
        loss, metrics, said = self.supervised(params, batch)
        return loss, (metrics, experts.counted(extra, said))

    def after_update(self, params: Params, extra: Params) -> tuple[Params, Params, dict[str, jax.Array]]:
        """The biases of routers follow the loads, by cfg.experts.bias_rate."""
        return experts.settled(params, extra, self.cfg.get("experts", {}).get("bias_rate", 0.0))

    def supervised(self, params: Params, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array], experts.Said]:
        """(loss, metrics, what blocks say of themselves).

        The loss is next-token loss + cfg.loss.mtp x the MTP loss (its weight is not in the paper; 0.1 to 0.3 is usual)
        + the auxiliary losses of the blocks, by cfg.loss.aux: {name: factor}.
        """
        whole = batch.get("whole") or self.whole(batch)
        p = self.predicted(params, batch, whole["weight_H"])
        losses_H = divide((p.weight_HBJ * p.nll_HBJ).sum((1, 2)), p.weight_H)
        metrics = {
            "ce": losses_H[0],
            "accuracy": divide(p.hits(0, p.targets.tokens_BJ), p.weight_H[0]),
            "cut": p.targets.cut,
        }
        if self.heads > 1:
            metrics |= {
                "mtp": losses_H[1:].mean(),
                "mtp_accuracy": divide(p.hits(1, p.targets.tokens_BJ), p.weight_H[1]),
                "mtp_agreement": divide(p.hits(1, p.said_HBJ[0]), p.weight_H[1]),
            }
        sums_N = self._by_source(batch, p.targets, p.nll_HBJ[0], p.weight_HBJ[0])[0]
        for name, total, weight in zip(self.names, sums_N, whole["source_N"]):
            metrics[f"ce/{name}"] = total / weight  # nan where none of its tokens is learnt in this batch
        aux = {name: whole["share"] * mean for name, mean in self._auxiliary(p.said).items()}
        metrics |= {f"aux/{name}": mean for name, mean in aux.items()}
        return p.total + sum(self.cfg.loss.aux[name] * mean for name, mean in aux.items()), metrics, p.said

    def whole(self, batch: Batch, pieces: int = 1) -> Params:
        tokens = on_last(inputs(batch)[1])
        targets = self._targets(tokens)
        weight_HBJ = jnp.stack([weights(targets, tokens.segments, ahead) for ahead in range(1, self.heads + 1)])
        source_N = self._by_source(batch, targets, weight_HBJ[0], weight_HBJ[0])[1]
        return {"weight_H": weight_HBJ.sum((1, 2)), "source_N": source_N, "share": jnp.float32(1 / pieces)}

    @property
    def heads(self) -> int:
        """The main one and the drafts, which public checkpoints may lack."""
        return 1 + (self.model.mtp.depth if self.model.mtp else 0)

    def _targets(self, tokens: TokenInput) -> Targets:
        """The tokens to be learnt; an image placeholder never is, whatever its weight."""
        weight_BT = jnp.where(tokens.image_row >= 0, 0.0, tokens.loss_weight)
        most: Any = self.builder.max_targets  # which a stage sets
        return select(tokens.tokens, tokens.segments, weight_BT, most)

    def _by_source(
        self, batch: Batch, targets: Targets, value_BJ: jax.Array, weight_BJ: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        source_BJ = jnp.take_along_axis(on_last(batch["source"]), targets.at_BJ, axis=1)
        return per_source(value_BJ, weight_BJ, source_BJ, len(self.names))

    def predicted(self, params: Params, batch: Batch, weight_H: jax.Array) -> Predicted:
        """Of a batch, or of a piece of one whose sums of weights are these."""
        vision, tokens = inputs(batch, self.builder.max_patches // GROUP)
        out = vlm.apply(self.model, params, vision, tokens)
        tokens = on_last(tokens)
        targets = self._targets(tokens)
        drafts, said = vlm.mtp_hidden(self.model, params, out, tokens) if self.heads > 1 else ([], [])
        hidden = [out.hidden, *drafts]
        chosen = [predictors(targets, h_BTD, tokens.segments, ahead) for ahead, h_BTD in enumerate(hidden, start=1)]
        hidden, weight = zip(*chosen)
        weight_HBJ = jnp.stack(weight)
        B, J, D = hidden[0].shape
        # Stage 5 has no loss of drafts; it only measures them.
        share_H = jnp.full(self.heads, self.cfg.loss.get("mtp", 0.0) / max(self.heads - 1, 1)).at[0].set(1.0)
        scaled_HBJ = divide(weight_HBJ * share_H[:, None, None], weight_H[:, None, None])
        # All heads in one row: the gradient of the head they share is then one sum. Those of a target side by side: a
        # row may be split over devices.
        one = head_loss(
            jnp.stack(hidden, axis=2).reshape(B, -1, D), vlm.head(self.model, params),
            jnp.repeat(targets.tokens_BJ, self.heads, axis=1), jnp.moveaxis(scaled_HBJ, 0, 2).reshape(B, -1),
            chunk=self.cfg.loss.get("chunk", CHUNK),
        )  # fmt: skip
        nll_HBJ, said_HBJ = (jnp.moveaxis(x.reshape(B, J, -1), 2, 0) for x in (one.nll_BT, one.said_BT))
        head: Any = self.model.mtp
        aux = experts.by_path(out.aux, said, self.heads == 1 or head.weights == "shared")
        return Predicted(targets, one.total, nll_HBJ, said_HBJ, weight_HBJ, weight_H, aux)

    def _auxiliary(self, said: experts.Said) -> dict[str, jax.Array]:
        """What blocks say of themselves that cfg.loss.aux has a factor for: the mean over layers, drafts' included."""
        try:
            return experts.means(said, list(self.cfg.loss.get("aux", {})))
        except KeyError as error:
            known = ", ".join(sorted({path.rpartition("/")[2] for path in said})) or "nothing"
            raise UserError(
                f"loss.aux.{error.args[0]}: no block of this model says that; they say {known}"
            ) from None

    # ------------------------------------------------------------------------------------------------- data
    def sources(self, split: str, seed: int) -> dict[str, Any]:
        """Random-access samples by source name: kinds of questions, tasks, and "text"."""
        from glmv_jax.rl import tasks  # which come with their graders

        return {
            name: texts.Texts(split, seed) if name == "text" else tasks.source(name, split, seed)
            for name in self.cfg.data.weights
        }

    def train_data(self) -> DataIterator:
        return pipeline.vlm_batches(
            self.sources("train", self.data_seed), dict(self.cfg.data.weights), self.builder, form=self.form,
            batch=self.own_rows, encoder=self.encoder(), reading=reading(self.cfg),
        )  # fmt: skip

    def encoder(self) -> Encoder | None:
        """The encoder's own rows in this process, None where images are in the rows of their text."""
        return dispatching.encoder(self, self.builder.max_patches)

    def batch_shapes(self) -> Iterable[Batch]:
        b = self.builder
        row = packing.Row(b.max_tokens, b.max_patches, b.patcher.channels).arrays()
        text = {name: jax.ShapeDtypeStruct((self.own_rows, *x.shape), x.dtype) for name, x in row.items()}
        yield text | dispatching.shapes(self.cfg, b.patcher.channels)

    @property
    def data_seed(self) -> int:
        """Stages draw different questions from the same generators."""
        return self.cfg.seed * 1000 + self.cfg.data.seed

    def counts(self, batch: Batch) -> dict[str, int]:
        documents = sum(len(np.unique(row[row > 0])) for row in np.asarray(batch["segments"]))
        real = int((np.asarray(batch["segments"]) > 0).sum() + (np.asarray(batch["frame"]) > 0).sum())
        return {"samples": documents, "tokens": real}

    def counts_by_source(self, batch: Batch) -> dict[str, dict[str, int]]:
        """Tokens are those of the text rows, images' placeholders among them."""
        source_BT, real_BT = np.asarray(batch["source"]), np.asarray(batch["segments"]) > 0
        count = lambda at_BT: np.bincount(source_BT[at_BT & (source_BT >= 0)], minlength=len(self.names))  # noqa: E731
        samples_N, tokens_N = count(begins(self._samples(batch))), count(real_BT)
        return {name: {"samples": int(n), "tokens": int(t)}
                for name, n, t in zip(self.names, samples_N, tokens_N) if t}  # fmt: skip

    def _samples(self, batch: Batch) -> np.ndarray:
        """[B, T], for each token the number of its sample in its row, 0: of none."""
        return np.asarray(batch["segments"])

    def flops(self, batch: Batch) -> float:
        B, T = batch["tokens"].shape
        return 3 * self.model.flops(B * T, T / 2, *batch["frame"].shape)


def begins(ids_BT: np.ndarray) -> np.ndarray:
    """Where in each row a new number begins that is not 0."""
    return (ids_BT > 0) & (ids_BT != np.pad(ids_BT, ((0, 0), (1, 0)))[:, :-1])
