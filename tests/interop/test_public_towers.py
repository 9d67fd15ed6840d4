"""SigLIP, SigLIP 2 and DINOv3 from folders that transformers wrote, against transformers' own classes; float32.

Weights are random (none can be fetched here), folders are real: `save_pretrained`, one file and several. Not covered:
bfloat16, and SigLIP of fixed size at another size than its table (transformers interpolates bicubically there).
"""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import jax.numpy as jnp  # noqa: E402

from glmv_jax import models  # noqa: E402
from glmv_jax.interop import dinov3 as dinov3_lib  # noqa: E402
from glmv_jax.interop import siglip as siglip_lib  # noqa: E402
from glmv_jax.models import dinov3, siglip  # noqa: E402
from glmv_jax.trees import flatten  # noqa: E402
from glmv_jax.typing import UserError, VisionInput  # noqa: E402

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
OTHER = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=2)
TEXT = dict(vocab_size=97, max_position_embeddings=8, pad_token_id=0, bos_token_id=2, eos_token_id=1)


def randomise(model):
    """Everything away from its trivial start (ones, zeros, uninitialised memory), so that a forgotten one shows."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            gain = p.ndim == 1 and (name.endswith("weight") or "lambda" in name)
            scale = 0.3 if p.ndim == 1 else 1.5 / p[0].numel() ** 0.5
            p.copy_(float(gain) + scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def rows(pixels_BCHW, patch):
    """Patches as (y, x, channel) vectors, row by row: written here apart from the package."""
    B, C, H, W = pixels_BCHW.shape
    Y, X = H // patch, W // patch
    x = pixels_BCHW.reshape(B, C, Y, patch, X, patch).transpose(0, 2, 4, 3, 5, 1).reshape(B, Y * X, -1)
    yx = np.stack(np.meshgrid(np.arange(Y), np.arange(X), indexing="ij"), -1).reshape(1, -1, 2)
    return VisionInput(jnp.asarray(x), jnp.asarray(np.repeat(yx, B, 0)), jnp.ones((B, Y * X), jnp.int32))


def saved(model, folder, shards=False):
    model.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    assert (folder / "model.safetensors.index.json").exists() == shards
    return folder


def siglip_fixed(size):
    tower, side, patch = (SMALL, 16, 4) if size == "small" else (OTHER, 24, 8)
    vision = dict(image_size=side, patch_size=patch, **tower)
    config = transformers.SiglipConfig(text_config=TEXT | tower | {"projection_size": tower["hidden_size"]},
                                       vision_config=vision)  # fmt: skip
    torch.manual_seed(0)
    return randomise(transformers.SiglipModel(config))


def siglip_naflex(size):
    tower = SMALL if size == "small" else OTHER
    vision = dict(patch_size=4, num_patches=16 if size == "small" else 9, **tower)
    config = transformers.Siglip2Config(text_config=TEXT | tower | {"projection_size": tower["hidden_size"]},
                                        vision_config=vision)  # fmt: skip
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return randomise(transformers.Siglip2Model(config))


@pytest.mark.parametrize("size, shards", [("small", False), ("other", True)])
def test_siglip_of_fixed_size(tmp_path, size, shards):
    model = siglip_fixed(size)
    cfg, params = siglip_lib.load(saved(model, tmp_path, shards))
    side = model.config.vision_config.image_size
    pixels = np.random.default_rng(0).normal(size=(2, 3, side, side)).astype(np.float32)
    tokens = np.random.default_rng(1).integers(0, 97, (3, 8))
    with torch.no_grad():
        want = model(input_ids=torch.tensor(tokens), pixel_values=torch.tensor(pixels))
    features, pooled = siglip.embed_image(cfg.vision, params["vision"], rows(pixels, cfg.vision.patch))
    np.testing.assert_allclose(features, want.vision_model_output.last_hidden_state, atol=1e-4)
    np.testing.assert_allclose(pooled, want.vision_model_output.pooler_output, atol=1e-4)
    text, out = siglip.embed_text(cfg, params, jnp.asarray(tokens))
    np.testing.assert_allclose(text, want.text_model_output.last_hidden_state, atol=1e-4)
    np.testing.assert_allclose(out, want.text_model_output.pooler_output, atol=1e-4)
    log_scale, bias = siglip.scale(params["scale"])
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    logits = np.exp(log_scale) * unit(np.asarray(out)) @ unit(np.asarray(pooled)).T + bias
    np.testing.assert_allclose(logits, want.logits_per_text, atol=1e-4)


@pytest.mark.parametrize("size, shards", [("small", True), ("other", False)])
def test_siglip_2_of_native_size_with_padding(tmp_path, size, shards):
    """Grids larger, smaller and longer than the table, in rows that are padded."""
    model = siglip_naflex(size)
    cfg, params = siglip_lib.load(saved(model, tmp_path, shards))
    grids, length, rng = [(4, 4), (2, 5), (1, 7), (6, 3)], 18, np.random.default_rng(0)
    patches = rng.normal(size=(4, length, cfg.vision.patch_dim)).astype(np.float32)
    yx, frame = np.zeros((4, length, 2), np.int32), np.zeros((4, length), np.int32)
    for row, (Y, X) in enumerate(grids):
        yx[row, : Y * X] = np.stack(np.meshgrid(np.arange(Y), np.arange(X), indexing="ij"), -1).reshape(-1, 2)
        frame[row, : Y * X] = 1
    with torch.no_grad():
        want = model.vision_model(torch.tensor(patches), torch.tensor(frame), torch.tensor(grids))
    vision = VisionInput(jnp.asarray(patches), jnp.asarray(yx), jnp.asarray(frame))
    features, pooled = siglip.embed_image(cfg.vision, params["vision"], vision)
    np.testing.assert_allclose(pooled, want.pooler_output, atol=1e-4)
    np.testing.assert_allclose(features[frame > 0], want.last_hidden_state[frame > 0], atol=1e-4)

    order = rng.permutation(length)  # positions come from yx alone
    shuffled = VisionInput(*(x[:, order] for x in vision))
    np.testing.assert_allclose(siglip.embed_image(cfg.vision, params["vision"], shuffled)[1], pooled, atol=1e-5)


def test_an_image_tower_alone(tmp_path):
    config = transformers.Siglip2VisionConfig(patch_size=4, num_patches=16, **SMALL)
    model = randomise(transformers.Siglip2VisionModel(config))
    cfg, params = siglip_lib.load(saved(model, tmp_path))
    assert cfg.text is None and set(params) == {"vision"}
    both, trunk = siglip_lib.load(saved(siglip_naflex("small"), tmp_path / "both"), text=False)
    assert both.text is None and set(trunk) == {"vision"}
    with pytest.raises(UserError, match="has no text tower; give a checkpoint of both"):
        siglip_lib.load(tmp_path, vision=False)


@pytest.mark.parametrize("stacked", [False, True], ids=["layers", "scanned"])
@pytest.mark.parametrize("naflex", [False, True], ids=["fixed", "naflex"])
def test_big_vision_npz_equals_the_folder(tmp_path, naflex, stacked):
    """The .npz is written here from the very same weights, with big_vision's names and shapes."""
    model = siglip_naflex("small") if naflex else siglip_fixed("small")
    state = {k: v.detach().numpy() for k, v in model.state_dict().items()}
    H, D, K = 4, 32, 8
    npz = {"params/t": state["logit_scale"], "params/b": state["logit_bias"]}

    def attention(prefix, weights, biases):
        inner = prefix + "MultiHeadDotProductAttention_0/"
        for name, w, b in zip(("query", "key", "value"), weights, biases, strict=False):
            npz[f"{inner}{name}/kernel"], npz[f"{inner}{name}/bias"] = w.T.reshape(D, H, K), b.reshape(H, K)
        npz[inner + "out/kernel"], npz[inner + "out/bias"] = weights[3].T.reshape(H, K, D), biases[3]

    def leaves(ours, theirs, *, kernel):
        npz[ours + ("/kernel" if kernel else "/scale")] = state[theirs + ".weight"].T
        npz[ours + "/bias"] = state[theirs + ".bias"]

    def tower(ours, theirs):
        for i in range(2):
            block, layer = f"{ours}encoderblock_{i}/", f"{theirs}encoder.layers.{i}."
            leaves(block + "LayerNorm_0", layer + "layer_norm1", kernel=False)
            leaves(block + "LayerNorm_1", layer + "layer_norm2", kernel=False)
            leaves(block + "MlpBlock_0/Dense_0", layer + "mlp.fc1", kernel=True)
            leaves(block + "MlpBlock_0/Dense_1", layer + "mlp.fc2", kernel=True)
            names = [f"{layer}self_attn.{p}_proj" for p in ("q", "k", "v", "out")]
            attention(block, [state[n + ".weight"] for n in names], [state[n + ".bias"] for n in names])

    tower("params/img/Transformer/", "vision_model.")
    tower("params/txt/Encoder_0/", "text_model.")
    leaves("params/img/Transformer/encoder_norm", "vision_model.post_layernorm", kernel=False)
    leaves("params/txt/Encoder_0/encoder_norm", "text_model.final_layer_norm", kernel=False)
    leaves("params/txt/head", "text_model.head", kernel=True)
    patch = state["vision_model.embeddings.patch_embedding.weight"]
    npz["params/img/embedding/kernel"] = patch.T if naflex else patch.transpose(2, 3, 1, 0)
    npz["params/img/embedding/bias"] = state["vision_model.embeddings.patch_embedding.bias"]
    npz["params/img/pos_embedding"] = state["vision_model.embeddings.position_embedding.weight"][None]
    npz["params/txt/pos_embedding"] = state["text_model.embeddings.position_embedding.weight"][None]
    npz["params/txt/Embed_0/embedding"] = state["text_model.embeddings.token_embedding.weight"]
    head, theirs = "params/img/MAPHead_0/", "vision_model.head."
    npz[head + "probe"] = state[theirs + "probe"]
    leaves(head + "LayerNorm_0", theirs + "layernorm", kernel=False)
    leaves(head + "MlpBlock_0/Dense_0", theirs + "mlp.fc1", kernel=True)
    leaves(head + "MlpBlock_0/Dense_1", theirs + "mlp.fc2", kernel=True)
    weights = [*np.split(state[theirs + "attention.in_proj_weight"], 3), state[theirs + "attention.out_proj.weight"]]
    biases = [*np.split(state[theirs + "attention.in_proj_bias"], 3), state[theirs + "attention.out_proj.bias"]]
    attention(head, weights, biases)
    if stacked:
        layers = [name for name in npz if "/encoderblock_0/" in name]
        for name in layers:
            parts = [npz.pop(name.replace("encoderblock_0", f"encoderblock_{i}")) for i in range(2)]
            npz[name.replace("/encoderblock_0/", "/encoderblock/")] = np.stack(parts)
    np.savez(tmp_path / "model.npz", **npz)

    cfg, params = siglip_lib.load(tmp_path / "model.npz")
    want_cfg, want = siglip_lib.load(saved(model, tmp_path / "folder"))
    assert cfg == want_cfg
    got, want = flatten(params), flatten(want)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_array_equal(got[name], want[name], err_msg=name)
    for path in ("model.npz", "folder"):
        text_cfg, text = siglip_lib.load(tmp_path / path, vision=False)
        assert text_cfg.vision is None and set(text) == {"text", "text_head", "scale"}
        assert {name: x.tolist() for name, x in flatten(text).items()} == {
            name: x.tolist() for name, x in want.items() if not name.startswith("vision/")}
    (tmp_path / "folder" / "model.safetensors").unlink()
    assert siglip_lib.sizes(tmp_path / "folder") == siglip_lib.sizes(tmp_path / "model.npz") == cfg


def test_a_checkpoint_in_bfloat16(tmp_path):
    model = randomise(transformers.DINOv3ViTModel(
        transformers.DINOv3ViTConfig(patch_size=4, num_register_tokens=4, **SMALL))).bfloat16()
    cfg, params = dinov3_lib.load(saved(model, tmp_path))
    got = np.asarray(params["blocks"]["mlp"]["up"]["kernel"][1], np.float32)
    np.testing.assert_array_equal(got, model.model.layer[1].mlp.up_proj.weight.detach().float().numpy().T)


@pytest.mark.parametrize("prefix", ["layer.", "model.layer."])
@pytest.mark.parametrize("size", ["small", "gated"])
def test_dinov3(tmp_path, size, prefix):
    """Not square images; the names that save_pretrained writes, and those that transformers 5 has in memory."""
    config = transformers.DINOv3ViTConfig(patch_size=4, image_size=16, num_register_tokens=4, **SMALL)
    if size == "gated":  # as H+ and 7B; the latter without a bias on q, k, v
        config = transformers.DINOv3ViTConfig(
            patch_size=4, image_size=16, num_register_tokens=3, use_gated_mlp=True, hidden_act="silu", query_bias=False,
            value_bias=False, **OTHER)
    model = randomise(transformers.DINOv3ViTModel(config))
    saved(model, tmp_path, shards=prefix == "layer.")
    if prefix == "model.layer.":
        from safetensors.numpy import save_file

        tensors = {name: x.detach().numpy() for name, x in model.state_dict().items()}
        assert any(name.startswith(prefix) for name in tensors)
        save_file(tensors, tmp_path / "model.safetensors")
    cfg, params = dinov3_lib.load(tmp_path)
    pixels = np.random.default_rng(0).normal(size=(2, 3, 16, 24)).astype(np.float32)
    with torch.no_grad():
        want = model(torch.tensor(pixels)).last_hidden_state.numpy()
    features, token = dinov3.apply(cfg, params, rows(pixels, 4))
    np.testing.assert_allclose(features, want[:, 1 + cfg.registers :], atol=1e-4)
    np.testing.assert_allclose(token, want[:, 0], atol=1e-4)

    padded = VisionInput(*(jnp.pad(x, ((0, 0), (0, 5)) + ((0, 0),) * (x.ndim - 2)) for x in rows(pixels, 4)))
    np.testing.assert_allclose(dinov3.apply(cfg, params, padded)[0][:, :-5], features, atol=1e-5)


@pytest.mark.parametrize("width, depth, heads, mlp, gated, millions", [
    (384, 12, 6, 1536, False, 21.60), (1024, 24, 16, 4096, False, 303.13), (1280, 32, 20, 5120, True, 840.59),
    (4096, 40, 32, 8192, True, 6716.04),
])  # fmt: skip
def test_sizes_of_dinov3(width, depth, heads, mlp, gated, millions):
    """transformers' counts of S, L, H+ and 7B, on its meta device (a mask token, `width` numbers, is theirs alone)."""
    biases = "o" if width == 4096 else "qvo"
    cfg = dinov3.DINOv3Config(depth, width, heads, mlp, biases=biases, activation="swiglu" if gated else "gelu")
    assert (models.count(cfg) + width) / 1e6 == pytest.approx(millions, abs=0.005)


def test_broken_folders_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no config.json here"):
        siglip_lib.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        siglip_lib.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(UserError, match="'clip' is not one of siglip"):
        siglip_lib.load(tmp_path)
    with pytest.raises(UserError, match="'clip' is not dinov3_vit"):
        dinov3_lib.load(tmp_path)

    folder = saved(siglip_fixed("small"), tmp_path / "model", shards=True)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"intermediate_size": 48', '"intermediate_size": 56'))
    with pytest.raises(UserError, match=r"mlp/.* has shape \(.*48.* config and weights are of different models"):
        siglip_lib.load(folder)
    (folder / "config.json").write_text(config)
    shard = sorted(folder.glob("*.safetensors"))[0]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="is no whole safetensors file.*download it again"):
        siglip_lib.load(folder)
    shard.unlink()
    with pytest.raises(UserError, match="files are missing, the first is model-0"):
        siglip_lib.load(folder)
    (folder / "model.safetensors.index.json").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no model.safetensors here .pytorch_model.bin is a pickle"):
        siglip_lib.load(folder)
    with pytest.raises(UserError, match="does not exist"):
        siglip_lib.load(tmp_path / "absent.npz")
    (tmp_path / "bad.npz").write_bytes(b"PK not really")
    with pytest.raises(UserError, match="is no .npz"):
        siglip_lib.load(tmp_path / "bad.npz")
