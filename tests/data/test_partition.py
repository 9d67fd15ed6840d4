"""Rows cut for the ranks of a context group: every patch once, in whole merge groups, and the same model over them.

Not covered: attention of frames that a cut goes through, when each rank has its own slice only (the tests compare such
rows on devices that the compiler may gather from).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from glmv_jax.data import naflex, packing, partition
from glmv_jax.data.building import Document
from glmv_jax.data.faults import FaultLog
from glmv_jax.data.partition import GROUP, Slices, cut
from glmv_jax.data.stream import Stream
from glmv_jax.models import vlm
from glmv_jax.parallel.mesh import make_mesh
from glmv_jax.typing import UserError, VisionInput
from tests import tiny_vlm

CHANNELS = 12  # of tiny_vlm's patches of 2 x 2 pixels


def rows_of_frames(count: int, seed: int = 0):
    """(frames, ranks, budget): no images, one, many small ones, films of odd lengths, full rows and half empty ones."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        ranks = int(rng.integers(1, 10))
        groups = rng.integers(1, 12, int(rng.integers(0, 9)))
        if rng.random() < 0.3:  # a film: all frames alike, an odd number of them, often of an odd number of groups
            groups = np.full(2 * int(rng.integers(0, 12)) + 1, int(rng.integers(1, 10)))
        unit = GROUP * ranks
        room = int(rng.integers(0, 4)) * int(rng.integers(0, 2))
        budget = unit * max(1, -(-int(groups.sum()) // ranks) + room)
        yield [GROUP * int(g) for g in groups], ranks, budget


def pieces(frames, rng):
    return [rng.integers(0, 256, (n, 3), np.uint8) for n in frames]


def test_every_patch_is_in_one_slice_and_comes_back():
    rng = np.random.default_rng(1)
    for frames, ranks, budget in rows_of_frames(500):
        made = cut(frames, ranks, budget)
        starts = np.array(made.starts)
        assert starts[0] == 0 and starts[-1] == sum(frames) and (np.diff(starts) >= 0).all()
        assert ranks == 1 or (starts % GROUP == 0).all() and made.size % GROUP == 0
        assert np.diff(starts).max() <= made.size and made.size * ranks == budget
        row = pieces(frames, rng)
        plain = np.concatenate([np.zeros((0, 3), np.uint8), *row])
        zeros = np.zeros((budget, 3), np.uint8)
        slices = made.take(row, zeros.copy(), range(ranks))
        np.testing.assert_array_equal(made.joined(slices), plain)
        assert np.count_nonzero(slices.any(1)) == np.count_nonzero(plain.any(1))  # and the rest is padding
        for r in range(ranks):
            own = made.take(row, np.zeros((made.size, 3), np.uint8), [r])
            np.testing.assert_array_equal(own, slices[r * made.size:(r + 1) * made.size])
            np.testing.assert_array_equal(own[:starts[r + 1] - starts[r]], plain[starts[r]:starts[r + 1]])


def test_visual_tokens_keep_their_four_patches():
    for frames, ranks, budget in rows_of_frames(300, seed=2):
        made = cut(frames, ranks, budget)
        numbers = np.arange(1, sum(frames) + 1)
        slices = made.take([numbers], np.zeros(budget, int), range(ranks))
        image_row = np.append(np.arange(sum(frames) // GROUP), [-1, -1])[::-1].astype(np.int32)
        moved = made.rows(image_row)
        assert moved.dtype == np.int32 and (moved[:2] == -1).all()
        by_token = lambda x, rows: x[:len(x) // GROUP * GROUP].reshape(-1, GROUP)[rows[2:]]  # noqa: E731
        np.testing.assert_array_equal(by_token(slices, moved), by_token(numbers, image_row))


def test_crossings_are_the_frames_that_two_ranks_hold():
    for frames, ranks, budget in rows_of_frames(300, seed=3):
        made = cut(frames, ranks, budget)
        ends = np.cumsum([0, *frames])
        holders = [sum(max(a, s) < min(b, e) for s, e in zip(made.starts, made.starts[1:]))
                   for a, b in zip(ends, ends[1:])]
        assert made.crossings(frames) == sum(h > 1 for h in holders)


def test_cuts_fall_between_frames_where_there_is_room():
    assert cut([100] * 8, 4, 800).starts == (0, 200, 400, 600, 800)
    film = cut([252] * 15, 4, 4096)  # 63 groups a frame, 15 pairs of frames: four, four, four and three
    assert film.starts == (0, 1008, 2016, 3024, 3780) and film.crossings([252] * 15) == 0
    assert cut([252] * 15, 4, 3792).crossings([252] * 15) == 3  # full: every slice has 948 places
    assert cut([64], 4, 64).starts == (0, 16, 32, 48, 64)
    assert cut([8], 8, 64).starts[-1] == 8 and cut([8], 8, 64).crossings([8]) == 0  # whole, in a slice of 8
    assert cut([], 4, 64).starts == (0,) * 5
    assert cut([4, 8], 8, 32).starts == (0, 4, 4, 4, 4, 4, 4, 8, 12)  # fewer groups than ranks


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_a_rank_holds_its_share_of_the_bytes(ranks):
    """Of rows of about 16k patches, as size=l has them, full of images of many sizes; padding counts."""
    rng, patch, budget = np.random.default_rng(ranks), 14, 16_384 // (GROUP * ranks) * GROUP * ranks
    sizes = []
    while sum(sizes) + 4096 <= budget:
        sizes.append(GROUP * int(np.clip(rng.lognormal(5, 1), 1, 1024)))
    whole, own = (packing.Row(0, budget, 3 * patch**2) for _ in range(2))
    for row in (whole, own):
        row.images = [(np.ones((n, 3 * patch**2), np.uint8), np.zeros((n, 2), np.int32)) for n in sizes]
    total = sum(x.nbytes for x in whole.arrays().values())
    for r in range(ranks):
        arrays = own.arrays(Slices(ranks, (r,)))
        assert sum(x.nbytes for x in arrays.values()) <= 1.1 / ranks * total
        assert {name: x.base for name, x in arrays.items()} == dict.fromkeys(arrays)  # copies, not views of the row


def test_what_cannot_be_cut_is_said():
    with pytest.raises(UserError, match=r"100 patches .* 3 slices .* try data.patches=108"):
        cut([4], 3, 100)
    with pytest.raises(UserError, match="6 patches has no whole merge groups"):
        cut([4, 6], 2, 64)
    with pytest.raises(UserError, match="72 patches do not fit a row of 64"):
        cut([36, 36], 2, 64)
    with pytest.raises(UserError, match="slice 2 of 2 does not exist"):
        Slices(2, (2,))
    with pytest.raises(UserError, match="try data.patches=96"):
        packing.PackIterDataset(Stream([]), tokens=8, patches=80, channels=3, rows=1, names=[], log=FaultLog(),
                                slices=Slices(8))


# --------------------------------------------------------------------------------------------------------- the model


def document(rng: np.random.Generator, grids: list[tuple[int, int]], number: int) -> Document:
    """Three words before each image of that many merge groups, and three at the end."""
    tokens, of_token, images = [], [], []
    for i, (h, w) in enumerate(grids):
        tokens += [*rng.integers(16, tiny_vlm.VOCAB, 3), *[tiny_vlm.IMAGE] * (h * w)]
        of_token += [-1] * 3 + [i] * (h * w)
        patches = rng.integers(0, 256, (4 * h * w, CHANNELS), np.uint8)
        images.append((patches, naflex.grid_coordinates(2 * h, 2 * w)))
    tokens, of_token = [*tokens, *rng.integers(16, tiny_vlm.VOCAB, 3)], [*of_token, -1, -1, -1]
    weights = np.ones(len(tokens), np.float32)
    return Document(np.array(tokens, np.int32), weights, np.array(of_token, np.int32), tuple(images), "x", str(number))


@functools.cache
def model():
    cfg = tiny_vlm.config()
    parts = {name: dataclasses.replace(getattr(cfg, name), depth=1) for name in ("vision", "decoder")}
    cfg = dataclasses.replace(cfg, **parts)
    return cfg, tiny_vlm.params(cfg)


@functools.cache
def documents() -> list[Document]:
    rng = np.random.default_rng(7)
    grids = [[(1, 3), (2, 2)], [(3, 3)], [], [(1, 1), (1, 5), (2, 3)], [(2, 2)], [(4, 2), (1, 7)]]
    return [document(rng, g, n) for n, g in enumerate(grids)]


def batch_of(slices: Slices) -> dict[str, np.ndarray]:
    return next(iter(packing.PackIterDataset(
        Stream(documents()), tokens=64, patches=128, channels=CHANNELS, rows=2, names=["x"], log=FaultLog(),
        slices=slices)))


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_cut_row_is_the_same_to_the_model(ranks):
    cfg, params = model()
    plain, slices = batch_of(partition.WHOLE), batch_of(Slices(ranks))
    assert (plain["frame"] != slices["frame"]).any()
    want, got = (tiny_vlm.batch_logits(cfg, params, batch) for batch in (plain, slices))
    np.testing.assert_allclose(got[plain["segments"] > 0], want[plain["segments"] > 0], atol=2e-5, rtol=1e-5)
    for r in range(ranks):
        own = batch_of(Slices(ranks, (r,)))
        size = 128 // ranks
        for name in slices:
            whole = slices[name][:, r * size:(r + 1) * size] if name in ("patches", "yx", "frame") else slices[name]
            np.testing.assert_array_equal(own[name], whole, err_msg=name)


FILM = [60] * 7  # seven pairs of frames of 15 groups each


def film_row(ranks: int, budget: int):
    """(cut, vision of the plain row, of the slices side by side), of one row."""
    rng = np.random.default_rng(0)
    coordinates = [naflex.grid_coordinates(6, 10)] * len(FILM)
    images = [(rng.integers(0, 256, (60, CHANNELS), np.uint8), yx) for yx in coordinates]
    row = packing.Row(0, budget, CHANNELS)
    row.images = images
    as_input = lambda a: VisionInput(*(a[name][None] for name in ("patches", "yx", "frame")))  # noqa: E731
    return cut(FILM, ranks, budget), as_input(row.arrays()), as_input(row.arrays(Slices(ranks)))


@pytest.mark.parametrize("budget, crossings", [(480, 0), (448, 7)], ids=["whole frames", "frames cut"])
def test_on_eight_devices_as_on_one_and_patches_stay_where_they_are(budget, crossings):
    """Visual tokens and gradients; and in the compiled program no array of pixels travels."""
    made, plain, slices = film_row(8, budget)
    assert made.crossings(FILM) == crossings
    cfg, params = model()
    params = {name: params[name] for name in ("vision", "merger")}
    weight_MD = np.random.default_rng(1).normal(size=(sum(FILM) // GROUP, tiny_vlm.WIDTH)).astype(np.float32)

    def loss(params, vision, rows):
        visual_MD = vlm.encode_images(cfg, params, vision)[0][rows]
        return (visual_MD * weight_MD).sum(), visual_MD

    mesh = make_mesh({"context": 8}, jax.devices()[:8])
    place = lambda spec: NamedSharding(mesh, spec)  # noqa: E731
    grad = jax.jit(jax.grad(loss, has_aux=True))
    rows = np.arange(sum(FILM) // GROUP)
    want_grads, want = grad(params, plain, rows)
    split = jax.device_put(slices, place(P(None, "context")))
    everywhere = jax.device_put(params, place(P()))
    moved = made.rows(rows)
    program = grad.lower(everywhere, split, moved).compile()
    grads, got = program(everywhere, split, moved)
    np.testing.assert_allclose(got, want, atol=1e-5, rtol=1e-5)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5 * np.abs(w).max() + 1e-6), grads, want_grads)
    hlo = program.as_text()
    travels = [line for line in hlo.splitlines() if any(f" {kind}" in line for kind in (
        "all-gather(", "all-gather-start(", "all-to-all(", "collective-permute(", "collective-permute-start("))]
    pixels = {f"[1,{n},{c}]" for n in (budget, budget // 8) for c in (CHANNELS, 2 * CHANNELS)}  # as bytes, as floats
    assert f"u8[1,{budget // 8},{CHANNELS}]" in hlo and not [line for line in travels if any(p in line for p in pixels)]
    if not crossings:  # each device may even do its slice alone: as many rows of their own
        alone = VisionInput(*(x.reshape(8, budget // 8, *x.shape[2:]) for x in slices))
        own = jax.jit(lambda p, v: vlm.encode_images(cfg, p, v))(params, alone).reshape(-1, tiny_vlm.WIDTH)[moved]
        np.testing.assert_allclose(own, want, atol=1e-5, rtol=1e-5)
