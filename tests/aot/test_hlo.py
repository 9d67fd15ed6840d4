"""The text of programs: what a reader of lines gets wrong. The text here is made up, in the compiler's hand."""

from __future__ import annotations

import pathlib

import pytest

from glmv_jax.aot import costs, hazards, hlo, report, topology

# Two loops, one inside the other (3 and 5 turns), whose conditions hold other constants too; a Pallas kernel whose
# metadata ends on a line that begins with a brace; an estimate that is none; cycles inside of a fusion.
HERE = pathlib.Path(__file__).parent
NESTED, EARLY = ((HERE / name).read_text(encoding="utf-8") for name in ("nested.hlo", "early.hlo"))


def test_loops_kernels_and_threads():
    found = costs.schedule(hlo.parse(NESTED))
    assert found.loops == [3, 5]  # 1, 3, 5; not 7, and not 4096
    assert not found.unknown
    times = {step.op.name: (step.times, step.thread) for step in found.steps}
    assert times["fusion.1"] == (15, "") and times["kernel.2"] == (3, "") and times["copy.5"] == (1, "sparsecore")
    product = 2 * 8 * 128 * 128
    assert sum(step.times * costs.flops_of(found.module, step) for step in found.steps) == 15 * product + 3 * 640
    assert [costs.cycles(found.module["inner_body"].at[name]) for name in ("fusion.1", "copy.1")] == [1000, None]


def test_seconds_by_category():
    told = report.of_text(NESTED, topology.parse("v5e:2x2"))
    clock = topology.CHIPS["v5e"].clock
    assert told["estimated_seconds"]["matmul"] == pytest.approx(15 * 1000 / clock)  # nothing of the fusion's inside
    assert told["estimated_seconds"]["copies and layout"] == 0  # no estimate, and a copy of another core
    assert told["seconds_on_other_cores"] == {"sparsecore": pytest.approx(30 / clock)}
    assert told["estimated_seconds"]["custom kernel"] == pytest.approx(3 * 640 / topology.CHIPS["v5e"].flops)
    assert told["without_estimate"]["copy"] == 15 and told["without_estimate"]["tpu_custom_call"] == 3
    (mlp,) = [p for p in told["parts"] if p["part"] == "Tower/mlp"]
    assert mlp["pass"] == "forward" and mlp["flops"] == 15 * 2 * 8 * 128 * 128


def test_shapes():
    (array,) = hlo.arrays("bf16[3,100,64]{2,1,0:T(8,128)(2,1)S(5)}")
    assert array.bytes == 3 * 100 * 64 * 2 and array.padded_bytes == 3 * 104 * 128 * 2 and array.space == hlo.HOST
    turned = hlo.arrays("f32[128,8]{0,1:T(8,128)}")[0]
    assert turned.padded_bytes == turned.bytes  # 8 rows of 128
    nested = hlo.arrays("((f32[2]{0}, s4[4]), pred[], f8e4m3fn[7])")
    assert [a.bytes for a in nested] == [8, 2, 1, 7]


def test_a_loop_that_the_data_end():
    dynamic = NESTED.replace("%seven.3 = s32[]{:T(128)} constant(7)", "%seven.3 = s32[]{:T(128)} custom-call(%i.3)")
    found = costs.schedule(hlo.parse(dynamic))
    assert found.loops == [5] and len(found.unknown) == 1
    (line,) = hazards.warnings(found, [], hazards.Known({}))
    assert "as often as the data say" in line
    outer = "body=%outer_body"
    aside = dynamic.replace(outer, outer + ', metadata={op_name="jit(f)/experts/seldom/while"}')
    found = costs.schedule(hlo.parse(aside))
    assert not found.unknown and {s.times for s in found.steps if s.op.name in ("fusion.1", "kernel.2")} == {0}
    assert "as not run" in hazards.warnings(found, [], hazards.Known({}))[0]


@pytest.mark.parametrize("cut", ["ENTRY", "ROOT %call-done"])
def test_half_a_program_is_refused(cut):
    with pytest.raises(ValueError):
        hlo.parse(NESTED[: NESTED.index(cut)])


def test_a_line_that_is_no_operation_is_refused():
    with pytest.raises(ValueError, match="not an operation"):
        hlo.parse(NESTED.replace("  %two.2 = s32", "  two s32"))


def test_gathers_that_fusions_carry_on():
    """Two gathers, of which one channel tells nothing: that of the first is behind work, the second's is waited for at
    once. A sum in an all-reduce-scatter is a reduce-scatter, and what goes to another slice counts as sent."""
    found = costs.schedule(hlo.parse(EARLY))
    moved = costs.transfers(found, {"data": 2, "fsdp": 4}, slice_of=(0,) * 8)
    own = 128 * 512 * 4
    assert [(t.kind, t.axes, t.sent, t.asynchronous, t.hidden, t.slices) for t in moved] == [
        ("all-gather", ("fsdp",), 3 * own, True, True, False),
        ("all-gather", ("fsdp",), 3 * own, True, False, False),
        ("reduce-scatter", ("fsdp",), 3 * own, False, False, False),
        ("all-reduce", (), own, True, False, True),
    ]
    told = report.of_text(EARLY, topology.parse("v5e:2x4"))
    shares = told["async_wire_fraction"], told["hidden_wire_fraction"]
    assert shares == (pytest.approx(7 / 10), pytest.approx(3 / 10))
