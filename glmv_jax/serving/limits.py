"""What a server lets others ask of it, and how it says no."""

from __future__ import annotations

import dataclasses

from glmv_jax.typing import UserError

RATE = 4096  # bytes a second: who sends faster is never too slow
WRITING = 5.0  # seconds that an answer which is over has to reach who asked


@dataclasses.dataclass(frozen=True)
class Limits:
    """body: bytes of a request.   images: of a request.   pixels: of an image, told by its head before it is decoded.
    tokens: of an answer, where the request does not say; more fit if it does.   choices: answers to one request.
    requests: answers that run or wait; more are refused until some are done.   seconds: of an answer; what there is by
    then is the answer.   drain: seconds that running answers have left when the server is told to end.
    ping: seconds after which a stream that has nothing to say gives a sign of life, so that no proxy cuts it.
    fetch: whether images may be named by URL; then they are fetched, from public addresses only.
    films: of a request; 0 where model or engine take none.   frames: of a film as it is sent, of a megapixel each;
    fewer of larger ones, up to `pixels`.
    connections: that may be open; requests on more are refused.   head: bytes of a request's first line and headers.
    reading: seconds in which a request's head has to come, and its body, which has one more for each RATE bytes of it.
    keep_alive: seconds that a connection may stay open without a request; more than a proxy before the server keeps
    its own.
    """

    body: int = 32 << 20
    images: int = 64
    pixels: int = 1 << 25
    tokens: int = 1024
    choices: int = 16
    requests: int = 256
    seconds: float = 600.0
    drain: float = 25.0
    ping: float = 10.0
    fetch: bool = False
    films: int = 0
    frames: int = 10_000
    connections: int = 1024
    head: int = 64 << 10
    reading: float = 20.0
    keep_alive: float = 75.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 0 or (value == 0 and name not in ("fetch", "films")):
                raise UserError(f"a server's limit {name}={value} lets nothing through; give one above 0")


class Refused(UserError):
    """A request that is not answered.

    status: of HTTP.   field: of the body, where one is wrong.   after: seconds until another try may go better.
    code: OpenAI's word for what is wrong, where clients look at it.
    """

    def __init__(
        self, message: str, status: int = 400, field: str | None = None, after: int | None = None,
        code: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.field, self.after, self.code = status, field, after, code
