"""Policy losses against an oracle of their equations in float64 loops (`policy_oracle`), and invariances.

Not covered here: what stage 5 makes of its config (tests/train/test_rl_objective.py).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from glmv_jax.losses import policy
from glmv_jax.typing import UserError
from tests.losses import policy_oracle as oracle

needs_8 = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 (emulated) devices")

# Answers as they come: lengths, and in the third a stretch that a tool said, between what the model drew.
LENGTHS = (3, 5, 7, 1, 4, 6, 2, 5)
TOOL = {2: (2, 3)}
# Rows of 18 that hold them: (segment, branch, answer) in order. The same prompt's answers are branches of a segment.
PACKED = (((1, 1, 0), (1, 2, 1), (2, 1, 5)), ((1, 1, 2), (1, 2, 3), (2, 1, 6)), ((1, 0, 4), (2, 0, 7)), *[()] * 5)
UNPACKED = tuple(((1, 1, n),) for n in range(len(LENGTHS)))

CASES = {
    "grpo": dict(),
    "ppo": dict(clip_high=0.2, aggregation="token-mean"),
    "dapo": dict(aggregation="token-mean"),
    "dr_grpo": dict(aggregation="seq-mean-token-sum-norm", max_length=9),
    "token sum": dict(aggregation="token-sum"),
    "sequence sum": dict(aggregation="seq-mean-token-sum"),
    "dual clip": dict(dual_clip=1.05),
    "gspo": dict(surrogate="gspo", clip_low=0.03, clip_high=0.04),
    "cispo": dict(surrogate="cispo", ratio_cap=1.3, aggregation="token-mean"),
    "double-sided": dict(surrogate="double_sided", clip_low=0.3, clip_high=0.5),
    "binary tv": dict(surrogate="binary_tv", tv=0.05, penalty=1e-3),
    "ipo": dict(surrogate="ipo", tv=0.05, penalty=1e-3),
    "gmpo": dict(surrogate="gmpo", clip_low=0.15, clip_high=0.1),
    "sapo": dict(surrogate="sapo", tau_pos=1.5, tau_neg=3.0),
    "opsm": dict(opsm=0.05),
    "k1": dict(kl=("k1", 0.3)),
    "k2": dict(kl=("k2", 0.3)),
    "k3": dict(kl=("k3", 0.3)),
    "k3+": dict(kl=("k3+", 0.3)),
    "distilled": dict(distil=0.7),
    "tis": dict(weight="token"),
    "icepop": dict(weight="token", outside="zero", low=0.5, high=2.0, aggregation="token-mean"),
    "sequence tis": dict(weight="sequence", normalise=True),
    "geometric": dict(weight="geometric", outside="zero", low=0.8, high=1.25),
    "veto": dict(weight="token", veto=0.5),
    "k1 of answers": dict(reject="k1", over="mean", limit=0.15),
    "k2 of tokens": dict(reject="k2", limit=0.08),
    "k3 in sum": dict(reject="k3", over="sum", limit=0.4),
    "k3 at most": dict(reject="k3", over="max", limit=0.12),
    "bypass": dict(reject="k3", over="mean", limit=0.15, proximal=False),
}


def objective(case):
    """The case's settings, as the config has them."""
    c = dict(CASES[case])
    c.pop("proximal", None)
    inner = {name: c.pop(name) for name in list(c) if name in vars(policy.Correction())}
    kind, factor = c.pop("kl", ("k3", 0.0))
    distil = c.pop("distil", 0.0)
    return policy.Objective.of(c | {
        "correction": inner, "kl": {"kind": kind, "factor": factor},
        "distil": {"kind": "sampled", "factor": distil} if distil else {},
    })  # fmt: skip


def drawn(seed=0):
    """What is known of each token of each answer: lists of arrays."""
    rng = np.random.default_rng(seed)
    flat = lambda scale, n: rng.normal(0, scale, n).astype(np.float32).astype(np.float64)  # noqa: E731
    found = []
    for n, length in enumerate(LENGTHS):
        proximal = flat(0.6, length) - 2
        weight = np.ones(length)
        weight[list(TOOL.get(n, ()))] = 0
        found.append(dict(
            new=proximal + flat(0.3, length), proximal=proximal, old=proximal + flat(0.4, length), weight=weight,
            reference=proximal + flat(0.3, length), teacher=proximal + flat(0.5, length),
            advantage=np.full(length, float(flat(1.0, 1)[0])),
        ))  # fmt: skip
    return found


def laid(found, layout, T=18):
    """Arrays [B, T] of a layout, and where each answer lies. What no answer is has a weight of 0 and odd numbers."""
    B = len(layout)
    arrays = {name: np.full((B, T), 9.0) for name in found[0]} | {"weight": np.zeros((B, T))}
    segments, branches, answers = np.zeros((B, T), int), np.zeros((B, T), int), [None] * len(found)
    for b, row in enumerate(layout):
        at = 1  # a prompt's last token stands before its answers
        for segment, branch, n in row:
            place = slice(at, at + LENGTHS[n])
            for name, x in found[n].items():
                arrays[name][b, place] = x
            segments[b, at - 1 : place.stop], branches[b, at - 1 : place.stop] = segment, branch
            answers[n] = [(b, t) for t in range(place.start, place.stop)]
            at = place.stop + 1
    return arrays, policy.Answers.of(jnp.asarray(segments), jnp.asarray(branches)), answers


def inputs(case, arrays):
    """(positional, keywords) of `policy_loss` behind the log-probabilities, for the inputs that the case has."""
    c, keep = CASES[case], {}
    if c.get("proximal", True):
        keep["proximal_BT"] = arrays["proximal"]
    if "kl" in c:
        keep["reference_BT"] = arrays["reference"]
    if "distil" in c:
        keep["teacher_BT"] = arrays["teacher"]
    return (arrays["old"], arrays["advantage"], arrays["weight"]), keep


def differentiated(case, arrays, answers, of=None, how=lambda f: f):
    """(loss, gradient [B, T], metrics). Not compiled as a whole: all cases share the operations, which are."""
    positional, keep = inputs(case, arrays)

    def f(new, *given):
        loss, metrics, _ = policy.policy_loss(objective(case), new, *given, answers=answers, of=of, **keep)
        return loss, metrics

    (loss, metrics), grad = how(jax.value_and_grad(f, has_aux=True))(jnp.asarray(arrays["new"]), *positional)
    return float(loss), np.asarray(grad, np.float64), {name: float(x) for name, x in metrics.items()}


def wanted(case, arrays, answers):
    known = {name: x for name, x in arrays.items() if name != "new"}
    if not CASES[case].get("proximal", True):
        known.pop("proximal")
    changes = {name: x for name, x in CASES[case].items() if name != "proximal"}
    value = oracle.loss(arrays["new"], known, answers, **changes)
    return value, oracle.gradient(arrays["new"], known, answers, **changes)


@pytest.mark.parametrize("case", CASES)
def test_value_and_gradient_are_the_oracles(case):
    arrays, answers, places = laid(drawn(), PACKED)
    value, grad = wanted(case, arrays, places)
    got, got_grad, _ = differentiated(case, arrays, answers)
    assert got == pytest.approx(value, rel=1e-6, abs=1e-6)
    np.testing.assert_allclose(got_grad, grad, atol=1e-6 * max(1, np.abs(grad).max()))
    assert np.abs(grad).max() > 1e-3 and not got_grad[arrays["weight"] == 0].any()


@pytest.mark.parametrize("case", ["gspo", "sequence tis"])
def test_in_float64_the_oracle_is_met_to_rounding(case):
    """As far as a finite difference knows the gradient."""
    arrays, answers, places = laid(drawn(), PACKED)
    value, grad = wanted(case, arrays, places)
    with jax.enable_x64(True):
        got, got_grad, _ = differentiated(case, arrays, answers, how=jax.jit)
    assert got == pytest.approx(value, rel=1e-12)
    np.testing.assert_allclose(got_grad, grad, atol=1e-9 * max(1, np.abs(grad).max()))


def test_each_case_does_something_else():
    """A case that equals plain GRPO would test nothing."""
    arrays, _, places = laid(drawn(), PACKED)
    values = {case: wanted(case, arrays, places)[0] for case in CASES if case != "k3+"}  # which has the value of k3
    assert len({round(x, 9) for x in values.values()}) == len(values), values


# Those that know what an answer is.
SPREAD = ("grpo", "dr_grpo", "gspo", "gmpo", "opsm", "sequence tis", "veto", "k3 in sum", "k3 at most", "distilled")


@pytest.mark.parametrize("case", SPREAD)
def test_packed_rows_give_what_rows_of_one_answer_give(case):
    found = drawn(1)
    packed, answers, places = laid(found, PACKED)
    plain, rows, own = laid(found, UNPACKED)
    loss, grad, metrics = differentiated(case, packed, answers)
    # A row is an answer unless it is said otherwise.
    want, want_grad, want_metrics = differentiated(case, plain, None)
    assert loss == pytest.approx(want, rel=1e-5) and metrics == pytest.approx(want_metrics, rel=1e-5)
    for here, there in zip(places, own, strict=True):
        np.testing.assert_allclose([grad[i] for i in here], [want_grad[i] for i in there], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("case", SPREAD)
def test_any_split_into_micro_batches_gives_the_whole(case):
    """Of answers among pieces, however unequal; a piece may have none."""
    arrays, answers, places = laid(drawn(2), PACKED)
    loss, grad, metrics = differentiated(case, arrays, answers)
    (old, _, weight), keep = inputs(case, arrays)
    of = policy.whole(objective(case), weight, answers, old, keep.get("proximal_BT"))
    for seed in range(3):
        piece_of = np.random.default_rng(seed).integers(0, 4, len(places))
        parts = []
        for piece in range(4):
            own = np.zeros_like(weight)
            for n in np.flatnonzero(piece_of == piece):
                own[tuple(zip(*places[n]))] = weight[tuple(zip(*places[n]))]
            parts.append(differentiated(case, arrays | {"weight": own}, answers, of))
        assert sum(x for x, _, _ in parts) == pytest.approx(loss, rel=1e-5)
        np.testing.assert_allclose(sum(x for _, x, _ in parts), grad, rtol=1e-5, atol=1e-7)
        for name, x in metrics.items():
            fold = max if name.endswith("_max") else sum
            assert fold(m[name] for _, _, m in parts) == pytest.approx(x, rel=1e-5), name


@needs_8
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_give_what_one_gives(case):
    arrays, answers, _ = laid(drawn(3), PACKED)
    loss, grad, metrics = differentiated(case, arrays, answers)
    where = NamedSharding(Mesh(np.array(jax.devices()[:8]), "data"), PartitionSpec("data"))
    split = {name: jax.device_put(np.float32(x), where) for name, x in arrays.items()}
    got = differentiated(case, split, answers._replace(id_BT=jax.device_put(answers.id_BT, where)), how=jax.jit)
    assert got[0] == pytest.approx(loss, rel=1e-5, abs=1e-7) and got[2] == pytest.approx(metrics, rel=1e-5)
    np.testing.assert_allclose(got[1], grad, rtol=1e-5, atol=1e-7)


def test_metrics():
    arrays, answers, _ = laid(drawn(4), PACKED)
    _, _, got = differentiated("icepop", arrays, answers)
    on = arrays["weight"] > 0
    new, proximal, old, a = (arrays[name][on] for name in ("new", "proximal", "old", "advantage"))
    r, rho = np.exp(new - proximal), np.exp(proximal - old)
    clipped = ((a > 0) & (r > 1.28)) | ((a < 0) & (r < 0.8))
    masked = (rho < 0.5) | (rho > 2)
    assert 0 < clipped.mean() < 1 and 0 < masked.mean() < 1
    want = dict(
        ratio=r.mean(), ratio_max=r.max(), clip_fraction=clipped.mean(), approx_kl=(r - 1 - np.log(r)).mean(),
        mismatch_kl=(rho - np.log(rho) - 1).mean(), mismatch_gap_max=np.abs(proximal - old).max(),
        mismatch_masked=masked.mean(), mismatch_ratio=rho.mean(), mismatch_square=(rho**2).mean(),
    )  # fmt: skip
    assert got == pytest.approx(want, rel=1e-4)
    ess = rho.sum() ** 2 / (len(rho) * (rho**2).sum())
    assert policy.with_effective_sizes(got)["mismatch_ess"] == pytest.approx(ess, rel=1e-4)


def test_the_mismatch_by_source():
    arrays, _, _ = laid(drawn(4), PACKED)
    source = np.random.default_rng(0).integers(0, 2, arrays["weight"].shape)
    source[0] = -1
    names, on = ["a", "b", "absent"], arrays["weight"] > 0
    gap = jnp.asarray(arrays["proximal"] - arrays["old"])
    c = objective("icepop").correction
    found = policy.mismatch(c, gap, arrays["weight"])
    sums = np.array([(on & (source == n)).sum() for n in range(3)], np.float32)
    got = policy.with_effective_sizes(policy.mismatch_by_source(found, arrays["weight"], source, sums, names))
    for n, name in enumerate(names[:2]):
        rho = np.exp((arrays["proximal"] - arrays["old"])[on & (source == n)])
        want = {"mismatch_kl": (rho - 1 - np.log(rho)).mean(), "mismatch_masked": ((rho < 0.5) | (rho > 2)).mean(),
                "mismatch_ess": rho.sum() ** 2 / (rho**2).sum() / len(rho)}  # fmt: skip
        assert {key: float(got[f"{key}/{name}"]) for key in want} == pytest.approx(want, rel=1e-4)
        assert float(got[f"mismatch_gap/{name}_max"]) == pytest.approx(np.abs(np.log(rho)).max(), rel=1e-4)
    assert all(np.isnan(got[f"{key}/absent"]) for key in want) and got["mismatch_gap/absent_max"] == 0


def test_corrections_have_no_gradient():
    arrays, answers, _ = laid(drawn(), PACKED)
    gap = jnp.asarray(arrays["proximal"] - arrays["old"])

    def total(gap, c):
        return sum(x.sum() for x in policy.mismatch(c, gap, arrays["weight"], answers))

    for case in ("tis", "sequence tis", "geometric"):
        assert not np.asarray(jax.grad(total)(gap, objective(case).correction)).any()


def test_on_policy_gradient_is_the_policy_gradient():
    """At pi = pi_old = mu nothing is clipped, nothing is corrected, and the gradient is -A / denominator."""
    arrays, answers, _ = laid(drawn(5), PACKED)
    arrays["new"] = arrays["proximal"] = arrays["old"]
    for case in ("dapo", "icepop", "cispo"):
        _, grad, _ = differentiated(case, arrays, answers)
        np.testing.assert_allclose(grad, -arrays["advantage"] * arrays["weight"] / arrays["weight"].sum(), rtol=1e-5)


def test_extreme_ratios_and_empty_batches_stay_finite():
    arrays, answers, _ = laid(drawn(), PACKED)
    far = arrays | {"old": arrays["old"] - 500.0, "proximal": arrays["proximal"] - 500.0}
    near = arrays | {"proximal": arrays["proximal"] + 500.0}
    nothing = arrays | {"weight": np.zeros_like(arrays["weight"])}
    for case in ("grpo", "gspo", "sequence tis", "k3 in sum"):
        for odd in (far, near):
            loss, grad, _ = differentiated(case, odd, answers)
            assert np.isfinite(loss) and np.isfinite(grad).all()
        loss, grad, _ = differentiated(case, nothing, answers)
        assert loss == 0.0 and not grad.any()


# --- advantages -------------------------------------------------------------------------------------------------------

GROUPED = [kind for kind in policy.ADVANTAGES if kind not in ("gdpo", "none")]
REWARDS = np.array([[0.0, 1.0, 1.0, 0.25], [0.1, 0.1, 0.1, 0.1], [3.0, 1.0, 2.0, 2.0], [0.0, 0.0, 0.0, 1.0]])


@pytest.mark.parametrize("kind", GROUPED)
def test_advantages_are_the_oracles(kind):
    want = oracle.advantages(REWARDS, kind)
    want[1] = 0.0
    np.testing.assert_allclose(policy.group_advantages(REWARDS, kind), want, rtol=1e-5, atol=1e-6)
    with jax.enable_x64(True):
        np.testing.assert_allclose(policy.group_advantages(REWARDS, kind), want, rtol=1e-9, atol=1e-12)


def test_advantages_of_components():
    """A component with large steps counts as one with small ones; what is equal in every component has exactly 0."""
    parts = np.stack([REWARDS, 100 * REWARDS[::-1]], -1)
    parts[2] = parts[2, 0]
    want = oracle.advantages(parts, "gdpo", (1.0, 0.5))
    got = np.asarray(policy.gdpo_advantages(parts, (1.0, 0.5)))
    assert not got[2].any()
    np.testing.assert_allclose(got[[0, 1, 3]], want[[0, 1, 3]], rtol=1e-5, atol=1e-5)
    scaled = policy.gdpo_advantages(parts * np.array([1.0, 0.01]), (1.0, 0.5))
    np.testing.assert_allclose(scaled, got, atol=2e-4)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 0.7, 1e6 + 0.1])
@pytest.mark.parametrize("kind", GROUPED)
def test_a_group_without_variance_has_advantage_exactly_zero(value, kind):
    rewards = np.array([[value] * 7, [0.0, 1.0] * 3 + [1.0]])
    got = np.asarray(policy.group_advantages(rewards, kind))
    assert not got[0].any() and got[1].any()


def test_long_answers_lose_by_their_tokens_and_groups_are_left_out_by_the_raw_reward():
    length = np.array([[10, 12, 14, 16], [16, 13, 5, 0]])
    lost = np.asarray(policy.overlong(length, limit=16, buffer=4, penalty=0.8))
    np.testing.assert_allclose(lost, [[0, 0, -0.4, -0.8], [-0.8, -0.2, 0, 0]], atol=1e-6)
    raw = np.zeros((2, 4))
    raw[1] = 0.1 + 0.2, 0.3, 0.3, 0.3  # differ by a rounding
    assert not np.asarray(policy.informative(raw)).any(), "all are equally wrong"
    assert np.asarray(policy.informative(raw + lost)).all()
    assert np.asarray(policy.informative(REWARDS)).tolist() == [True, False, True, True]


# --- distances from a teacher -----------------------------------------------------------------------------------------


def test_reverse_kl_over_the_likeliest_tokens():
    """Exact with every token, never more than that with some, and the gradient is that of the oracle."""
    rng = np.random.default_rng(0)
    x_NV, t_NV = rng.normal(0, 2, (2, 5, 11))
    soft = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))  # noqa: E731
    full = lambda z: (np.exp(soft(z)) * (soft(z) - soft(t_NV))).sum(-1)  # noqa: E731

    def some(logits, K):
        ids = np.argsort(-t_NV, axis=-1)[:, :K]
        student = jnp.take_along_axis(jax.nn.log_softmax(logits), ids, axis=-1)
        return policy.reverse_kl_top(student, np.take_along_axis(soft(t_NV), ids, axis=-1))

    def all_at_once(logits):
        grads = {K: jax.grad(lambda z, K=K: some(z, K).sum())(logits) for K in (4, 11)}
        return {K: some(logits, K) for K in (1, 4, 8, 11)}, grads, policy.reverse_kl(logits, t_NV)

    with jax.enable_x64(True):
        got, grads, whole = jax.device_get(jax.jit(all_at_once)(x_NV))
    np.testing.assert_allclose(whole, full(x_NV), rtol=1e-12)
    np.testing.assert_allclose(got[11], full(x_NV), rtol=1e-6)
    assert (got[1] >= 0).all() and (got[1] < got[4]).all() and (got[4] < got[8]).all() and (got[8] < got[11]).all()
    for n, v in np.ndindex(2, 11):
        step = np.zeros_like(x_NV)
        step[n, v] = 1e-6
        slope = (full(x_NV + step).sum() - full(x_NV - step).sum()) / 2e-6
        assert grads[11][n, v] == pytest.approx(slope, abs=1e-6)
    # Tokens that are no outcome of their own share a gradient in proportion to their probability.
    others = np.argsort(-t_NV[0])[4:]
    ratio = grads[4][0, others] / np.exp(soft(x_NV))[0, others]
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-9)


def test_distillation_over_the_likeliest_tokens_is_part_of_the_loss():
    """Beside a clipped surrogate, from logits: value and gradient of the oracle, which adds the divergence itself, and
    the same of rows that are packed otherwise."""
    rng, V, K = np.random.default_rng(8), 6, 3
    found = drawn(8)
    for answer, length in zip(found, LENGTHS):
        answer["logits"], answer["teacher_logits"] = rng.normal(0, 1.5, (2, length, V))
        answer["said"] = rng.integers(0, V, length)
    soft = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))  # noqa: E731

    def placed(layout):
        """What `laid` places, and beside it logits, the teacher's likeliest tokens, and those that were drawn."""
        plain = [{n: x for n, x in answer.items() if "logits" not in n and n != "said"} for answer in found]
        arrays, answers, places = laid(plain, layout)
        shape = arrays["new"].shape
        more = {"logits": np.zeros((*shape, V)), "top": np.zeros((*shape, K), int), "said": np.zeros(shape, int),
                "teacher": np.full((*shape, V), -np.log(V))}  # fmt: skip
        for answer, place in zip(found, places, strict=True):
            at = tuple(zip(*place))
            more["logits"][at], more["teacher"][at] = answer["logits"], soft(answer["teacher_logits"])
            more["top"][at], more["said"][at] = np.argsort(-answer["teacher_logits"], axis=-1)[:, :K], answer["said"]
        return arrays | more, answers, places

    def ours(arrays, answers):
        o = policy.Objective.of({"distil": {"kind": "top_k", "factor": 0.7, "top_k": K}})

        def f(logits):
            logp = jax.nn.log_softmax(logits)
            far = policy.reverse_kl_top(
                jnp.take_along_axis(logp, arrays["top"], -1), np.take_along_axis(arrays["teacher"], arrays["top"], -1)
            )
            new = jnp.take_along_axis(logp, arrays["said"][..., None], -1)[..., 0]
            given = [arrays[name] for name in ("old", "advantage", "weight")]
            more = {"proximal_BT": arrays["proximal"], "distil_BT": far, "answers": answers}
            return policy.policy_loss(o, new, *given, **more)[0]

        return jax.device_get(jax.value_and_grad(f)(jnp.asarray(arrays["logits"])))

    def oracles(arrays, places, logits):
        new = np.take_along_axis(soft(logits), arrays["said"][..., None], -1)[..., 0]
        known = {name: arrays[name] for name in ("old", "proximal", "advantage", "weight")}
        per_token = {}
        for i in (i for place in places for i in place):
            p, t = (np.exp(z[i][arrays["top"][i]]) for z in (soft(logits), arrays["teacher"]))
            outcomes = [*zip(p, t), (1 - p.sum(), 1 - t.sum())]
            per_token[i] = sum(a * np.log(a / b) for a, b in outcomes)
        added = oracle.aggregate(oracle.DEFAULTS, per_token, arrays["weight"], places)
        return oracle.loss(new, known, places) + 0.7 * added

    with jax.enable_x64(True):
        arrays, answers, places = placed(PACKED)
        got, grad = ours(arrays, answers)
        other, _ = ours(*placed(UNPACKED)[:2])
    assert got == pytest.approx(oracles(arrays, places, arrays["logits"]), rel=1e-9)
    assert got == pytest.approx(other, rel=1e-12)
    assert not grad[arrays["weight"] == 0].any() and np.abs(grad).max() > 1e-3
    for b, t in [i for place in places for i in place if arrays["weight"][i]][::5]:
        for v in range(V):
            step = np.zeros_like(arrays["logits"])
            step[b, t, v] = 1e-6
            up, down = (oracles(arrays, places, arrays["logits"] + sign * step) for sign in (1, -1))
            assert grad[b, t, v] == pytest.approx((up - down) / 2e-6, abs=1e-8)


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group, complaint", [
    ({"clip_hihg": 0.3}, "loss.clip_hihg is not known; nearest: clip_high"),
    ({"surrogate": "gsp"}, "loss.surrogate='gsp' is not known; nearest: gspo"),
    ({"aggregation": "mean"}, "loss.aggregation='mean' is not known"),
    ({"kl": {"kind": "k4"}}, "loss.kl.kind='k4' is not known; .*choose one of k1, k2, k3, k3"),
    ({"correction": {"vetto": 1.0}}, "loss.correction.vetto is not known; nearest: veto"),
    ({"correction": {"low": 3.0}}, "0 <= low < high"),
    ({"surrogate": "gspo", "aggregation": "token-mean"}, "set loss.aggregation=seq-mean-token-mean"),
    ({"surrogate": "gmpo", "aggregation": "token-mean"}, "loss.surrogate=gmpo has a ratio an answer"),
    ({"tau_neg": 0.0}, "are sharpnesses, above 0"),
    ({"aggregation": "seq-mean-token-sum-norm"}, "set loss.max_length"),
    ({"dual_clip": 0.5}, "dual_clip=0.5 would hold back"),
])  # fmt: skip
def test_settings_that_are_no_objective(group, complaint):
    with pytest.raises(UserError, match=complaint):
        policy.Objective.of(group)


def test_inputs_that_are_missing():
    arrays, answers, _ = laid(drawn(), PACKED)
    for case, complaint in (("k3", "set reference.policy"), ("distilled", "set reference.teachers"),
                            ("tis", "set rollout.proximal=True")):  # fmt: skip
        (old, advantage, weight), _ = inputs(case, arrays)
        with pytest.raises(UserError, match=complaint):
            policy.policy_loss(objective(case), arrays["new"], old, advantage, weight, answers=answers)
    with pytest.raises(ValueError, match="raise the group size"):
        policy.group_advantages(np.zeros((4, 1)))
    with pytest.raises(UserError, match="rollout.advantage='grp' is not known; nearest: grpo"):
        policy.group_advantages(np.zeros((4, 2)), "grp")
    with pytest.raises(ValueError, match="needs max_length"):
        policy.aggregate(jnp.zeros((2, 3)), np.ones((2, 3)), "seq-mean-token-sum-norm")
