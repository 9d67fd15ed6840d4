"""Public checkpoints in and out, against transformers and safetensors themselves, and what a person sees when it fails.

Not covered: released weights, and downloads (there is no network here, only its absence).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from glmv_jax import cli  # noqa: E402
from glmv_jax.interop import families, folder  # noqa: E402
from glmv_jax.interop.table import Leaf  # noqa: E402
from glmv_jax.models import api  # noqa: E402
from glmv_jax.parallel import rules  # noqa: E402
from glmv_jax.parallel.mesh import make_mesh  # noqa: E402
from glmv_jax.train import checkpoint, exchange  # noqa: E402
from glmv_jax.trees import flatten  # noqa: E402
from glmv_jax.typing import UserError  # noqa: E402
from tests.interop import hf_glm_ocr  # noqa: E402


def all_tensors(path) -> dict:
    found: dict = {}
    for file in sorted(path.glob("*.safetensors")):
        found |= load_file(file)
    return found


def same_tensors(a, b) -> bool:
    a, b = all_tensors(a), all_tensors(b)
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize(
    ("dtype", "shard", "mtp", "repeated"),
    [(None, "5GB", 0, False), (None, "40KB", 0, False), (None, "5GB", 1, True),
     (torch.bfloat16, "5GB", 1, False), (None, "5GB", 3, True)],
)  # fmt: skip
def test_out_again_is_what_came_in(tmp_path, capsys, dtype, shard, mtp, repeated):
    hf_glm_ocr.write(tmp_path / "in", dtype=dtype, shard=shard, mtp=mtp, repeated=repeated)
    (tmp_path / "in" / "tokenizer_config.json").write_text('{"a": "ä"}')
    (tmp_path / "in" / "chat_template.jinja").write_text("{{ messages }}")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) == (1 if shard == "5GB" else 8)
    assert cli.main(["import-hf", str(tmp_path / "in"), str(tmp_path / "ours")]) == 0
    assert "glm_ocr, " in capsys.readouterr().out
    assert cli.main(["export-hf", str(tmp_path / "ours"), str(tmp_path / "out")]) == 0
    assert same_tensors(tmp_path / "in", tmp_path / "out")
    small = {p.name for p in (tmp_path / "in").iterdir() if "safetensors" not in p.name}
    assert small == {p.name for p in (tmp_path / "out").iterdir()} - {"model.safetensors"}
    for name in small - {"config.json"}:
        assert (tmp_path / "in" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "ours", "out"], "nothing is left behind"

    about = json.loads((tmp_path / "ours" / "model.json").read_text())
    assert about["family"] == "glm_ocr" and about["mtp"] == mtp and about["config"]["decoder"]["width"] == 32
    written = json.loads((tmp_path / "out" / "config.json").read_text())["text_config"]
    assert mtp < 2 or written["num_nextn_predict_layers"] == mtp
    # Not only the same bytes: transformers takes it, MTP layer or not, and computes the same.
    ids = torch.tensor(np.random.default_rng(0).integers(1, 99, (2, 9)))
    logits = []
    for name in ("in", "out"):
        model = transformers.GlmOcrForConditionalGeneration.from_pretrained(tmp_path / name).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_in_again_is_what_went_out(tmp_path):
    hf_glm_ocr.write(tmp_path / "in", mtp=1)
    exchange.import_hf(tmp_path / "in", tmp_path / "ours")
    exchange.export_hf(tmp_path / "ours", tmp_path / "out")
    exchange.import_hf(tmp_path / "out", tmp_path / "again")
    a, b = (flatten(checkpoint.load_params(tmp_path / name)) for name in ("ours", "again"))
    assert a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


def test_other_dtypes_on_the_way(tmp_path):
    model = hf_glm_ocr.write(tmp_path / "in")
    exchange.import_hf(tmp_path / "in", tmp_path / "ours", "bfloat16")
    loaded = exchange.load(tmp_path / "ours")
    assert loaded.cfg.decoder.dtype == loaded.cfg.vision.dtype == "bfloat16"
    assert {x.dtype.name for x in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(exchange.load(tmp_path / "ours", "float32").params)} == {"float32"}
    exchange.export_hf(tmp_path / "ours", tmp_path / "out")
    exchange.export_hf(tmp_path / "ours", tmp_path / "wide", "float32")
    for name, dtype in (("out", torch.bfloat16), ("wide", torch.float32)):
        again = transformers.GlmOcrForConditionalGeneration.from_pretrained(tmp_path / name)
        assert again.dtype == dtype
        for (key, got), want in zip(again.state_dict().items(), model.state_dict().values()):
            assert torch.equal(got, want.to(torch.bfloat16).to(dtype)), key


def test_shards_of_any_size_are_read_by_safetensors(tmp_path):
    hf_glm_ocr.write(tmp_path)
    tensors = folder.Tensors(tmp_path)
    cfg = families.open_checkpoint(tmp_path).cfg
    arrays = flatten(families.load(families.open_checkpoint(tmp_path)))
    found = families.tensors_of(folder.read_config(tmp_path), cfg, arrays)
    for limit in (1, 30_000, 10**9):
        (out := tmp_path / f"out{limit}").mkdir()
        folder.write_tensors(out, found, shard_bytes=limit)
        assert same_tensors(tmp_path, out)
        files = list(out.glob("*.safetensors"))
        assert len(files) == {1: len(tensors), 10**9: 1}.get(limit, len(files)) and len(files) >= 1
        largest = max(t.numel() * 4 for t in all_tensors(out).values())
        assert limit == 1 or all(f.stat().st_size < max(limit, largest) + 10_000 for f in files)
        if limit < 10**9:
            index = json.loads((out / folder.INDEX).read_text())
            assert {p.name for p in files} == set(index["weight_map"].values())
            assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in all_tensors(out).values())


def test_every_device_is_given_its_part_alone(tmp_path, monkeypatch):
    hf_glm_ocr.write(tmp_path / "in", mtp=1)
    exchange.import_hf(tmp_path / "in", tmp_path / "ours")
    found = families.open_checkpoint(tmp_path / "in")
    whole = {path: leaf.read() for path, leaf in found.arrays.items()}
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    shardings = rules.preset("fsdp_tensor").shardings(mesh, api.logical_axes(found.cfg))
    asked = []
    read = Leaf.read
    monkeypatch.setattr(Leaf, "read", lambda leaf, *args: asked.append((leaf, out := read(leaf, *args))) or out)
    direct = flatten(families.load(found, shardings))
    kernel = found.arrays["decoder/blocks/mlp/gate/kernel"]
    assert [out.shape for leaf, out in asked if leaf is kernel] == [(2, 8, 32)] * 8

    like = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), api.abstract_params(found.cfg), shardings
    )
    started = flatten(checkpoint.load_params(tmp_path / "ours", like=like))  # as a stage with init_from does
    for path, want in whole.items():
        for got in (direct[path], started[path]):
            assert got.sharding == flatten(shardings)[path] and np.asarray(got).tobytes() == want.tobytes()


def test_a_run_that_began_from_it_is_given_back(tmp_path):
    hf_glm_ocr.write(tmp_path / "in")
    exchange.import_hf(tmp_path / "in", tmp_path / "ours")
    params = checkpoint.load_params(tmp_path / "ours")
    params["decoder"]["head"] = params["decoder"]["head"] + 1
    run = tmp_path / "sft"
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"stage": "sft", "init_from": str(tmp_path / "ours")}))
    (run / "results.json").write_text("{}")
    saved = checkpoint.Checkpoints(run / "checkpoints")
    state = checkpoint.TrainState(np.int32(3), jax.tree.map(jax.numpy.asarray, params), {}, {})
    saved.save(3, state, {})
    saved.wait()
    saved.close()
    exchange.export_hf(run, tmp_path / "out")
    a, b = all_tensors(tmp_path / "in"), all_tensors(tmp_path / "out")
    assert torch.equal(b.pop("lm_head.weight"), a.pop("lm_head.weight") + 1)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert exchange.load(run).params["decoder"]["head"].shape == (32, 128)
    (run / "config.json").write_text(json.dumps({"stage": "sft", "init_from": ""}))
    with pytest.raises(UserError, match="is no imported checkpoint and did not begin from one"):
        exchange.export_hf(run, tmp_path / "out2")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def refused(tmp_path, capsys, *words, source="in", target="ours") -> None:
    """import-hf refuses in one line with these words, and leaves nothing."""
    before = sorted(p.name for p in tmp_path.iterdir())
    capsys.readouterr()  # the progress of transformers
    assert cli.main(["import-hf", str(tmp_path / source), str(tmp_path / target)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def rewrite(path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


@pytest.fixture
def source(tmp_path):
    hf_glm_ocr.write(tmp_path / "in")
    return tmp_path / "in"


NORM = "model.language_model.layers.1.input_layernorm.weight"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.update(surprise=torch.zeros(2)), ["1 tensors have no place in this family", "surprise"]),
        (lambda t: t.pop(NORM), [f"tensor {NORM} is missing", "download"]),
        (lambda t: t.update({NORM: torch.zeros(32, dtype=torch.int8)}), ["in/model.safetensors", NORM, "int8"]),
        (lambda t: t.update({NORM: torch.zeros(31)}), ["in/model.safetensors", NORM, "(31,)", "(32,)"]),
        (lambda t: t.update({"lm_head.weight": torch.zeros(127, 32)}), ["decoder/head", "(32, 127)", "(32, 128)"]),
        (lambda t: t.update({"model.visual.blocks.0.attn.qkv.weight": torch.zeros(95, 32)}), ["attn.qkv.weight"]),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, capsys, source, change, words):
    rewrite(source / "model.safetensors", change)
    refused(tmp_path, capsys, *words)


def test_foreign_and_missing_folders(tmp_path, capsys, source):
    hf_glm_ocr.edit_config(source, model_type="llama")
    refused(tmp_path, capsys, "model_type 'llama' is not known", "glm_ocr")
    hf_glm_ocr.edit_config(source, model_type="glm_ocr", text_config={"vocab_size": 5})
    refused(tmp_path, capsys, "config.json has no")
    refused(tmp_path, capsys, "no such folder", "org/name", source="nowhere")
    refused(tmp_path, capsys, "is a file", source="in/config.json")
    (source / "config.json").unlink()
    refused(tmp_path, capsys, "no config.json")


def test_a_name_without_a_network(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert cli.main(["import-hf", "some-org/no-such-model", str(tmp_path / "ours")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot be fetched from the Hub" in err and "check the name and the network" in err


def test_broken_files(tmp_path, capsys):
    hf_glm_ocr.write(tmp_path / "in", shard="40KB")
    shard = sorted((tmp_path / "in").glob("*.safetensors"))[2]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-7])
    refused(tmp_path, capsys, shard.name, "is no whole safetensors file", "download it again")
    shard.write_bytes(b"")
    refused(tmp_path, capsys, shard.name, "is no whole safetensors file")
    shard.unlink()
    refused(tmp_path, capsys, "1 of 8 files are missing", shard.name)
    shard.write_bytes(whole)
    rewrite(shard, lambda t: t.popitem())
    refused(tmp_path, capsys, "lists tensor", shard.name)


def test_targets_that_are_in_the_way(tmp_path, capsys, source):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "thesis.txt").write_text("keep")
    refused(tmp_path, capsys, "ours exists and is not empty")
    (tmp_path / "file").write_text("keep")
    refused(tmp_path, capsys, "file is a file", target="file")
    refused(tmp_path, capsys, "cannot write", target="file/below")
    (tmp_path / "ours" / "thesis.txt").unlink()
    exchange.import_hf(source, tmp_path / "ours")  # an empty folder is none
    with pytest.raises(UserError, match="exists and is not empty"):
        exchange.export_hf(tmp_path / "ours", source)


def test_a_killed_import_is_never_taken_for_whole(tmp_path, source):
    code = f"""
import os
from glmv_jax.interop import arrays
from glmv_jax.train import exchange
blocks, n = arrays._blocks, [0]
def counted(*a):
    n[0] += 1
    if n[0] == 9: os._exit(9)
    return blocks(*a)
arrays._blocks = counted
exchange.import_hf({str(source)!r}, {str(tmp_path / "ours")!r})
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 9
    assert (tmp_path / "ours.part" / "checkpoints").is_dir() and not (tmp_path / "ours").exists()
    for read in (lambda p: checkpoint.load_params(p), lambda p: exchange.load(p)):
        with pytest.raises(UserError):
            read(tmp_path / "ours.part")
    exchange.import_hf(source, tmp_path / "ours")  # the next attempt clears it away
    assert not (tmp_path / "ours.part").exists() and exchange.load(tmp_path / "ours").params


@pytest.mark.parametrize("way", ["import", "export"])
def test_a_disk_that_takes_no_more(tmp_path, source, way):
    if way == "export":
        exchange.import_hf(source, tmp_path / "ours")
    code = """
import resource, signal, sys
from glmv_jax import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # as a full disk, for larger files
sys.exit(cli.main(sys.argv[1:]))
"""
    before = sorted(p.name for p in tmp_path.iterdir())
    argv = [f"{way}-hf", source if way == "import" else tmp_path / "ours", tmp_path / "new"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert f"cannot write {tmp_path / 'new'}" in done.stderr and "larger than this system allows" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_what_is_no_checkpoint_of_ours(tmp_path, source):
    for where in (source, tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="is no imported checkpoint and did not begin from one"):
            exchange.export_hf(where, tmp_path / "out")
    exchange.import_hf(source, tmp_path / "ours")
    (tmp_path / "ours" / "model.json").write_text('{"mtp": ')
    with pytest.raises(UserError, match="model.json cannot be read"):
        exchange.load(tmp_path / "ours")


def test_damage_on_disk_is_noticed(tmp_path, source):
    exchange.import_hf(source, tmp_path / "ours")
    params = tmp_path / "ours" / "checkpoints" / "0" / "params"
    file = next(p for p in (params / "decoder.head").iterdir() if not p.name.startswith("."))
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="decoder.head.*has changed"):
        exchange.load(tmp_path / "ours")
    shutil.rmtree(params / "decoder.head")
    with pytest.raises(UserError, match="decoder.head.*is missing"):
        exchange.export_hf(tmp_path / "ours", tmp_path / "out")


def test_repeated_tensors_must_repeat(tmp_path, capsys):
    hf_glm_ocr.write(tmp_path / "in", mtp=1, repeated=True)
    name = "model.language_model.layers.2.embed_tokens.weight"
    rewrite(tmp_path / "in" / "model.safetensors", lambda t: t[name].add_(1))
    refused(tmp_path, capsys, "in/model.safetensors", name, "differs from model.language_model.embed_tokens.weight")
