"""Small programs compiled for described TPUs, their FLOPs, bytes and memory against counts by hand.

Nothing is run. Not covered: whether the compiler's seconds are true; for that there is no TPU here.
"""

from __future__ import annotations

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from glmv_jax import cli, config
from glmv_jax.aot import costs, hlo, program, report, show, topology
from glmv_jax.aot import main as aot
from glmv_jax.kernels import grouped_matmul, matmul
from glmv_jax.optim.muon import orthogonalise
from glmv_jax.parallel import rules as rules_lib
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.train import main
from glmv_jax.typing import UserError

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install 'glmv_jax[tpu]'"
)
P = PartitionSpec
AXES = {"data": 2, "tensor": 2}


@pytest.fixture(scope="module", params=["v5e:2x2", "v5p:2x2x1"])
def described(request):
    """(topology, mesh) of four devices."""
    slice_ = topology.parse(request.param)
    return slice_, make_mesh(AXES, slice_.devices)


EVERYWHERE = P()


def array(mesh, shape, spec=EVERYWHERE, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def compiled(fn, *args):
    return jax.jit(fn).lower(*args).compile()


def scanned(step, x, times):
    return jax.lax.scan(lambda c, _: (step(c), None), x, None, length=times)[0]


@needs_libtpu
def test_products_in_loops(described):
    """Seven turns, and after them three of five: each product counts as often as it is run."""
    slice_, mesh = described
    M, K = 512, 1024

    def fn(x, w):
        x = scanned(lambda c: jnp.tanh(c @ w), x, 7)
        return scanned(lambda c: scanned(lambda d: jnp.tanh(d @ w), c, 5) * 2, x, 3)

    told = report.of_text(compiled(fn, array(mesh, (M, K)), array(mesh, (K, K))).as_text(), slice_)
    assert told["loops"] == [7, 3, 5] and not told["loops_of_unknown_length"]
    flops = (7 + 3 * 5) * 2 * M * K * K
    assert told["flops"] == flops
    # The compiler's own time for these products: not less than the chip's peak allows, and of that order.
    assert flops / slice_.chip.flops < told["estimated_seconds"]["matmul"] < 4 * flops / slice_.chip.flops


@needs_libtpu
def test_flops_without_loops_are_xlas():
    """Batches of products and convolutions are written in ways of the compiler's own; XLA counts them too."""
    mesh = make_mesh({"data": 1}, topology.parse("v5e:1x1").devices)

    def fn(x, w, image, kernel):
        scores = jnp.einsum("bthk,bshk->bhts", x, x)
        names = ("NHWC", "HWIO", "NHWC")
        patches = jax.lax.conv_general_dilated(image, kernel, (14, 14), "VALID", dimension_numbers=names)
        return jax.grad(lambda w: jnp.einsum("bhts,bhsn->bhtn", scores, w).astype(jnp.float32).sum())(w), patches

    shapes = (4, 256, 8, 64), (4, 8, 256, 128), (2, 224, 224, 3), (14, 14, 3, 64)
    executable = compiled(fn, *(array(mesh, shape) for shape in shapes))
    found = costs.schedule(hlo.parse(executable.as_text()))
    ours = sum(step.times * costs.flops_of(found.module, step) for step in found.steps)
    assert ours > 1e8 and ours == pytest.approx(executable.cost_analysis()["flops"], rel=0.05)


ROWS, PARTS = P("data"), P(("data", "tensor"))
TRANSFERS = {  # fn, spec before and after, axes, what a device holds of [4096, 1024] bf16, what it sends of that
    "all-gather": (lambda x: jax.lax.all_gather(x, "tensor", tiled=True), PARTS, ROWS, ("tensor",), 1 / 4, 1),
    "reduce-scatter": (lambda x: jax.lax.psum_scatter(x, "tensor", tiled=True), ROWS, PARTS, ("tensor",), 1 / 2, 1 / 2),
    "all-reduce": (lambda x: jax.lax.psum(x, tuple(AXES)), EVERYWHERE, EVERYWHERE, ("data", "tensor"), 1, 2 * 3 / 4),
    "all-to-all": (lambda x: jax.lax.all_to_all(x, "data", 0, 1, tiled=True), ROWS, ROWS, ("data",), 1 / 2, 1 / 2),
    "collective-permute": (
        lambda x: jax.lax.ppermute(x, "data", [(0, 1), (1, 0)]), ROWS, ROWS, ("data",), 1 / 2, 1),
}  # fmt: skip


@needs_libtpu
@pytest.mark.parametrize("kind", TRANSFERS)
def test_bytes_that_are_sent(described, kind):
    _, mesh = described
    fn, before, after, axes, held, share = TRANSFERS[kind]
    fn = jax.shard_map(fn, mesh=mesh, in_specs=before, out_specs=after, check_vma=False)
    text = compiled(fn, array(mesh, (4096, 1024), before)).as_text()
    (moved,) = costs.transfers(costs.schedule(hlo.parse(text)), dict(mesh.shape))
    operand = 4096 * 1024 * 2 * held
    assert (moved.kind, moved.axes, moved.operand, moved.sent) == (kind, axes, operand, operand * share)
    assert moved.asynchronous == (kind == "collective-permute") and not moved.hidden and not moved.slices


@needs_libtpu
def test_a_gather_in_a_loop_counts_as_often_as_it_runs(described):
    slice_, mesh = described

    def fn(x, w_LKN):
        def layer(c, w):
            w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
            return jnp.tanh(c @ w), None

        return jax.lax.scan(layer, x, w_LKN)[0]

    text = compiled(fn, array(mesh, (512, 512), P("data")), array(mesh, (6, 512, 512), P(None, "tensor"))).as_text()
    told = report.of_text(text, slice_)
    gathers = [row for row in told["collectives"] if row["kind"] == "all-gather"]
    assert sum(row["bytes"] for row in gathers) == 6 * 512 * 512 * 2 / 2


@needs_libtpu
def test_what_the_host_keeps(described):
    slice_, mesh = described
    on_host = jax.ShapeDtypeStruct(
        (6, 512, 512), jnp.float32, sharding=NamedSharding(mesh, P(), memory_kind="pinned_host")
    )
    fn = lambda x, w_L: jax.lax.scan(lambda c, w: (c @ jax.device_put(w, jax.memory.Space.Device), None), x, w_L)[0]  # noqa: E731
    executable = compiled(fn, array(mesh, (128, 512), dtype=jnp.float32), on_host)
    told = report.memory(executable.memory_analysis(), slice_)
    assert told["host_bytes"] == 6 * 512 * 512 * 4 * slice_.devices_per_host and told["fits"]


@needs_libtpu
def test_what_does_not_fit_is_a_report():
    slice_ = topology.parse("v5e:2x2")
    mesh = make_mesh(AXES, slice_.devices)
    lower = lambda: jax.jit(lambda x: x @ x.T).lower(array(mesh, (200_000, 512)))  # noqa: E731
    made = program.Program("step", "none", lower, mesh, "data", {}, {}, 1.0)
    told = report.build(program.compiled(made), slice_, {})
    assert not told["fits"] and told["peak_hbm_bytes"] > slice_.chip.hbm and told["flops"] is None
    assert "DOES NOT FIT" in show.text(told) and "compiler refuses" in show.page(told)


@needs_libtpu
def test_kernels_are_those_of_the_devices_that_are_described():
    mesh = make_mesh({"data": 4}, topology.parse("v5e:2x2").devices)
    x, w = jnp.zeros((256, 128)), jnp.zeros((4, 128, 128))
    assert matmul.supported() and not grouped_matmul.supported(x, w)
    with rules_lib.use(mesh, rules_lib.preset("data")):
        assert not matmul.supported() and grouped_matmul.supported(x, w)
        assert not grouped_matmul.supported(x[:, :96], w[:, :96])  # the gradient has it as its last dimension


@needs_libtpu
def test_muon_is_a_loop_where_a_compiler_for_tpus_reads_it():
    """And the same numbers: traced for described devices, run here."""
    mesh = make_mesh({"data": 4}, topology.parse("v5e:2x2").devices)
    x = jax.random.normal(jax.random.key(0), (3, 24, 40))
    loop = jax.jit(lambda x: orthogonalise(x))
    with rules_lib.use(mesh, rules_lib.preset("data")):
        assert loop.lower(x).as_text().count("stablehlo.while") == 1
        looped = loop(x)
    plain = jax.jit(orthogonalise)
    assert "stablehlo.while" not in plain.lower(x).as_text()
    np.testing.assert_allclose(looped, plain(x), rtol=1e-5, atol=1e-6)


@needs_libtpu
def test_a_policy_that_waits_in_the_hosts_memory():
    """Lowered: its weights come as arrays of the host, each is copied to the devices. Other stages have none."""
    slice_ = topology.parse("v5e:2x2")
    made = program.of(config.load("experiments/rl_grpo.py:size=nano"), slice_, "reference")
    lowered = made.lower()
    parked, batch = lowered.args_info[0]
    text, many = lowered.as_text(), len(jax.tree.leaves(parked))
    assert text.count('_xla_buffer_placement = "device"') == many + 1 > 20  # and the result
    assert text.count('mhlo.memory_kind = "pinned_host"') == many
    assert lowered.out_info.shape == batch["tokens"].shape == made.batch["tokens"].shape
    with pytest.raises(UserError, match="stage sft asks no other policy"):
        program.of(config.load("experiments/vlm_sft.py:size=nano"), slice_, "reference")


@needs_libtpu
@pytest.mark.parametrize("name", ["prefill", "generate", "decode"])
def test_programs_that_answer(name):
    """Lowered, not compiled, which takes long. Stages 1 and 2 have none."""
    slice_ = topology.parse("v5e:2x2")
    cfg = config.load("experiments/rl_grpo.py:size=nano")
    made = program.of(cfg, slice_, name)
    assert made.batch["tokens"].shape == (cfg.rollout.prompts, cfg.data.prompt_tokens)
    lowered = made.lower()
    text, rows = lowered.as_text(), cfg.rollout.prompts * cfg.rollout.group
    assert 'mesh @mesh = <["data"=4]>' in text
    assert (f"{cfg.rollout.prompts}x{cfg.data.prompt_tokens}" in text) == (name != "decode")
    assert (f"{rows}x{cfg.rollout.max_new_tokens}xi32" in text) == (name == "generate")
    if name == "decode":  # the caches of all rows, a quarter a device, written in place; a token and its probability
        cache, token, logprob = lowered.out_info
        slots = cfg.data.prompt_tokens + cfg.rollout.max_new_tokens
        keys, d = cache["layers"]["k"], cfg.model.decoder
        assert keys.shape == (d.depth, rows * d.kv_heads, slots, d.head_dim)
        assert keys.sharding.spec == P(None, ("data",))
        assert token.shape == logprob.shape == (rows,)
        donated = jax.tree.leaves(jax.tree.map(lambda x: x.donated, lowered.args_info[0][1]))
        assert donated and all(donated)
    with pytest.raises(UserError, match="stages 3 to 5"):
        program.of(config.load("experiments/cogvit_siglip.py:size=nano"), slice_, name)


def test_a_digest_tells_what_a_report_is_of():
    cfg, where = config.load("experiments/cogvit_mim.py:size=nano"), topology.parse("v5e:2x2")
    same = aot.digest(config.override(cfg, ["seed=0", "log_every=3", "keep=9"]), where, "step", {})
    others = (
        (config.override(cfg, ["seed=1"]), where, "step", {}), (cfg, topology.parse("v5e:2x2", 2), "step", {}),
        (cfg, where, "prefill", {}), (cfg, where, "step", {"xla_some": "true"}),
    )  # fmt: skip
    assert aot.digest(cfg, where, "step", {}) == same and same not in {aot.digest(*other) for other in others}
    rl = config.load("experiments/rl_grpo.py:size=nano")
    drawn = config.override(rl, ["rollout.quotas=source", "rollout.samples.pictures=0", "max_skipped=3"])
    learnt = config.override(rl, ["rollout.episodes.rows=4"])
    of_rl, of_drawn, of_learnt = (aot.digest(x, where, "step", {}) for x in (rl, drawn, learnt))
    assert of_drawn == of_rl != of_learnt


KEYS = ("fits", "peak_hbm_bytes", "hbm_limit_bytes", "host_bytes", "flops", "estimated_compute_seconds",
        "fraction_of_peak", "collectives", "async_wire_fraction", "compile_seconds")  # fmt: skip


@needs_libtpu
def test_the_command(tmp_path, capsys):
    """A step of stage 1 at nano size: what it costs is what its parameters and batch say."""
    name, page, text = (str(tmp_path / f"a.{kind}") for kind in ("json", "html", "hlo"))
    argv = ["compile", "--config", "experiments/cogvit_mim.py:size=nano,semantic=false", "--topology", "v5e:2x2"]
    assert cli.main([*argv, "--json", name, "--html", page, "--hlo", text]) == 0
    with open(name, encoding="utf-8") as file:
        told = json.load(file)
    assert all(key in told for key in KEYS) and told["fits"] and told["config"] == argv[2]
    assert told["devices"] == 4 and told["mesh"] == {"data": 4}
    # Parameters and two moments of each that AdamW has, one of Muon's, all copied to each device.
    assert 2 * 4 * told["parameters"] < told["hbm"]["arguments"] < 4 * 4 * told["parameters"]
    # All of the model's products, the update's, and no more.
    assert told["model_flops"] < told["flops"] < 2 * told["model_flops"]
    # Gradients are summed over four devices.
    (sums,) = [row for row in told["collectives"] if (row["kind"], row["axes"]) == ("all-reduce", "data")]
    assert sums["bytes"] == pytest.approx(2 * 3 / 4 * 4 * told["parameters"], rel=0.2)
    assert sum(part["seconds"] for part in told["parts"]) == pytest.approx(told["estimated_compute_seconds"])
    assert "CogViT" in capsys.readouterr().out and "<table>" in open(page, encoding="utf-8").read()
    assert cli.main(["compile", "--compare", name, name]) == 0
    assert "1.00" in capsys.readouterr().out
    assert report.of_text(open(text, encoding="utf-8").read(), topology.parse("v5e:2x2"))["flops"] == told["flops"]


def test_what_the_command_lacks(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text("{}")
    for argv, said in (
        (["--topology", "v5e:2x2"], "--config is required"),
        (["--config", "experiments/vlm_sft.py:size=nano", "--topology", "v9:2x2"], "no such TPU"),
        (["--compare", str(path), str(path)], "is no report"),
    ):
        assert cli.main(["compile", *argv]) == 2
        assert said in capsys.readouterr().err


# --- shapes of batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cogvit_mim.py:size=nano,semantic=false", "cogvit_siglip.py:size=nano",
                                  "vlm_pretrain.py:size=nano", "vlm_sft.py:size=nano"])  # fmt: skip
def test_batches_have_the_shapes_that_are_compiled(name):
    cfg = config.load(f"experiments/{name}")
    cfg.batch = 4
    stage = main.stage_class(cfg.stage)(cfg)
    data = stage.train_data()
    batch = next(data)
    data.close()
    (shapes,) = stage.batch_shapes()
    given = {n: (np.shape(x), x.dtype) for n, x in batch.items() if n not in stage.host_only}
    assert {n: (x.shape, x.dtype) for n, x in shapes.items()} == given


def test_shapes_of_stage_5_are_those_its_loss_takes():
    stage = main.stage_class("rl")(config.load("experiments/rl_grpo.py:size=nano"))
    shapes = list(stage.batch_shapes())
    assert [x["tokens"].shape for x in shapes] == [(rows, stage.cfg.data.tokens) for rows in stage.rows]
    params = jax.eval_shape(stage.init_params, jax.random.key(0))
    loss, _ = jax.eval_shape(stage.loss, params, {}, stage.init_extra(), shapes[0], jax.random.key(0))
    assert loss.shape == ()
