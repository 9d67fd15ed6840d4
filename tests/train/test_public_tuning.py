"""A public checkpoint from its folder to a tuned one that transformers loads: import, adapters on a person's own
pictures, generate, export. A GLM-OCR at toy size, written by transformers; not covered: released weights."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file  # noqa: E402

from glmv_jax import cli  # noqa: E402
from glmv_jax.config import load as load_config  # noqa: E402
from glmv_jax.train import checkpoint, exchange, main, weights  # noqa: E402
from glmv_jax.typing import UserError  # noqa: E402
from tests.inference.test_public import write_talking  # noqa: E402


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with hf/ (model, tokenizer, template), ours/ (imported), mine.jsonl (three records, one broken) and
    pages/ (three pictures, one without a text)."""
    work = tmp_path_factory.mktemp("tuning")
    write_talking(work / "hf")
    exchange.import_hf(work / "hf", work / "ours")
    for name, colour in (("a.png", (200, 10, 10)), ("b.png", (10, 10, 200))):
        Image.new("RGB", (40, 24), colour).save(work / name)
    said = lambda image, answer: json.dumps({"messages": [  # noqa: E731
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "the cat?"}]},
        {"role": "assistant", "content": answer}]})  # fmt: skip
    (work / "pages").mkdir()
    for name, text in (("a", "3 cats"), ("b", "12 dogs"), ("c", None)):
        shutil.copyfile(work / ("a.png" if name == "a" else "b.png"), work / "pages" / f"{name}.png")
        if text:
            (work / "pages" / f"{name}.txt").write_text(text)
    lines = [said("a.png", "3 cats"), said("b.png", "12 dogs"), said("none.png", "nothing")]
    (work / "mine.jsonl").write_text("\n".join(lines) + "\n")
    return work


def tune(work, run: str, *more: str) -> int:
    small = ("data.tokens=64", "data.patches=128", "data.image_patches=96", "data.targets=32", "data.prompt_tokens=32",
             "batch=8", "steps=6", "log_every=2", "data.heldout=0.0", "optim.lr=0.02", "compilation_cache=",
             f"data.sources.mine.path={work / 'mine.jsonl'}")  # fmt: skip
    config = f"experiments/public_tune.py:checkpoint={work / 'ours'},sources=mine"
    argv = ["train", "--config", config + more[0], "--workdir", str(work / run)]
    return cli.main([*argv, *(f"--config.{value}" for value in (*small, *more[1:]))])


def test_tuned_with_adapters_and_given_back(work, capsys):
    assert tune(work, "tuned", "", "lora.rank=4") == 0
    losses = [json.loads(line) for line in (work / "tuned" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in losses if "loss" in row]
    assert losses[-1] < losses[0]
    assert "none.png" in (work / "tuned" / "faults.jsonl").read_text()

    assert cli.main(["export-hf", str(work / "tuned"), str(work / "out")]) == 0
    before, after = (load_file(work / name / "model.safetensors") for name in ("hf", "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys() and changed
    assert all("language_model.layers" in n and ("_proj" in n) for n in changed)  # matrices of the decoder alone
    merged = weights.load(work / "tuned")
    loaded = exchange.load(work / "tuned").params
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, jax.device_get(loaded))

    model = transformers.GlmOcrForConditionalGeneration.from_pretrained(work / "out").eval()
    ids = torch.tensor([[5, 17, 23, 9]])
    kinds = torch.zeros_like(ids)
    want = model.generate(ids, mm_token_type_ids=kinds, max_new_tokens=6, do_sample=False)[0, 4:]
    capsys.readouterr()
    argv = ["--checkpoint", str(work / "tuned"), "--token-ids", "5,17,23,9", "--max-new-tokens", "6", "--json"]
    assert cli.main(["generate", *argv]) == 0
    assert json.loads(capsys.readouterr().out)["token_ids"] == want.tolist()


def test_all_parameters_may_be_tuned(work):
    pages = ("data.sources.mine.prompt=the cat?", f"data.sources.mine.path={work / 'pages'}")
    assert tune(work, "full", ",full=true", *pages) == 0
    assert "c.png" in (work / "full" / "faults.jsonl").read_text()  # without a text
    base, new = (checkpoint.load_params(work / name) for name in ("ours", "full"))
    same = jax.tree.map(lambda a, b: np.array_equal(a, b), base, new)
    assert all(jax.tree.leaves(same["vision"])) and not any(jax.tree.leaves(same["decoder"]["blocks"]))
    exchange.export_hf(work / "full", work / "full_out")
    transformers.GlmOcrForConditionalGeneration.from_pretrained(work / "full_out")


def test_where_nothing_is_held_out_that_is_said_before_the_step_is_compiled(work, capsys):
    capsys.readouterr()
    assert tune(work, "held", "", "data.heldout=0.001") == 2
    out, err = capsys.readouterr()
    assert "compiling" not in out and "no document is held out at data.heldout=0.001 of 3 records" in err


def test_without_a_checkpoint_it_says_so(work, capsys):
    cfg = load_config("experiments/public_tune.py:sources=mine")
    with pytest.raises(UserError, match="name the folder that glmv import-hf wrote"):
        main.stage_class("sft")(cfg)
    config = f"experiments/public_tune.py:checkpoint={work / 'hf'},sources=mine"
    assert cli.main(["train", "--config", config, "--workdir", str(work / "no"),
                     f"--config.data.sources.mine.path={work / 'mine.jsonl'}"]) == 2  # fmt: skip
    err = capsys.readouterr().err
    assert "glmv import-hf" in err and err.count("\n") == 1
