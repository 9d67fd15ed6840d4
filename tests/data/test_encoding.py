"""Images in rows of the encoder's own, played through by hand: what every device encodes and sends, and what every
token then finds, against rows that keep their images. Not covered: several processes, which have nothing in common.
"""

from __future__ import annotations

import json

import numpy as np
import pytest

from glmv_jax.data import balancing
from glmv_jax.data.encoding import Encoder, Filling
from glmv_jax.data.faults import FaultLog
from glmv_jax.typing import UserError
from tests.data.test_packing import batches, documents


def found(batch: dict[str, np.ndarray], encoder: Encoder | None = None) -> np.ndarray:
    """[B, T, 4 * (C + 2)]: pixels and coordinates of the four patches behind each token, zeros behind text.

    With an encoder as devices do it: each goes through its rows and sends every visual token where it is told to; what
    comes is laid down in the order of senders.
    """
    visual = np.concatenate([batch["patches"], batch["yx"]], -1).reshape(len(batch["frame"]), -1, 4 * 8)
    if encoder is not None:
        own = encoder.rows // encoder.devices
        each = encoder.devices // encoder.ranks
        come: list[list[np.ndarray]] = [[] for _ in range(encoder.devices)]
        for sender in range(encoder.devices):
            rows = slice(sender * own, (sender + 1) * own)
            for token, to in zip(visual[rows].reshape(-1, 32), batch["sent"][rows].reshape(-1)):
                if to >= 0:
                    assert to % encoder.places == len(come[to // encoder.places]) < encoder.places
                    come[to // encoder.places].append(token)
        got = np.zeros((encoder.devices, encoder.places, 32), visual.dtype)
        for device, tokens in enumerate(come):
            got[device, : len(tokens)] = np.reshape(tokens, (-1, 32))
        B = len(batch["tokens"])
        visual = np.repeat(got.reshape(encoder.ranks, each * encoder.places, 32), B // encoder.ranks, axis=0)
    at = batch["image_row"]
    return np.where(at[..., None] >= 0, np.take_along_axis(visual, np.maximum(at, 0)[..., None], 1), 0)


@pytest.mark.parametrize("devices, ranks", [(1, 1), (4, 4), (8, 4), (6, 1)])
@pytest.mark.parametrize("fit", ["best", "balanced"])
def test_every_token_finds_the_pixels_of_its_own_image(devices, ranks, fit):
    settings = dict(rows=4, fit=fit, ahead=6)
    encoder = Encoder(24, 48, devices, ranks, places=-(-(4 // ranks) * 20 * ranks // devices))
    kept, moved = (list(batches(documents(60), **settings, encoder=e)) for e in (None, encoder))
    assert len(kept) == len(moved) > 3
    for a, b in zip(kept, moved):
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        np.testing.assert_array_equal(found(a), found(b, encoder))
        assert found(a).any() and (b["sent"] >= 0).sum() == (a["image_row"] >= 0).sum()
        full = (b["frame"] > 0).sum(1)
        assert full.max() <= 48 and full.max() - full.min() <= 36  # the largest image


@pytest.mark.parametrize("fit", ["first", "best", "balanced"])
def test_what_finds_no_room_waits_and_nothing_is_lost(fit, tmp_path):
    """The encoder has room for half of what rows of text may hold; one image is larger than any of its rows."""
    docs, encoder = documents(80), Encoder(4, 28, 4, 1, places=15)
    log = FaultLog(tmp_path / "faults.jsonl")
    made = batches(docs, fit=fit, ahead=4, encoder=encoder, log=log)
    seen, large = [], [d for d in docs if any(len(p) > 28 for p, _ in d.images)]
    for batch in made:
        assert batch["patches"].shape == (4, 28, 6) and (batch["frame"] > 0).sum(1).max() <= 28
        for row, segments in zip(batch["tokens"], batch["segments"]):
            seen += [tuple(row[segments == n]) for n in range(1, segments.max() + 1)]
    fits = [d for d in docs if not any(d is x for x in large)]
    assert sorted(seen) == sorted(tuple(d.tokens) for d in fits) and 0 < len(large) < 40
    dropped = [json.loads(line) for line in (tmp_path / "faults.jsonl").read_text().splitlines()]
    assert sorted(d["id"] for d in dropped) == sorted(d.id for d in large)


@pytest.mark.parametrize("fit", ["best", "balanced"])
def test_a_resumed_iterator_goes_on_with_the_very_next_batch(fit):
    make = lambda: iter(batches(documents(80), fit=fit, ahead=4, encoder=Encoder(4, 36, 2, 1, places=40)))  # noqa: E731
    data = make()
    for _ in range(3):
        next(data)
    state = json.loads(json.dumps(data.get_state()))
    want, again = [next(data) for _ in range(3)], make()
    again.set_state(state)
    for batch in want:
        np.testing.assert_equal(next(again), batch)


def test_devices_have_as_much_to_encode():
    """512 images of log-normal sizes over 64 devices, as they lie in rows of text and in the encoder's."""
    rng = np.random.default_rng(0)
    sizes = 4 * np.clip(rng.lognormal(4, 0.7, 512), 1, 1024).astype(int)
    home = np.arange(512) // 8
    spread = lambda row: balancing.imbalance(balancing.totals(row, sizes[:, None], 64))[0]  # noqa: E731
    encoder = Encoder(64, -(-int(1.1 * sizes.sum() / 64) // 4) * 4, 64, 64)
    filling = Filling(encoder)
    rows = [filling.add([(np.empty((n, 0)), None) for n in sizes[home == h]]) for h in range(64)]
    assert [n for own in rows for n in own] == list(range(512))
    evened = filling.evened()
    assert spread(home) > 1.6 and spread(evened) <= 1.05
    assert balancing.totals(evened, sizes[:, None], 64).max() <= 1.1 / 64 * sizes.sum() + 4


def test_what_does_not_divide_is_said():
    with pytest.raises(UserError, match="data.dispatch.patches=30 is no number of merge groups; try 32"):
        Encoder(8, 30)
    with pytest.raises(UserError, match="6 of a process do not divide over its 4 devices; try 8"):
        Encoder(6, 32, 4)
