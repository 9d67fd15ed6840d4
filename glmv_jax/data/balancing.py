"""Documents to rows, and rows to ranks, by several loads at once: tokens for the decoder, patches for the encoder.

The slowest rank is waited for twice in a step, by the encoder and by the language model, and rows that are even in
tokens are not in patches. So a document goes where its own mixture of loads is wanted most: of the rows with room the
one whose load L has the least inner product with the document's x, both in units of the mean, for that adds least to
the sum of squares (|L + x|^2 - |L|^2 = 2 L x + |x|^2). Largest first; then single documents move or are exchanged as
long as that lowers the fullest row.

Everything here is about sizes: arrays [N, D] of N documents' D loads. The sizes of a whole pod's documents are a few
kilobytes, on the host; nothing of theirs needs a device. Paper, section 2.4; with one load this is the greedy rule of
Graham (SIAM J. Appl. Math. 17, 1969).

Arguments that functions share:
    loads_ND    of each document or row.   limits_D: what a row holds of each load, inf for no limit.
    even        how many of the loads, the first, are evened out; the others only have limits. None: all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from glmv_jax.typing import UserError

TOLERANCE = 0.01  # rows within a hundredth of the mean are even


def place(
    loads_ND: np.ndarray, limits_D: np.ndarray, rows: int, filled_RD: np.ndarray | None = None, late: int = 0,
    even: int | None = None, tight: bool = False,
) -> np.ndarray:
    """The row of each document, int [N]; -1 for one that found no room.

    filled_RD: what the rows hold already.   late: the first so many documents take their places before all others.
    tight: a document goes to the row that it leaves least room in (best fit), which is less even and holds more.
    """
    loads_ND = np.asarray(loads_ND, np.float64)
    filled_DR = np.zeros((loads_ND.shape[1], rows)) if filled_RD is None else np.array(filled_RD, np.float64).T
    free_DR = np.asarray(limits_D, np.float64)[:, None] - filled_DR
    mean_D = _or_one((loads_ND.sum(0) + filled_DR.sum(1)) / rows)
    share_ND = loads_ND / mean_D
    weighed_ND = (share_ND / mean_D)[:, :even]
    limited_D = np.isfinite(limits_D)
    row_N = np.full(len(loads_ND), -1)
    for n in np.lexsort((-share_ND.max(1, initial=0), np.arange(len(loads_ND)) >= late)):
        if tight:
            score_R = (free_DR[limited_D] / np.asarray(limits_D)[limited_D, None]).sum(0)
        else:
            score_R = weighed_ND[n] @ filled_DR[:even]
        score_R[(free_DR < loads_ND[n][:, None]).any(0)] = np.inf
        row = int(score_R.argmin())
        if score_R[row] < np.inf:
            row_N[n] = row
            filled_DR[:, row] += loads_ND[n]
            free_DR[:, row] -= loads_ND[n]
    return row_N


def evened(
    row_N: np.ndarray, loads_ND: np.ndarray, limits_D: np.ndarray, rows: int, even: int | None = None
) -> np.ndarray:
    """`row_N` after moves and exchanges between the row that is fullest, of any load, and one of the emptiest.

    Each lowers the higher of the two; it ends when none does, or all rows are within TOLERANCE of the mean.
    """
    loads_ND, row_N = np.asarray(loads_ND, np.float64), np.array(row_N)
    filled_RD = totals(row_N, loads_ND, rows)
    unit_D = _or_one(filled_RD.mean(0))
    held = [list(np.flatnonzero(row_N == r)) for r in range(rows)]
    stuck_R = np.zeros(rows, bool)
    for _ in range(8 * rows):
        share_RD = np.where(stuck_R[:, None], 0, filled_RD / unit_D)[:, :even]
        full, axis = divmod(int(share_RD.argmax()), share_RD.shape[1])
        if share_RD[full, axis] <= 1 + TOLERANCE:
            break
        for other in np.argsort(filled_RD[:, axis], kind="stable")[:4]:
            found = _best_exchange(loads_ND[held[full]], loads_ND[held[other]], filled_RD[full], filled_RD[other],
                                   np.asarray(limits_D, np.float64), unit_D, even)  # fmt: skip
            if found is not None:
                moves = [(held[full][found[0]], full, other)]
                moves += [(held[other][found[1]], other, full)] if found[1] >= 0 else []
                for n, here, there in moves:
                    held[here].remove(n)
                    held[there].append(n)
                    row_N[n] = there
                    filled_RD[here] -= loads_ND[n]
                    filled_RD[there] += loads_ND[n]
                stuck_R[other] = False
                break
        else:
            stuck_R[full] = True
    return row_N


def _best_exchange(
    mine_ID: np.ndarray, theirs_JD: np.ndarray, full_D: np.ndarray, other_D: np.ndarray, limits_D: np.ndarray,
    unit_D: np.ndarray, even: int | None,
) -> tuple[int, int] | None:
    """(which of mine is given, which of theirs is taken, -1 for none) that makes the two rows most even; None when
    nothing makes them more so."""
    theirs_JD = np.concatenate([theirs_JD, np.zeros((1, len(unit_D)))])
    change_IJD = mine_ID[:, None] - theirs_JD
    both_2IJD = np.stack([full_D - change_IJD, other_D + change_IJD])
    worst_IJ = (both_2IJD / unit_D)[..., :even].max((0, -1))
    worst_IJ[(both_2IJD > limits_D).any((0, -1))] = np.inf
    i, j = divmod(int(worst_IJ.argmin()), worst_IJ.shape[1])
    if worst_IJ[i, j] >= (np.stack([full_D, other_D]) / unit_D)[:, :even].max() - 1e-9:
        return None
    return i, j if j < len(theirs_JD) - 1 else -1


def _or_one(mean_D: np.ndarray) -> np.ndarray:
    """Means to divide by: 1 where there is nothing."""
    return np.where(mean_D > 0, mean_D, 1)


def totals(row_N: np.ndarray, loads_ND: np.ndarray, rows: int) -> np.ndarray:
    """What each row holds, [R, D]; documents without a row count nowhere."""
    filled_RD = np.zeros((rows, np.shape(loads_ND)[1]))
    np.add.at(filled_RD, row_N[row_N >= 0], np.asarray(loads_ND)[row_N >= 0])
    return filled_RD


def imbalance(loads_RD: np.ndarray) -> np.ndarray:
    """Of each load the largest over the mean, [D]; 1 is even, also where there is nothing."""
    mean_D = np.mean(loads_RD, axis=0)
    return np.where(mean_D > 0, np.max(loads_RD, axis=0) / _or_one(mean_D), 1.0)


# ------------------------------------------------------------------------------------------------ documents to rows


def due(loads_ND: np.ndarray, limits_D: np.ndarray, rows: int) -> int:
    """How many documents, in the order in which they came, `rows` rows could hold if documents could be divided."""
    over_ND = np.cumsum(loads_ND, axis=0) > np.asarray(limits_D) * rows
    return int(np.argmax(np.append(over_ND.any(1), True)))


def fill(
    loads_ND: np.ndarray, limits_D: np.ndarray, rows: int, late: int = 0, even: int | None = None
) -> np.ndarray:
    """One batch out of a window of documents: the row of each, int [N], -1 for those that wait for the next batch.

    Those that are due take their places first, and before them the first `late`, which were due in an earlier batch;
    what came after them fills the gaps, the largest first.
    """
    first = due(loads_ND, limits_D, rows)
    row_N = np.full(len(loads_ND), -1)
    row_N[:first] = place(loads_ND[:first], limits_D, rows, late=late, even=even)
    rest = np.flatnonzero(row_N < 0)
    row_N[rest] = place(loads_ND[rest], limits_D, rows, totals(row_N, loads_ND, rows), even=even)
    return evened(row_N, loads_ND, limits_D, rows, even)


class Window:
    """The sizes of documents that wait, in the order in which they came, and the batches they are placed in.

    rows: of a batch.   ahead: how many documents are waited for beyond those that are due.
    late: so many of those that wait, the first, were due in the batch before.
    """

    def __init__(self, limits_D: Sequence[float], rows: int, ahead: int, even: int | None = None) -> None:
        self._limits, self._rows, self._ahead, self._even = np.asarray(limits_D), rows, ahead, even
        self.restore([])

    def restore(self, loads: list[tuple], late: int = 0) -> None:
        """Those that wait are these and no others."""
        self._loads, self.late = list(loads), late
        loads_ND = np.reshape(loads, (len(loads), len(self._limits)))
        self._due = due(loads_ND, self._limits, self._rows)
        self._left = self._limits * self._rows - loads_ND[: self._due].sum(0)

    def full(self) -> bool:
        """Whether enough of them wait to place a batch."""
        return len(self._loads) - self._due > self._ahead

    def add(self, load: tuple) -> bool:
        """One more; False when it is larger than a row, and then it is not taken."""
        if (np.array(load) > self._limits).any():
            return False
        if self._due == len(self._loads) and (load <= self._left).all():
            self._due, self._left = self._due + 1, self._left - load
        self._loads.append(load)
        return True

    def place(self, admitted: Callable[[int], bool] = lambda n: True) -> np.ndarray:
        """A batch: the row of each that waits, -1 for those that go on waiting.

        admitted: asked in their order whether one that found room may have it.
        """
        loads_ND = np.reshape(self._loads, (len(self._loads), len(self._limits)))
        row_N = fill(loads_ND, self._limits, self._rows, self.late, self._even)
        row_N = np.array([row if row >= 0 and admitted(n) else -1 for n, row in enumerate(row_N)], int)
        late = int((row_N[: self._due] < 0).sum())
        self.restore([load for load, row in zip(self._loads, row_N) if row < 0], late)
        return row_N


def bins(loads_ND: np.ndarray, limits_D: np.ndarray, even: int | None = None) -> np.ndarray:
    """Rows for all of the documents, few and even: the row of each, int [N] from 0 without gaps.

    UserError: a document is larger than a row.
    """
    loads_ND, limits_D = np.asarray(loads_ND, np.float64), np.asarray(limits_D, np.float64)
    _check_sizes(loads_ND, limits_D)
    row_N, rows = np.full(len(loads_ND), -1), 0
    while len(rest := np.flatnonzero(row_N < 0)):
        rows += max(1, int(np.ceil((loads_ND[rest].sum(0) / limits_D).max() - 1e-9)))
        row_N[rest] = place(loads_ND[rest], limits_D, rows, totals(row_N, loads_ND, rows), even=even)
    return evened(row_N, loads_ND, limits_D, rows, even)


def of_counts(
    loads_ND: np.ndarray, limits_D: Sequence[float] | np.ndarray, counts: Sequence[int], even: int | None = None
) -> tuple[np.ndarray, int]:
    """Even rows for all of the documents where there may only be so many: the row of each, int [N], and how many rows.

    counts: allowed numbers of rows; the least is taken that holds everything. Where none does it is the largest, and
    then the first documents matter most: as many of them as go in, and of those behind them what fills the gaps; -1
    for the others.   UserError: a document is larger than a row.
    """
    loads_ND, limits_D = np.asarray(loads_ND, np.float64), np.asarray(limits_D, np.float64)
    _check_sizes(loads_ND, limits_D)
    for rows in sorted(counts):
        if (loads_ND.sum(0) > limits_D * rows).any():
            continue
        for tight in (False, True):
            row_N = place(loads_ND, limits_D, rows, even=even, tight=tight)
            if (row_N >= 0).all():
                return evened(row_N, loads_ND, limits_D, rows, even), rows
    row_N, low, high = np.full(len(loads_ND), -1), 0, due(loads_ND, limits_D, rows) + 1
    while high - low > 1:  # the first `low` go in, the first `high` do not
        middle = (low + high) // 2
        tried = place(loads_ND[:middle], limits_D, rows, tight=True)
        if (tried >= 0).all():
            row_N[:middle], low = tried, middle
        else:
            high = middle
    for n in range(low, len(loads_ND)):
        row_N[n] = place(loads_ND[n : n + 1], limits_D, rows, totals(row_N, loads_ND, rows), tight=True)[0]
    return evened(row_N, loads_ND, limits_D, rows, even), rows


def _check_sizes(loads_ND: np.ndarray, limits_D: np.ndarray) -> None:
    """UserError for a document that is larger than a row."""
    if (loads_ND > limits_D).any():
        n = int(np.argmax((loads_ND > limits_D).any(1)))
        raise UserError(f"document {n} with loads {loads_ND[n].tolist()} does not fit a row of {limits_D.tolist()}; "
                        "leave it out or lengthen the row")


# ------------------------------------------------------------------------------------------------------ rows to ranks


def assign(loads_ND: np.ndarray, ranks: int) -> np.ndarray:
    """The rank of each row, int [N]: N / ranks to each, their loads even. UserError when that is no whole number."""
    N, D = np.shape(loads_ND)
    if N % ranks:
        raise UserError(f"{N} rows do not divide over {ranks} ranks; try {-(-N // ranks) * ranks}")
    counted = np.concatenate([loads_ND, np.ones((N, 1))], 1)
    limits = np.array([np.inf] * D + [N // ranks])
    return evened(place(counted, limits, ranks, even=D), counted, limits, ranks, even=D)

