"""`glmv shapes`: every experiment, at nano and at full size, without its devices; and the layouts that it refuses."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from glmv_jax import cli, config
from glmv_jax.parallel import mesh as mesh_lib
from glmv_jax.train import shapes
from glmv_jax.typing import UserError

GLM5V = "experiments/glm5v_pretrain.py:size=l"


def run(spec, *overrides, devices=0, **settings):
    """(the report, what is printed)."""
    out = io.StringIO()
    cfg = config.override(config.load(spec), overrides)
    report = shapes.run(cfg, devices, console=Console(file=out, width=200), **settings)
    return report, out.getvalue()


@pytest.mark.parametrize("spec, devices", [
    ("cogvit_mim.py:size=nano,semantic=false", 8), ("cogvit_mim.py:size=l", 64), ("cogvit_siglip.py:size=nano", 8),
    ("cogvit_siglip.py:size=nano,role=teacher", 8), ("cogvit_siglip.py:size=l", 256), ("vlm_pretrain.py:size=nano", 8),
    ("vlm_pretrain.py:size=l", 64), ("vlm_sft.py:size=nano", 8), ("vlm_sft.py:size=l", 64), ("rl_grpo.py:size=nano", 8),
    ("rl_grpo.py:size=l", 8), ("mmtp_ablation.py:size=nano", 8), ("mmtp_ablation.py:size=0p5b", 64),
    ("glm5v_pretrain.py:size=nano", 8), ("glm5v_pretrain.py:size=l", 512),
])  # fmt: skip
def test_every_experiment(spec, devices):
    """As it stands none keeps a large array whole along an axis that is there to split it."""
    report, printed = run(f"experiments/{spec}", devices=devices)
    assert report["devices"] == devices and report["refusal"] == "" and report["replicated"] == []
    parameters = [row for row in report["arrays"] if row["kind"] == "parameter"]
    assert all(row["path"] in re.sub(r"\s", "", printed) for row in parameters)
    moments = [row for row in report["arrays"] if row["kind"] == "optimiser" and len(row["shape"]) > 1]
    assert moments and all(row["of"] for row in moments)
    where = {row["path"]: row["spec"] for row in parameters}
    assert all(row["spec"] == where[row["of"]] for row in moments)


def test_a_public_checkpoint_has_to_be_there():
    with pytest.raises(UserError, match="model.checkpoint is not given"):
        run("experiments/public_tune.py", devices=8)


def test_totals_of_the_largest():
    """743.9 B parameters and 9.9 B of the MTP layer, Muon's one moment for nearly all of them; a 512th of that."""
    report, _ = run(GLM5V, devices=512)
    assert report["mesh"] == {"fsdp": 16, "expert": 32}
    assert report["totals"] == GOLDEN
    by_path = {row["path"]: row for row in report["arrays"]}
    up = by_path["decoder/blocks1/layer0/moe/up"]
    assert up["spec"] == ((), ("expert",), ("fsdp",), ())
    assert up["here"] * 512 == up["bytes"] == 4 * 75 * 256 * 6144 * 2048


def test_layers_that_do_not_divide_over_stages_are_split_all_the_same():
    """GLM-5's 75 layers of experts on 16 stages: what it costs is said; a device keeps a 512th of them as ever."""
    mesh = [f"mesh.{axis}={n}" for axis, n in (("stage", 16), ("fsdp", 1), ("expert", 32), ("tensor", 1))]
    report, printed = run(GLM5V, *mesh, "rules=fsdp_expert")
    assert report["devices"] == 512
    assert "75 layers on 16 stages are 5 on each, 5 of all skipped: 6.7% more time" in printed
    up = {row["path"]: row for row in report["arrays"]}["decoder/blocks1/layer0/moe/up"]
    assert up["shape"] == (75, 256, 6144, 2048) and up["here"] * 512 == up["bytes"]


GOLDEN = {
    "parameter": {"numbers": 754_671_041_792, "bytes": 4 * 754_671_041_792, "here": 5_902_372_544},
    "optimiser": {"numbers": 756_772_037_128, "bytes": 4 * 756_772_037_128, "here": 5_925_136_288},
    "carried": {"numbers": 19_457, "bytes": 77_828, "here": 77_828},
    "constant": {"numbers": 0, "bytes": 0, "here": 0},
}


@pytest.mark.parametrize("overrides, message", [
    (["rules=data"], r"parameter decoder/\S+ \S+ \(and \d+ more\) is whole on all 16 devices of fsdp under rules=data, "
                     r"\S+ GB each; set rules=fsdp_expert, or --allow-replicated decoder/\S+$"),
    (["mesh.tensor=2", "rules=fsdp_expert"],
     r"is whole on all 2 devices of tensor under rules=fsdp_expert, .*; set rules=\w*tensor"),
    (["rules=fsdp_tensor"], r"moe/\w+ \S+ \(and \d+ more\) is whole on all 32 devices of expert under"),
])  # fmt: skip
def test_a_large_array_that_need_not_be_whole_is_refused(overrides, message):
    report, _ = run(GLM5V, *overrides, devices=512)
    assert re.search(message, report["refusal"]), report["refusal"]


def test_what_is_large_and_what_may_be_whole_can_be_said():
    layout = dict(devices=4)
    spec, overrides = "experiments/vlm_sft.py:size=l", ["rules=data"]
    refused = run(spec, *overrides, **layout)[0]["replicated"]
    assert refused[0]["axis"] == "fsdp" and refused[0]["here"] >= refused[-1]["here"] > 64 << 20
    assert run(spec, *overrides, limit=16 << 30, **layout)[0]["refusal"] == ""
    every = ["decoder/.*", "vision/.*", "merger/.*", "mtp/.*"]
    assert run(spec, *overrides, allowed=every, **layout)[0]["refusal"] == ""
    left = run(spec, *overrides, allowed=["vision/.*"], **layout)[0]["replicated"]
    assert 0 < len(left) < len(refused)
    with pytest.raises(UserError, match=r"--allow-replicated '\(' is no regular expression"):
        run(spec, allowed=["("], **layout)


def test_over_data_parameters_are_whole_on_purpose():
    assert run("experiments/vlm_sft.py:size=l", "mesh.fsdp=1", "mesh.data=-1", devices=8)[0]["refusal"] == ""


def test_an_optimiser_state_that_lost_its_parameter_is_seen():
    row = shapes.Row("optimiser", "0/momentum/x", "", (1024, 1 << 16), "float32", None, ((), ()), 1 << 28, 1 << 28)
    mesh = mesh_lib.abstract_mesh({"fsdp": 8})
    assert [(r.path, axis) for r, axis in shapes.whole([row], mesh, 1 << 26)] == [("0/momentum/x", "fsdp")]
    assert not list(shapes.whole([row], mesh_lib.abstract_mesh({"fsdp": 7}), 1 << 26))  # nothing divides by 7


def test_the_command(capsys, tmp_path):
    argv = ["shapes", "--config", "experiments/vlm_sft.py:size=nano", "--devices", "4", "--biggest"]
    assert cli.main([*argv, "--json", str(tmp_path / "shapes.json")]) == 0
    printed = capsys.readouterr().out
    report = json.loads((tmp_path / "shapes.json").read_text())
    assert report["devices"] == 4 and "4 devices, data 4; rules data" in printed
    biggest = max((r for r in report["arrays"] if r["kind"] == "parameter"), key=lambda r: r["here"])["path"]
    assert printed.index(biggest) < 1000

    argv = [*argv, "--config.mesh.data=1", "--config.mesh.fsdp=-1", "--limit-mb", "0.5"]
    assert cli.main(argv) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("glmv shapes: ") and complaint.count("\n") == 1
    assert "devices of fsdp under rules=data" in complaint and "set rules=fsdp, or" in complaint
    assert cli.main([*argv, "--config.rules=fsdp", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rules"] == "fsdp"
