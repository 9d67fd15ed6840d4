"""Parity with transformers' GLM-OCR, randomly initialised, float32.

Covers the tower on still images and video grids, the whole model on text with two images, and the way back. Does not
cover the released weights (none can be fetched here) nor bfloat16.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax.numpy as jnp  # noqa: E402

from glmv_jax.interop import glm_ocr  # noqa: E402
from glmv_jax.interop import table as table_lib  # noqa: E402
from glmv_jax.models import cogvit, vlm  # noqa: E402
from glmv_jax.typing import TokenInput, UserError, VisionInput  # noqa: E402

IMAGE = 100


def hf_config(**text):
    from transformers import GlmOcrConfig

    return GlmOcrConfig(
        text_config=dict(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=8, max_position_embeddings=512, pad_token_id=0,
            rope_parameters=dict(
                rope_type="default", rope_theta=1e4, mrope_section=[1, 1, 2], partial_rotary_factor=1.0, **text
            ),
        ),
        vision_config=dict(
            depth=2, hidden_size=32, num_heads=4, intermediate_size=64, out_hidden_size=32, patch_size=4, image_size=32,
            spatial_merge_size=2, temporal_patch_size=2,
        ),
        image_token_id=IMAGE, video_token_id=101, image_start_token_id=102, image_end_token_id=103,
        video_start_token_id=104, video_end_token_id=105,
    )  # fmt: skip


def randomise(model) -> None:
    """Norm gains and biases away from their trivial start, so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 1:
                p.copy_((1.0 if name.endswith("weight") else 0.0) + 0.3 * torch.randn(p.shape, generator=generator))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * 1.5 / p[0].numel() ** 0.5)


def build():
    torch.manual_seed(0)
    model = transformers.GlmOcrForConditionalGeneration(hf_config()).eval()
    randomise(model)
    tensors = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    cfg = glm_ocr.config(model.config.to_dict())
    params = table_lib.to_params(glm_ocr.table(cfg), tensors, glm_ocr.duplicates(cfg))
    return model, tensors, cfg, params


def vision_rows(patches: np.ndarray, grids) -> VisionInput:
    """One row holding all images; coordinates by brute force in merge-block order, one frame id a frame."""
    yx, frame = [], []
    for t, h, w in grids:
        for _ in range(t):
            for by in range(h // 2):
                for bx in range(w // 2):
                    yx += [(2 * by + y, 2 * bx + x) for y in (0, 1) for x in (0, 1)]
            frame += [max(frame, default=0) + 1] * (h * w)
    return VisionInput(jnp.array(patches)[None], jnp.array(yx)[None], jnp.array(frame)[None])


@pytest.mark.parametrize("grids", [[(1, 4, 6), (1, 2, 8)], [(3, 4, 4)], [(2, 2, 6), (1, 8, 2)]])
def test_tower_matches_on_stills_and_videos(grids):
    model, _, cfg, params = build()
    n = sum(t * h * w for t, h, w in grids)
    patches = np.random.default_rng(0).normal(size=(n, 96)).astype(np.float32)
    with torch.no_grad():
        theirs = model.model.visual(torch.tensor(patches), grid_thw=torch.tensor(grids))
    features = cogvit.apply(cfg.vision, params["vision"], vision_rows(patches, grids))
    ours = cogvit.merge(cfg.merger, params["merger"], features)
    np.testing.assert_allclose(ours[0], theirs.pooler_output.numpy(), atol=1e-5, rtol=1e-5)


def test_padding_and_neighbours_change_nothing():
    _, _, cfg, params = build()
    patches = np.random.default_rng(0).normal(size=(40, 96)).astype(np.float32)
    both = vision_rows(patches, [(1, 4, 6), (1, 2, 8)])
    alone = cogvit.apply(cfg.vision, params["vision"], vision_rows(patches[:24], [(1, 4, 6)]))
    pad = lambda x: jnp.pad(x, [(0, 0), (0, 8)] + [(0, 0)] * (x.ndim - 2))  # noqa: E731
    packed = cogvit.apply(cfg.vision, params["vision"], VisionInput(*map(pad, both)))
    np.testing.assert_allclose(packed[0, :24], alone[0], atol=1e-5)
    assert np.isfinite(np.asarray(packed)).all()


def test_whole_model_matches():
    model, _, cfg, params = build()
    rng = np.random.default_rng(0)
    grids = [(1, 4, 6), (1, 2, 8)]
    patches = rng.normal(size=(40, 96)).astype(np.float32)
    ids = rng.integers(1, 99, size=(1, 24))
    ids[0, 3:9] = IMAGE  # 6 merged tokens of the first image
    ids[0, 13:17] = IMAGE  # 4 of the second
    with torch.no_grad():
        theirs = model(
            torch.tensor(ids), pixel_values=torch.tensor(patches), image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=(torch.tensor(ids) == IMAGE).int(),
        ).logits  # fmt: skip
        positions, _ = model.model.get_rope_index(
            torch.tensor(ids), (torch.tensor(ids) == IMAGE).int(), image_grid_thw=torch.tensor(grids)
        )
    image_row = np.full((1, 24), -1)
    image_row[0, ids[0] == IMAGE] = np.arange(10)
    positions_BT3 = jnp.array(positions.numpy().transpose(1, 2, 0))
    tokens = TokenInput(jnp.array(ids), positions_BT3, jnp.ones((1, 24), jnp.int32), jnp.array(image_row))
    out = vlm.apply(cfg, params, vision_rows(patches, grids), tokens)
    np.testing.assert_allclose(vlm.logits(cfg, params, out.hidden), theirs.numpy(), atol=1e-4, rtol=1e-4)


def test_way_back_is_exact():
    _, tensors, cfg, params = build()
    back = table_lib.to_tensors(glm_ocr.table(cfg), params)
    assert back.keys() == tensors.keys()
    for name in tensors:
        np.testing.assert_array_equal(back[name], tensors[name], err_msg=name)


def test_mtp_layer_travels_both_ways():
    model, tensors, _, _ = build()
    layer = {k.replace("layers.0.", "layers.2."): v for k, v in tensors.items() if "language_model.layers.0." in k}
    rng = np.random.default_rng(0)
    prefix = "model.language_model.layers.2."
    layer |= {prefix + n: rng.normal(size=32) for n in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
    layer[prefix + "eh_proj.weight"] = rng.normal(size=(32, 64))
    cfg = glm_ocr.config(model.config.to_dict(), mtp_layers=1)
    params = table_lib.to_params(glm_ocr.table(cfg), tensors | layer, glm_ocr.duplicates(cfg))
    np.testing.assert_array_equal(params["mtp"]["eh_proj"]["kernel"], layer[prefix + "eh_proj.weight"].T)
    assert table_lib.to_tensors(glm_ocr.table(cfg), params).keys() == (tensors | layer).keys()


def test_foreign_and_missing_tensors_are_named():
    _, tensors, cfg, _ = build()
    entries = glm_ocr.table(cfg)
    with pytest.raises(UserError, match="model.visual.surprise"):
        table_lib.to_params(entries, tensors | {"model.visual.surprise": np.zeros(1)})
    del tensors["model.visual.merger.proj.weight"]
    with pytest.raises(UserError, match="merger.proj.weight is missing"):
        table_lib.to_params(entries, tensors)
    with pytest.raises(UserError, match="model_type 'llama'"):
        glm_ocr.config({"model_type": "llama"})
