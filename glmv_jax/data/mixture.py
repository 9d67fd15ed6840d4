"""A mixture of named sources in exact proportions.

Which source gives element k is a function of k and the weights (each source is spread as evenly as the others allow),
so the whole state of a mixture is one index. Over the first n elements, for any n, every source's count differs from
weight * n by less than the number of sources; over one period (the sum of the weights as whole numbers) it is exact.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from glmv_jax.typing import UserError


class Mixture:
    """Random access over endless sources: element k is the next unseen element of the source whose turn it is.

    sources: name -> random-access source; a finite one starts again after its end, its own shuffling permitting.
    weights: name -> share, any non-negative numbers; sources of weight 0 are left out.
    """

    def __init__(self, sources: Mapping[str, Any], weights: Mapping[str, float]):
        if set(sources) != set(weights):
            odd = sorted(set(sources) ^ set(weights))[0]
            raise UserError(f"mixture: {odd!r} needs both a source and a weight")
        if not all(0 <= w < math.inf for w in weights.values()) or not any(weights.values()):
            raise UserError(f"mixture weights must be numbers from 0, not all 0; got {dict(weights)}")
        self.names = [name for name in sources if weights[name] > 0]
        self._sources = [sources[name] for name in self.names]
        shares = [Fraction(weights[name]).limit_denominator(10**6) for name in self.names]
        if 0 in shares:
            small = self.names[shares.index(Fraction(0))]
            raise UserError(f"mixture weight of {small!r} is too small; use 0 or at least 1e-6")
        whole = math.lcm(*(share.denominator for share in shares))
        parts = [int(share * whole) for share in shares]
        self._parts = [part // math.gcd(*parts) for part in parts]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, k: int) -> Any:
        _, source, index = self.within(k)
        return source[index]

    @property
    def shares(self) -> dict[str, float]:
        """Of each source, of all elements."""
        return {name: part / sum(self._parts) for name, part in zip(self.names, self._parts)}

    @property
    def sources(self) -> dict[str, Any]:
        """Those that are read."""
        return dict(zip(self.names, self._sources))

    def within(self, k: int) -> tuple[str, Any, int]:
        """Element k -> (name of its source, the source, index within it)."""
        which, index = self.locate(k)
        return self.names[which], self._sources[which], index % len(self._sources[which])

    def locate(self, k: int) -> tuple[int, int]:
        """Element k -> (number of its source among `names`, index within that source)."""
        before, after = self._counts(k), self._counts(k + 1)
        which = next(i for i, (b, a) in enumerate(zip(before, after)) if a != b)
        return which, before[which]

    def counts(self, n: int) -> dict[str, int]:
        """Elements of each source among the first n."""
        return dict(zip(self.names, self._counts(n)))

    def _counts(self, n: int) -> list[int]:
        """The first source takes ceil(n * share), the others share the rest in the same way (grain's own rule)."""
        counts, total = [], sum(self._parts)
        for part in self._parts:
            rest = n * (total - part) // total
            counts.append(n - rest)
            n, total = rest, total - part
        return counts
