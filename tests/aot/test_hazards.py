"""Each hazard is seen in the smallest program that has it, and not where the same operations are right."""

from __future__ import annotations

import pytest

from glmv_jax.aot import costs, hazards, hlo

MESH = {"data": 2, "fsdp": 4}
OVER_FSDP = "replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add"
SUM = f"  %r = f32[1024,2048]{{1,0}} all-reduce(%g), channel_id=1, {OVER_FSDP}\n"
KNOWN = hazards.Known({(1024, 2048): ("fsdp",), (512, 512): ("data",)}, 256, frozenset({588, 1176}))


def module(body: str, more: str = "") -> str:
    add = "%add (a: f32[], b: f32[]) -> f32[] {\n  %a = f32[] parameter(0)\n  %b = f32[] parameter(1)\n"
    add += "  ROOT %c = f32[] add(%a, %b)\n}\n\n"
    begins = "ENTRY %main (x: f32[1024,2048]) -> f32[] {\n  %x = f32[1024,2048]{1,0} parameter(0)\n"
    return f"HloModule m, num_partitions=8\n\n{add}{more}{begins}{body}  ROOT %end = f32[] constant(0)\n}}\n"


def said(body: str, more: str = "") -> list[str]:
    found = costs.schedule(hlo.parse(module(body, more)))
    return hazards.warnings(found, costs.transfers(found, MESH), KNOWN)


def test_a_gradient_that_is_summed_whole():
    (line,) = said(SUM.replace("%g", "%x"))
    assert "reduce-scatter was meant" in line and "over fsdp, 0.01 GB" in line
    other = "  %g = f32[512,512]{1,0} constant({...})\n  %r = f32[512,512]{1,0} all-reduce(%g), " + OVER_FSDP + "\n"
    assert said(other) == []  # split over data, summed over fsdp


def test_of_many_the_dearest_are_shown():
    sums = [SUM.replace("%g", "%x").replace("%r", f"%r{n}") for n in range(hazards.SHOWN + 2)]
    *shown, rest = said("".join(sums))
    assert len(shown) == hazards.SHOWN and all("meant" in line for line in shown) and rest == "and 2 more like these"


@pytest.mark.parametrize("fused", [False, True])
def test_a_gather_written_as_a_sum(fused):
    update = """  %zero = f32[] constant(0)
  %zeros = f32[4096,2048]{1,0} broadcast(%zero), dimensions={}
  %at = s32[] constant(0)
  ROOT_g = f32[4096,2048]{1,0} dynamic-update-slice(%zeros, %p, %at, %at)
"""
    more, body = "", update.replace("ROOT_g", "%g").replace("%p", "%x")
    if fused:
        more = "%fused (p: f32[1024,2048]) -> f32[4096,2048] {\n  %p = f32[1024,2048]{1,0} parameter(0)\n"
        more += update.replace("ROOT_g", "ROOT %u") + "}\n\n"
        body = "  %g = f32[4096,2048]{1,0} fusion(%x), kind=kLoop, calls=%fused\n"
    total = SUM.replace("1024,2048", "4096,2048")
    (line,) = said(body + total, more)
    assert "one part among zeros" in line and "all-gather was meant" in line
    summed = body.replace("broadcast(%zero), dimensions={}", "add(%x, %x)").replace("fusion(%x)", "custom-call(%x)")
    assert said(summed + total, more) == []


def test_a_sum_of_which_a_slice_is_kept():
    total = "  %g = f32[4096,2048]{1,0} custom-call(%x)\n" + SUM.replace("1024,2048", "4096,2048")
    at = "  %at = s32[] constant(0)\n  %u = f32[4096,2048]{1,0} bitcast(%r)\n"
    one = "  %s = f32[1024,2048]{1,0} dynamic-slice(%u, %at, %at), dynamic_slice_sizes={1024,2048}\n"
    (line,) = said(total + at + one)
    assert "keeps a slice" in line
    assert said(total + at + one + "  %v = f32[4096,2048]{1,0} negate(%r)\n") == []  # all of it is used too


def test_pixels_that_move():
    gather = "  %p = u8[64,256,588]{2,1,0} custom-call(%x)\n"
    gather += f"  %r = u8[256,256,588]{{2,1,0}} all-gather(%p), dimensions={{0}}, {OVER_FSDP}\n"
    (line,) = said(gather)
    assert "all-gather of patches u8[64,256,588] over fsdp" in line
    normalised = gather.replace("u8[", "bf16[").replace(",588]", ",1176]")
    assert "all-gather of patches bf16[64,256,1176]" in said(normalised)[0]
    assert said(normalised.replace(",256,", ",1024,")) == []  # a matrix for each layer
    gradient = "  %p = f32[1024,1176]{1,0} custom-call(%x)\n"
    gradient += f"  %r = f32[1024,1176]{{1,0}} all-reduce(%p), {OVER_FSDP}\n"
    assert said(gradient) == []


def test_attention_weights_in_memory():
    exp = '  %e = f32[8,16,1024,1024]{3,2,1,0} exponential(%x), metadata={op_name="jit(f)/jvp(Tower)/attention/exp"}\n'
    (line,) = said(exp)
    assert line.startswith("Tower/attention: attention weights f32[8,16,1024,1024] pass through memory, 0.54 GB")
    assert said(exp.replace("[8,16,1024,1024]", "[8,16,128,128]")) == []
    assert said(exp.replace("/attention", "/mlp")) == []


def product(name: str, scope: str, rows: int) -> str:
    return (
        f"  %{name}.l = f32[{rows},512]{{1,0}} custom-call(%x)\n  %{name}.r = f32[512,512]{{1,0}} custom-call(%x)\n"
        f"  %{name} = f32[{rows},512]{{1,0}} dot(%{name}.l, %{name}.r), lhs_contracting_dims={{1}}, "
        f'rhs_contracting_dims={{0}}, metadata={{op_name="jit(f)/{scope}/moe/experts/ragged_dot"}}\n'
    )


def test_a_dense_weight_gradient():
    forward = product("f", "jvp(Tower)", 128)
    (line,) = said(forward + product("b", "transpose(jvp(Tower))", 17 * 128))
    assert "17.0 x the FLOPs" in line and line.startswith("Tower/moe/experts")
    assert said(forward + product("b", "transpose(jvp(Tower))", 2 * 128)) == []


def test_rows_sent_to_experts_are_those_there_are_on_either_way():
    """A way out fills a buffer half as long again, the way back empties it."""
    body = "  %w = f32[1536,2048]{1,0} constant({...})\n  %n = s32[4]{0} constant({1, 2, 3, 4})\n"
    over = "replica_groups={{0,1,2,3},{4,5,6,7}}"
    body += f"  %y = f32[1536,2048]{{1,0}} ragged-all-to-all(%x, %w, %n, %n, %n, %n), channel_id=1, {over}\n"
    body += f"  %z = f32[1024,2048]{{1,0}} ragged-all-to-all(%y, %x, %n, %n, %n, %n), channel_id=2, {over}\n"
    moved = costs.transfers(costs.schedule(hlo.parse(module(body))), MESH)
    assert [(t.kind, t.sent) for t in moved] == [("ragged-all-to-all", 1024 * 2048 * 4 * 3 / 4)] * 2
