"""Stage 2 with the text side of a SigLIP checkpoint, against transformers' own model and tokenizer; random weights."""

from __future__ import annotations

import shutil

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from glmv_jax import config, models, optim  # noqa: E402
from glmv_jax.data import vocabulary  # noqa: E402
from glmv_jax.data.tokenizer import SHIPPED  # noqa: E402
from glmv_jax.models import two_tower  # noqa: E402
from glmv_jax.train import loop, main, text_towers  # noqa: E402
from glmv_jax.train.checkpoint import load_params  # noqa: E402
from glmv_jax.typing import UserError  # noqa: E402
from tests.data.vocabularies import gemma_like, sentencepiece_file  # noqa: E402
from tests.interop.test_public_towers import randomise  # noqa: E402

LENGTH, TEXTS = 12, ["A Photo of a CAT", "一只猫的照片", "Two 猫, 红心!", "", "ＦＵＬＬ　Width １２", "cats " * 40]
TOWER = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def public(kind, folder):
    """(folder, model): weights, config and vocabulary as a public folder has them."""
    gemma_like(folder)
    words = transformers.AutoTokenizer.from_pretrained(folder)
    text = TOWER | dict(vocab_size=len(words), max_position_embeddings=LENGTH, projection_size=24)
    own = {"siglip": transformers.SiglipConfig, "siglip2": transformers.Siglip2Config}[kind]
    patches = dict(image_size=16) if kind == "siglip" else dict(num_patches=16)
    theirs = own(text_config=text, vision_config=TOWER | {"hidden_size": 24, "patch_size": 4} | patches)
    theirs._attn_implementation = "eager"
    model = randomise({"siglip": transformers.SiglipModel, "siglip2": transformers.Siglip2Model}[kind](theirs))
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return public("siglip2", tmp_path_factory.mktemp("siglip2"))


def stage_of(folder, *more, file="experiments/cogvit_siglip.py:size=nano,text=siglip"):
    small = ["model.vision.depth=1", "model.vision.width=32", "model.vision.mlp=48", "batch=8", "save_every=1"]
    return main.stage_class("siglip")(config.override(config.load(file), [f"model.text.path={folder}", *small, *more]))


def theirs(folder, model):
    """Unit embeddings of TEXTS by transformers alone, from the folder."""
    words = transformers.AutoTokenizer.from_pretrained(folder)
    ids = words(TEXTS, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.text_model(input_ids=ids).pooler_output
    return (out / out.norm(dim=-1, keepdim=True)).numpy()


def initial(stage):
    placement, optimizer, _ = loop.prepare(stage)
    return loop._initial_state(stage, optimizer, placement)


@pytest.mark.parametrize("kind", ["siglip", "siglip2"])
def test_a_fresh_run_starts_from_the_text_side_of_a_checkpoint(kind, tmp_path):
    """Embeddings are those of transformers, from text to unit vector, one and three texts a row; the rest is fresh."""
    folder, model = public(kind, tmp_path)
    stage = stage_of(folder, f"model.text.scale={kind == 'siglip'}")
    params, want = initial(stage).params, theirs(folder, model)
    alone = np.stack([stage.tokenizer.fixed(text, stage.model.text.length) for text in TEXTS])
    np.testing.assert_allclose(two_tower.embed_text(stage.model, params, alone), want, atol=1e-5)
    rows = [stage.tokenizer.side_by_side(TEXTS[i : i + 3], stage.model.text.row_length(3)) for i in (0, 3)]
    tokens, segments = map(np.stack, zip(*rows))
    three = two_tower.embed_texts(stage.model, params, tokens, segments, 3)
    np.testing.assert_allclose(three.reshape(6, -1), want, atol=1e-5)
    assert stage.model.image_head.out == want.shape[1] == 24

    own = stage.init_params(jax.random.key(stage.cfg.seed))
    np.testing.assert_array_equal(params["vision"]["patch_embed"]["kernel"], own["vision"]["patch_embed"]["kernel"])
    scale, bias = (model.logit_scale.item(), model.logit_bias.item()) if kind == "siglip" else (np.log(10.0), -10.0)
    assert params["scale"]["log_scale"] == pytest.approx(scale) and params["scale"]["bias"] == pytest.approx(bias)


def test_a_locked_run_and_its_resume_without_the_weights(checkpoint, tmp_path, capsys):
    """Two steps, a third after the weights are gone: images have moved, texts stay what they were."""
    file = "experiments/cogvit_siglip.py:size=nano,text=locked"
    folder = shutil.copytree(checkpoint[0], tmp_path / "public")
    for steps in (2, 3):
        stage = stage_of(folder, f"steps={steps}", file=file)
        locked = stage.cfg.optim.groups[0]
        stage.cfg.optim.groups = (locked, (".*", {"kind": "adamw"}))  # Muon takes long to compile
        stage.evaluate, stage.write_samples, stage.notes = lambda *_, **__: {}, lambda *_: None, dict  # they take long
        (tmp_path / "run").mkdir(exist_ok=True)
        results = loop.train(stage, tmp_path / "run")
        (folder / "model.safetensors").unlink(missing_ok=True)
    assert "resuming from step 2" in capsys.readouterr().out and results["step"] == 3
    params = load_params(tmp_path / "run")
    alone = np.stack([stage.tokenizer.fixed(t, LENGTH) for t in TEXTS])
    np.testing.assert_allclose(two_tower.embed_text(stage.model, params, alone), theirs(*checkpoint), atol=1e-5)
    before = stage.init_params(jax.random.key(stage.cfg.seed))
    assert np.abs(params["vision"]["norm"]["scale"] - before["vision"]["norm"]["scale"]).max() > 1e-4


@pytest.mark.parametrize("size", ["nano", "l"])
def test_what_is_trained(checkpoint, size):
    """The tower and its head, or neither; every expression of the experiment is of use to a public tower too."""
    for text, trained in (("siglip", True), ("locked", False)):
        file = f"experiments/cogvit_siglip.py:size={size},text={text}"
        cfg = config.override(config.load(file), [f"model.text.path={checkpoint[0]}"])
        mask = optim.trainable(cfg.optim, models.abstract_params(text_towers.model(cfg)))
        assert {name: all(jax.tree.leaves(part)) for name, part in mask.items()} == {
            "vision": True, "image_head": True, "scale": True, "text": trained, "text_head": trained}
        assert any(jax.tree.leaves([mask["text"], mask["text_head"]])) == trained


def test_vocabularies_and_paths_that_do_not_fit(checkpoint, tmp_path):
    file = "experiments/cogvit_siglip.py:size=nano"
    words = sentencepiece_file(tmp_path / "small.model")
    own = main.stage_class("siglip")(config.override(config.load(file), [f"data.vocabulary={words}"]))
    with pytest.raises(UserError, match="has 295 pieces, but model.text.vocab=4096; give --config.model.text.voc"):
        own.given_params()
    with pytest.raises(UserError, match="has 4096 pieces, but the text tower of .* has 348; give the voc"):
        stage_of(checkpoint[0], f"data.vocabulary={SHIPPED}").given_params()
    with pytest.raises(UserError, match="model.text.path is empty"):
        stage_of("")
    with pytest.raises(UserError, match="'siglp' is not known; choose from own, siglip"):
        stage_of(checkpoint[0], "model.text.kind=siglp")


def test_a_vocabulary_of_ones_own(tmp_path):
    """A sentencepiece model without GLM's special tokens trains our tower, Chinese in the vocabulary's own words."""
    words = sentencepiece_file(tmp_path / "small.model")
    more = [f"data.vocabulary={words}", "data.split_chinese=False", "model.vision.depth=1", "batch=8"]
    cfg = config.override(config.load("experiments/cogvit_siglip.py:size=nano"), more)
    cfg.model.text.vocab = vocabulary.load(words).vocab_size
    stage = main.stage_class("siglip")(cfg)
    batch = next(stage.train_data())
    loss, _ = jax.jit(stage.loss)(initial(stage).params, {}, {}, batch, None)
    assert np.isfinite(loss) and batch["tokens"].max() < cfg.model.text.vocab
