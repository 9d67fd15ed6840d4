"""Text that comes in pieces: of token ids, without the spaces around it, up to a stop string.

Each takes a piece and gives what is sure by then; `flush` gives the rest. What they give together does not depend on
where the pieces were cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

BROKEN = "\N{REPLACEMENT CHARACTER}"  # of bytes that are no whole character, yet or at all


class Decoder:
    """Plain token ids to text, one at a time; a character whose bytes are several tokens comes with the last of them.

    decode: of a list of plain ids, such that the text of some ids is the beginning of that of more, but for a broken
    end and for a space that the first of them loses.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        self._ids: list[int] = []  # those that were given last, then those that wait
        self._given = ""  # text of the former

    def push(self, id_: int) -> str:
        self._ids.append(id_)
        text = self._decode(self._ids)
        if text.endswith(BROKEN) or len(text) <= len(self._given):
            return ""
        new = text[len(self._given) :]
        self._ids = self._ids[-1:]  # a token that ended a character begins with one, or with bytes of it
        self._given = self._decode(self._ids)
        return new

    def flush(self) -> str:
        new = self._decode(self._ids)[len(self._given) :]
        self._ids, self._given = [], ""
        return new


class Stripped:
    """Text without the spaces before and behind it."""

    def __init__(self) -> None:
        self._begun, self._held = False, ""

    def push(self, text: str) -> str:
        text = self._held + text if self._begun else text.lstrip()
        self._begun |= bool(text)
        kept = text.rstrip()
        self._held = text[len(kept) :]
        return kept


class UpTo:
    """Text up to the stop string that is whole first. found: that string, once it has been seen."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = tuple(stops), ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        if self.found is not None:
            return ""
        text = self._held + text
        places = [(at + len(stop), at, stop) for stop in self._stops if (at := text.find(stop)) >= 0]
        if places:
            _, at, self.found = min(places)
            self._held = ""
            return text[:at]
        most = max((len(stop) for stop in self._stops), default=1) - 1
        # The longest end that may be the beginning of a stop string.
        begins = (n for n in range(min(most, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in self._stops))
        kept = len(text) - next(begins, 0)
        self._held = text[kept:]
        return text[:kept]

    def flush(self) -> str:
        rest, self._held = self._held, ""
        return rest
