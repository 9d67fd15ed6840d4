"""What the tests of the GLM-4V families share: tiny random models of transformers, samples of text with images or
videos, and one function a side that turns samples into logits. Rows and coordinates are made here by brute force, apart
from the package's own data code; rotary positions are the package's, as they are compared with get_rope_index too.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from glmv_jax.data.packing import rope_positions
from glmv_jax.interop import table as table_lib
from glmv_jax.interop.folder import Tensors
from glmv_jax.models import vlm
from glmv_jax.trees import flatten
from glmv_jax.typing import TokenInput, VisionInput

IMAGE, WORDS, VOCAB, CHANNELS = 100, 99, 128, 96  # 96 = 3 channels * 2 frames * 4 * 4 pixels
T, P = 40, 64  # of a row: the same everywhere, as each shape is compiled anew

# Non-square and odd on purpose; the table of positions has 5 x 5 rows.
VISION = dict(
    depth=2, hidden_size=32, num_heads=4, intermediate_size=40, out_hidden_size=64, patch_size=4, image_size=20,
    spatial_merge_size=2, temporal_patch_size=2,
)  # fmt: skip
TEXT = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=72, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512,
    rope_parameters=dict(rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2], partial_rotary_factor=0.5),
)  # fmt: skip
TOKENS = dict(
    image_token_id=IMAGE, video_token_id=101, image_start_token_id=102, image_end_token_id=103,
    video_start_token_id=104, video_end_token_id=105,
)  # fmt: skip


class Pair(NamedTuple):
    """transformers' model, and ours with its very weights."""

    model: Any
    cfg: vlm.VLMConfig
    params: dict
    family: ModuleType


def pair(model: Any, family: ModuleType) -> Pair:
    randomise(model.eval())
    cfg = family.config(model.config.to_dict())
    return Pair(model, cfg, table_lib.to_params(family.table(cfg), written(model), family.duplicates(cfg)), family)


def written(model: Any) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint, as transformers writes it: its names in memory may be others."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return dict(Tensors(folder))


def randomise(model: Any) -> None:
    """Norm gains and biases away from their trivial start, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim == 1:
                p.copy_((1.0 if name.endswith("weight") else 0.0) + 0.3 * noise)
            elif "embed" in name and "patch" not in name:
                p.copy_(noise)
            else:
                p.copy_(noise * 1.5 / p[0].numel() ** 0.5)


# --- samples ----------------------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """One text: tokens [T], the number of each token's frame or -1 [T], (t, h, w) of each image or video, patches."""

    tokens: np.ndarray
    frame: np.ndarray
    grids: list[tuple[int, int, int]]
    patches: np.ndarray

    @property
    def frames(self) -> list[tuple[int, int]]:
        """(h, w) in patches of every frame."""
        return [(h, w) for t, h, w in self.grids for _ in range(t)]

    def positions(self) -> np.ndarray:
        return rope_positions(self.frame, [(h // 2, w // 2) for h, w in self.frames])[0]


def sample(seed: int, pieces: list[int | tuple[int, int, int]]) -> Sample:
    """Pieces are stretches of words (their number) and grids (t, h, w); two words, a time, follow every frame but the
    last of a video."""
    rng = np.random.default_rng(seed)
    tokens, frame, grids, count = [], [], [], 0

    def words(n: int) -> None:
        tokens.extend(rng.integers(1, WORDS, n))
        frame.extend([-1] * n)

    for piece in pieces:
        if isinstance(piece, int):
            words(piece)
            continue
        grids.append(piece)
        t, h, w = piece
        for i in range(t):
            tokens.extend([IMAGE] * (h * w // 4))
            frame.extend([count] * (h * w // 4))
            count += 1
            if i + 1 < t:
                words(2)
    patches = rng.normal(size=(sum(t * h * w for t, h, w in grids), CHANNELS)).astype(np.float32)
    return Sample(np.array(tokens), np.array(frame), grids, patches)


TEXT_ALONE = sample(2, [11])
IMAGES = [sample(0, [3, (1, 4, 6), 4, (1, 2, 8), 7]), sample(1, [2, (1, 8, 2), 5]), TEXT_ALONE]
VIDEOS = [sample(3, [4, (3, 4, 2), 6]), sample(4, [2, (2, 2, 6), 1, (1, 6, 4), 5]), TEXT_ALONE]
MIXED = sample(5, [3, (1, 4, 6), 2, (2, 2, 4), 1, (1, 2, 2), (3, 2, 2), 4])


# --- transformers -----------------------------------------------------------------------------------------------------


def their_inputs(samples: list[Sample], video: bool) -> dict[str, torch.Tensor]:
    """A batch padded on the right."""
    longest = max(len(s.tokens) for s in samples)
    pad = lambda x: np.pad(x, (0, longest - len(x)))  # noqa: E731
    ids = torch.tensor(np.stack([pad(s.tokens) for s in samples]))
    mask = torch.tensor(np.stack([pad(np.ones_like(s.tokens)) for s in samples]))
    inputs = {"input_ids": ids, "attention_mask": mask}
    grids = [g for s in samples for g in s.grids]
    if grids:
        kind = "video" if video else "image"
        pixels = torch.tensor(np.concatenate([s.patches for s in samples]))
        inputs |= {
            "pixel_values_videos" if video else "pixel_values": pixels,
            f"{kind}_grid_thw": torch.tensor(grids),
            "mm_token_type_ids": (ids == IMAGE).int() * (2 if video else 1),
        }
    return inputs


def theirs(model: Any, samples: list[Sample], video: bool = False) -> list[np.ndarray]:
    """Logits [T, V] of each sample, computed as one padded batch."""
    with torch.no_grad():
        logits = model(**their_inputs(samples, video)).logits.numpy()
    return [x[: len(s.tokens)] for x, s in zip(logits, samples)]


def theirs_mixed(model: Any, s: Sample) -> np.ndarray:
    """Logits [T, V] of a text with stills (t = 1) and videos. transformers refuses both at once, as their placeholder
    is one token: here its features of each stand where they belong, with its own embeddings, positions and decoder."""
    of = np.array([kind for t, _, _ in s.grids for kind in [1 + (t > 1)] * t])  # by frame
    kinds = torch.tensor(np.where(s.frame < 0, 0, of[s.frame]))[None]
    ends = np.cumsum([t * h * w for t, h, w in s.grids])
    pieces = list(zip(s.grids, np.split(s.patches, ends[:-1])))
    stills, videos = ([p for p in pieces if (p[0][0] > 1) == moving] for moving in (False, True))
    packed = lambda some: (  # noqa: E731
        torch.tensor(np.concatenate([x for _, x in some])), torch.tensor([g for g, _ in some])
    )
    ids, inner = torch.tensor(s.tokens)[None], model.model
    with torch.no_grad():
        x = inner.get_input_embeddings()(ids)
        x[kinds == 1] = torch.cat(inner.get_image_features(*packed(stills)).pooler_output)
        x[kinds == 2] = torch.cat(inner.get_video_features(*packed(videos)).pooler_output)
        grids = {"image_grid_thw": packed(stills)[1], "video_grid_thw": packed(videos)[1]}
        positions, _ = inner.get_rope_index(ids, kinds, **grids)
        return model(inputs_embeds=x, position_ids=positions).logits[0].numpy()


# --- ours -------------------------------------------------------------------------------------------------------------


def vision_row(frames: list[tuple[int, int]], patches: np.ndarray, length: int = P) -> VisionInput:
    """One row with all frames: coordinates in merge-block order, one id a frame."""
    yx, frame = [], []
    for number, (h, w) in enumerate(frames, start=1):
        for by in range(h // 2):
            for bx in range(w // 2):
                yx += [(2 * by + y, 2 * bx + x) for y in (0, 1) for x in (0, 1)]
        frame += [number] * (h * w)
    pad = lambda x: np.pad(x, [(0, length - len(x))] + [(0, 0)] * (x.ndim - 1))  # noqa: E731
    return VisionInput(pad(patches), pad(np.array(yx, np.int32).reshape(-1, 2)), pad(np.array(frame, np.int32)))


def token_row(samples: list[Sample]) -> TokenInput:
    """One row with all samples, one segment each."""
    fields, merged = [], 0
    for number, s in enumerate(samples, start=1):
        image_row = np.full(len(s.tokens), -1)
        visual = s.frame >= 0
        image_row[visual] = merged + np.arange(visual.sum())
        merged += visual.sum()
        fields.append((s.tokens, s.positions(), np.full(len(s.tokens), number), image_row))
    tokens, positions, segments, image_row = (np.concatenate(x) for x in zip(*fields))
    rest = T - len(tokens)
    return TokenInput(
        np.pad(tokens, (0, rest)), np.pad(positions, ((0, rest), (0, 0))), np.pad(segments, (0, rest)),
        np.pad(image_row, (0, rest), constant_values=-1),
    )  # fmt: skip


def batch(rows: list[list[Sample]]) -> tuple[VisionInput, TokenInput]:
    """Each row holds some samples; all are padded to T tokens and P patches."""
    join = lambda row: np.concatenate([s.patches for s in row])  # noqa: E731
    vision = [vision_row([f for s in row for f in s.frames], join(row)) for row in rows]
    tokens = [token_row(row) for row in rows]
    return (
        VisionInput(*map(jnp.array, map(np.stack, zip(*vision)))),
        TokenInput(*(jnp.array(np.stack(x)) for x in list(zip(*tokens))[:4])),
    )


@functools.partial(jax.jit, static_argnums=0)
def run(cfg: vlm.VLMConfig, params: dict, vision: VisionInput | None, tokens: TokenInput, cache=None):
    """(logits [B, T, V], VLMOutput)."""
    out = vlm.apply(cfg, params, vision, tokens, cache)
    return vlm.logits(cfg, params, out.hidden), out


encode = jax.jit(vlm.encode_images, static_argnums=0)


def ours(p: Pair, rows: list[list[Sample]]) -> list[list[np.ndarray]]:
    """Logits [T, V] of each sample of each row."""
    logits = np.asarray(run(p.cfg, p.params, *batch(rows))[0])
    cuts = [np.cumsum([len(s.tokens) for s in row]) for row in rows]
    return [np.split(x, c)[:-1] for x, c in zip(logits, cuts)]


def decoded(p: Pair, samples: list[Sample], steps: int) -> list[np.ndarray]:
    """Logits [T, V] of samples, one a row, the last `steps` tokens of each fed one by one against the cache."""
    vision, tokens = batch([[s] for s in samples])
    start = np.array([len(s.tokens) - steps for s in samples])
    prompts = [Sample(s.tokens[:n], s.frame[:n], s.grids, s.patches) for s, n in zip(samples, start)]
    B = len(samples)
    logits, out = run(p.cfg, p.params, vision, batch([[s] for s in prompts])[1], vlm.init_cache(p.cfg, B, T))
    cache = out.cache | {"length": jnp.array(start)}
    seen = [list(np.asarray(x)[:n]) for x, n in zip(logits, start)]
    for i in range(steps):
        at = (np.arange(B), start + i)
        one = TokenInput(*(x[at][:, None] for x in tokens[:4]))
        logits, out = run(p.cfg, p.params, None, one, cache)
        cache = out.cache
        for row, x in zip(seen, np.asarray(logits)):
            row.append(x[0])
    return [np.stack(x) for x in seen]


# --- what every family is held to -------------------------------------------------------------------------------------


def close(mine: np.ndarray, their: np.ndarray) -> None:
    np.testing.assert_allclose(mine, their, atol=1e-4, rtol=1e-4)


def check_tower(p: Pair, grids: list[tuple[int, int, int]]) -> None:
    frames = [(h, w) for t, h, w in grids for _ in range(t)]
    n = sum(h * w for h, w in frames)
    patches = np.random.default_rng(0).normal(size=(n, CHANNELS)).astype(np.float32)
    with torch.no_grad():  # the tower itself takes no t > 1: videos reach it frame by frame
        want = p.model.model.visual(torch.tensor(patches), grid_thw=torch.tensor([(1, h, w) for h, w in frames]))
    row = VisionInput(*(jnp.array(x)[None] for x in vision_row(frames, patches, 224)))
    got = np.asarray(encode(p.cfg, p.params, row))
    assert np.isfinite(got).all()
    close(got[0, : n // 4], want.pooler_output.numpy())


def check_rows(p: Pair, samples: list[Sample], video: bool = False) -> None:
    """One sample a row, padded."""
    for (got,), want in zip(ours(p, [[s] for s in samples]), theirs(p.model, samples, video)):
        close(got, want)


def check_mixed(p: Pair) -> None:
    """Stills and videos in one text, alone in its row and after another."""
    want = theirs_mixed(p.model, MIXED)
    (alone,), (_, packed), _ = ours(p, [[MIXED], [sample(6, [3]), MIXED], [TEXT_ALONE]])  # as many rows as elsewhere
    close(alone, want)
    close(packed, want)


def check_packing(p: Pair) -> None:
    """Several texts a row, of which one may have images and another videos, against each alone."""
    got = ours(p, [[IMAGES[1], VIDEOS[0]], [TEXT_ALONE, IMAGES[0]], [VIDEOS[1]]])
    for mine, s in ((got[0][0], IMAGES[1]), (got[1][0], TEXT_ALONE), (got[1][1], IMAGES[0])):
        close(mine, theirs(p.model, [s])[0])
    for mine, s in ((got[0][1], VIDEOS[0]), (got[2][0], VIDEOS[1])):
        close(mine, theirs(p.model, [s], video=True)[0])


def check_decoding(p: Pair) -> None:
    """A prompt and single steps against a cache = the whole text at once."""
    for samples, video in ((IMAGES, False), (VIDEOS, True)):
        for got, want in zip(decoded(p, samples, steps=4), theirs(p.model, samples, video)):
            close(got, want)


def check_gradients(p: Pair, samples: list[Sample]) -> None:
    """Of a random function of the logits, for every parameter: transformers' gradients come through the table."""
    weights = [np.random.default_rng(i).normal(size=(len(s.tokens), VOCAB)) for i, s in enumerate(samples)]
    p.model.zero_grad()
    logits = p.model(**their_inputs(samples, video=False)).logits
    loss = sum((torch.tanh(x[: len(w)]) * torch.tensor(w)).sum() for x, w in zip(logits, weights))
    loss.backward()
    want = flatten(slopes(p))

    vision, tokens = batch([[s] for s in samples])
    padded = np.stack([np.pad(w, ((0, T - len(w)), (0, 0))) for w in weights]).astype(np.float32)

    def scalar(params):
        return jnp.sum(jnp.tanh(vlm.logits(p.cfg, params, vlm.apply(p.cfg, params, vision, tokens).hidden)) * padded)

    value, grads = jax.jit(jax.value_and_grad(scalar))(jax.tree.map(jnp.asarray, p.params))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-4, atol=1e-3)
    for name, got in flatten(grads).items():
        size = np.linalg.norm(want[name])
        assert np.linalg.norm(got - want[name]) <= 1e-4 * size, (name, np.linalg.norm(got - want[name]), size)
        assert size > 0 or name.endswith("attention/k/bias") or "router" in name, name


def slopes(p: Pair) -> dict:
    """The gradients that transformers' model has, as parameters of ours."""
    model = copy.deepcopy(p.model)  # its weights become the gradients
    with torch.no_grad():
        for x, y in zip(model.parameters(), p.model.parameters()):
            x.copy_(torch.zeros_like(x) if y.grad is None else y.grad)
        for x in model.buffers():  # those of the checkpoint have no gradient
            x.zero_()
    return table_lib.to_params(p.family.table(p.cfg), written(model), p.family.duplicates(p.cfg))


def check_way_back(p: Pair) -> None:
    tensors = written(p.model)
    back = table_lib.to_tensors(p.family.table(p.cfg), p.params)
    assert back.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(back[name], tensors[name], err_msg=name)
