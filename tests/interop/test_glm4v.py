"""Parity with transformers' GLM-4.1V and GLM-4.6V-Flash, randomly initialised, float32: the tower on stills and videos
of many shapes, logits with padding, packing, images, videos and a cache, gradients of every parameter, and rotary
positions.

Not covered: the released weights (none can be fetched here) and bfloat16.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from glmv_jax import models  # noqa: E402
from glmv_jax.data import packing  # noqa: E402
from glmv_jax.interop import glm4v, glm46v  # noqa: E402
from glmv_jax.typing import UserError  # noqa: E402
from tests.interop import glm4v_oracle as oracle  # noqa: E402
from tests.interop.glm4v_oracle import sample  # noqa: E402

FAMILIES = {
    "glm4v": (glm4v, transformers.Glm4vConfig, transformers.Glm4vForConditionalGeneration),
    "glm46v": (glm46v, transformers.Glm46VConfig, transformers.Glm46VForConditionalGeneration),
}


@functools.cache
def pair(name: str, **vision) -> oracle.Pair:
    family, config, model = FAMILIES[name]
    hf = config(text_config=dict(oracle.TEXT), vision_config=oracle.VISION | vision, **oracle.TOKENS)
    return oracle.pair(model(hf), family)


@pytest.fixture(params=FAMILIES)
def p(request) -> oracle.Pair:
    return pair(request.param)


@pytest.mark.parametrize("grids", [
    [(1, 4, 6), (1, 2, 8)],  # about the table's size
    [(3, 4, 4)],  # a video
    [(1, 12, 14), (2, 2, 2), (1, 2, 20)],  # larger, smaller, long
])  # fmt: skip
def test_tower(grids):
    oracle.check_tower(pair("glm4v"), grids)


def test_tower_with_biases_on_qkv():
    p = pair("glm4v", attention_bias=True)
    oracle.check_tower(p, [(1, 4, 6)])
    oracle.check_way_back(p)


def test_images_in_padded_rows(p):
    oracle.check_rows(p, oracle.IMAGES)


def test_videos_in_padded_rows(p):
    oracle.check_rows(p, oracle.VIDEOS, video=True)


def test_stills_and_videos_in_one_text(p):
    oracle.check_mixed(p)


def test_packed_rows_are_texts_alone(p):
    oracle.check_packing(p)


def test_decoding_with_a_cache(p):
    oracle.check_decoding(p)


def test_gradients_of_all_parameters():
    oracle.check_gradients(pair("glm4v"), oracle.IMAGES)


def test_way_back_is_exact(p):
    oracle.check_way_back(p)


@pytest.mark.parametrize("seed", range(8))
def test_positions_of_random_layouts(seed):
    """get_rope_index on texts with up to four images (t = 1) and videos, whose frames have text between them."""
    rng = np.random.default_rng(seed)
    pieces = []
    for _ in range(int(rng.integers(0, 5))):
        h, w = 2 * rng.integers(1, 6, 2)
        pieces += [int(rng.integers(1, 7)), (int(rng.choice([1, 1, 2, 4])), int(h), int(w))]
    s = sample(seed, [*pieces, int(rng.integers(1, 5))])
    of_video = np.repeat([t > 1 for t, _, _ in s.grids], [t for t, _, _ in s.grids])  # by frame
    kinds = np.where(s.frame < 0, 0, 1 + of_video[s.frame] if s.grids else 0)
    grids = {"image_grid_thw": [g for g in s.grids if g[0] == 1], "video_grid_thw": [g for g in s.grids if g[0] > 1]}
    grids = {name: torch.tensor(g) for name, g in grids.items() if g}
    model = pair("glm4v").model.model
    want, delta = model.get_rope_index(torch.tensor(s.tokens)[None], torch.tensor(kinds)[None], **grids)
    positions, following = packing.rope_positions(s.frame, [(h // 2, w // 2) for h, w in s.frames])
    np.testing.assert_array_equal(positions, want[:, 0].T)
    assert following == len(s.tokens) + int(delta)


@pytest.mark.parametrize("name", FAMILIES)
def test_size_of_the_released_model(name):
    """transformers' default config is that of the 9B model; counted on its meta device."""
    family, config, model = FAMILIES[name]
    rope = dict(rope_theta=1e4, rope_type="default", mrope_section=[8, 12, 12], partial_rotary_factor=0.5)
    hf = config(text_config={"rope_parameters": rope})
    with torch.device("meta"):
        want = sum(x.numel() for x in model(hf).parameters())
    assert models.count(family.config(hf.to_dict())) == want


def test_config_as_written_before_transformers_5():
    new = pair("glm4v").model.config.to_dict()
    text = dict(new["text_config"])
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "partial_rotary_factor": rope["partial_rotary_factor"],
             "rope_scaling": {"type": "default", "mrope_section": rope["mrope_section"]}}  # fmt: skip
    assert glm4v.config(new | {"text_config": text}) == glm4v.config(new)
    assert glm4v.config(new | {"text_config": text | {"tie_word_embeddings": True}}).decoder.tied


def test_what_is_not_of_the_family_is_named():
    hf = pair("glm4v").model.config.to_dict()
    text, rope = hf["text_config"], hf["text_config"]["rope_parameters"]
    with pytest.raises(UserError, match="model_type 'glm_ocr' is not glm4v"):
        glm4v.config(hf | {"model_type": "glm_ocr"})
    with pytest.raises(UserError, match="no text_config"):
        glm4v.config({name: x for name, x in hf.items() if name != "text_config"})
    with pytest.raises(UserError, match="rope_type 'yarn'"):
        glm4v.config(hf | {"text_config": text | {"rope_parameters": rope | {"rope_type": "yarn"}}})
    with pytest.raises(UserError, match="mrope_section .8, 12, 12. does not share out"):
        glm4v.config(hf | {"text_config": text | {"rope_parameters": rope | {"mrope_section": [8, 12, 12]}}})
    with pytest.raises(UserError, match="model_type 'llama' is not glm4v_text"):
        glm46v.config(hf | {"model_type": "glm46v", "text_config": text | {"model_type": "llama"}})
