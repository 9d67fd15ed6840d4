"""Every family through the doors a person uses: import, greedy answers, export, and back in transformers.

Text alone; images are compared in each family's own test, and for GLM-OCR through the same doors in test_public.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from glmv_jax import cli  # noqa: E402
from glmv_jax.interop import families  # noqa: E402
from tests.interop import hf_glm_ocr, test_glm4v, test_glm4v_moe, test_glm_moe_dsa  # noqa: E402

EOS = 7
MODELS = {
    "glm_ocr": hf_glm_ocr.model,
    "glm4v": lambda: test_glm4v.pair("glm4v").model,
    "glm46v": lambda: test_glm4v.pair("glm46v").model,
    "glm4v_moe": lambda: test_glm4v_moe.pair().model,
    "glm_moe_dsa": lambda: test_glm_moe_dsa.hf_model("full"),
}


def test_every_family_is_here():
    assert set(MODELS) == set(families.FAMILIES)


@pytest.mark.parametrize("name", MODELS)
def test_in_answered_and_out_again(name, tmp_path, capsys):
    model = MODELS[name]().eval()
    model.save_pretrained(tmp_path / "in", max_shard_size="50KB")
    transformers.GenerationConfig(eos_token_id=EOS, pad_token_id=0).save_pretrained(tmp_path / "in")
    assert cli.main(["import-hf", str(tmp_path / "in"), str(tmp_path / "ours")]) == 0
    assert cli.main(["export-hf", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    capsys.readouterr()

    ids = np.random.default_rng(0).integers(12, 90, 9).tolist()
    argv = ["--token-ids", ",".join(map(str, ids)), "--max-new-tokens", "10", "--json"]
    assert cli.main(["generate", "--checkpoint", str(tmp_path / "ours"), *argv]) == 0
    got = json.loads(capsys.readouterr().out)
    again = type(model).from_pretrained(tmp_path / "out").eval()
    for theirs in (model, again):
        out = theirs.generate(
            torch.tensor([ids]), max_new_tokens=10, do_sample=False, eos_token_id=EOS, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        want = out.sequences[0, len(ids) :].tolist()
        assert got["token_ids"] == want
        logprobs = [float(torch.log_softmax(x[0].double(), -1)[i]) for x, i in zip(out.logits, want)]
        np.testing.assert_allclose(got["logprobs"], logprobs, atol=2e-4)
    before, after = model.state_dict(), again.state_dict()
    assert set(before) == set(after) and all(torch.equal(before[key], after[key]) for key in before)
