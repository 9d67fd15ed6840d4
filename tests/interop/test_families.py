"""Every family through the doors a person uses: import, greedy answers, export, and back in transformers.

Text alone; images are compared in each family's own test, and for GLM-OCR through the same doors in test_public.
"""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from glmv_jax import cli, models  # noqa: E402
from glmv_jax.interop import families, mtp  # noqa: E402
from glmv_jax.interop import table as table_lib  # noqa: E402
from glmv_jax.typing import UserError  # noqa: E402
from tests.interop import hf_glm_ocr, test_glm4v, test_glm4v_moe, test_glm5_next, test_glm_moe_dsa  # noqa: E402

EOS = 7
MODELS = {
    "glm_ocr": hf_glm_ocr.model,
    "glm4v": lambda: test_glm4v.pair("glm4v").model,
    "glm46v": lambda: test_glm4v.pair("glm46v").model,
    "glm4v_moe": lambda: test_glm4v_moe.pair().model,
    "glm_moe_dsa": lambda: test_glm_moe_dsa.hf_model("full"),
    "glm5_next": lambda: test_glm5_next.hf_model("KFS"),
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


@pytest.mark.parametrize("family", ["glm_ocr", "glm4v_moe", "glm_moe_dsa", "glm5_next"])
def test_a_depth_may_have_an_mtp_layer_of_its_own(family):
    """The k-th layer behind the last is the k-th in our stack, named as a single one is; both ways without a loss."""
    hf, module, K = MODELS[family]().config.to_dict(), families.family(family), 3
    cfg, alone = module.config(hf, mtp_layers=K), module.config(hf, mtp_layers=1)
    assert (cfg.mtp.depth, cfg.mtp.weights, alone.mtp.weights) == (K, "per_depth", "shared")
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), models.abstract_params(cfg))
    tensors = table_lib.to_tensors(module.table(cfg), params)
    N = cfg.decoder.depth
    of_layer = lambda found, n: {  # noqa: E731
        name.partition(f".layers.{n}.")[2]: x for name, x in found.items() if f"language_model.layers.{n}." in name
        or name.startswith(f"model.layers.{n}.")
    }  # fmt: skip
    for k in range(K):
        one = params | {"mtp": jax.tree.map(lambda x, k=k: x[k], params["mtp"])}
        want = of_layer(table_lib.to_tensors(module.table(alone), one), N)
        got = of_layer(tensors, N + k)
        assert "eh_proj.weight" in got and got.keys() == want.keys()
        assert all(np.array_equal(got[name], want[name]) for name in want)
    jax.tree.map(np.testing.assert_array_equal, table_lib.to_params(module.table(cfg), tensors), params)
    copies = [name for name in module.duplicates(cfg) if name.endswith("embed_tokens.weight")]
    assert [name.split(".")[-3] for name in copies] == [str(N + k) for k in range(K)]

    def said(count):
        text = mtp.text_part(hf) | {"num_nextn_predict_layers": count}
        return hf | {"text_config": text} if "text_config" in hf else text

    assert mtp.layers_in(said(K), tensors) == mtp.layers_in(said(0), tensors) == K
    with pytest.raises(UserError, match="num_nextn_predict_layers is 2, but there are 3 layers behind layer"):
        mtp.layers_in(said(2), tensors)
    assert mtp.layers_in(said(K), {name: x for name, x in tensors.items() if f".layers.{N}." not in name}) == 0
