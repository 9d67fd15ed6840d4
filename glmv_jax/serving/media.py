"""Pictures and films of a request: as base64, and by URL where the server may fetch. Never files of the server."""

from __future__ import annotations

import base64
import binascii
import re

from PIL import Image

from glmv_jax.data import video
from glmv_jax.data.naflex import load_image
from glmv_jax.serving.limits import Limits, Refused
from glmv_jax.typing import UserError

_DATA = re.compile(r"data:((?:image|video)/[\w.+-]+)?((?:;[\w.+=-]+)*),", re.ASCII)


class Gallery:
    """Collects the pictures and films of one request, in reading order. images, films: undecoded."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.images: list[bytes] = []
        self.films: list[bytes] = []

    def add_base64(self, data: object, field: str) -> None:
        """A picture in base64. Raises Refused."""
        self._add_image(_decoded(data, field), field)

    def add_url(self, url: object, field: str) -> None:
        """A picture by address: a data: URL, or one to fetch. Raises Refused for all others."""
        self._add_image(self._at(url, field), field)

    def add_film_base64(self, data: object, field: str) -> None:
        """A film in base64, as `add_film_url`."""
        self._check_room(field)
        self._add_film(_decoded(data, field), field)

    def add_film_url(self, url: object, field: str) -> None:
        """A film by address, as `add_url`; what is too long or too large is so by its head. Raises Refused."""
        self._check_room(field)
        self._add_film(self._at(url, field), field)

    def _check_room(self, field: str) -> None:
        if len(self.films) == self._limits.films:
            most = f"more than {self._limits.films} films in a request" if self._limits.films else "no films are taken"
            raise Refused(f"{field}: {most}; leave it out, or serve with a greater --films", field=field)

    def _add_film(self, film: bytes, field: str) -> None:
        try:
            video.check(film, self._limits.pixels, self._limits.frames)
        except UserError as error:
            raise Refused(f"{field}: {error}", field=field) from None
        self.films.append(film)

    def _at(self, url: object, field: str) -> bytes:
        if not isinstance(url, str):
            raise Refused(f"{field} is no URL; give a data: URL", field=field)
        if found := _DATA.match(url):
            if "base64" not in found[2].split(";"):
                raise Refused(f"{field} is a data: URL without base64; encode the file's bytes", field=field)
            return _decoded(url[found.end() :], field)
        if self._limits.fetch and url.startswith(("https://", "http://")):
            from glmv_jax.serving import fetching

            return fetching.fetch(url, self._limits.body)
        how = "this server fetches none" if not self._limits.fetch else "only http and https are fetched"
        raise Refused(f"{field} is no data: URL, and {how}; send the file as base64", field=field)

    def _add_image(self, data: bytes, field: str) -> None:
        if len(self.images) == self._limits.images:
            raise Refused(f"more than {self._limits.images} images in a request; leave some out", field=field)
        self.images.append(data)

    def decoded(self) -> list[Image.Image]:
        """The pictures as RGB, upright. Raises Refused for what is none, or too large by what its head says."""
        try:
            return [load_image(data, self._limits.pixels) for data in self.images]
        except UserError as error:
            raise Refused(str(error), field="messages") from None


def _decoded(data: object, field: str) -> bytes:
    if not isinstance(data, str):
        raise Refused(f"{field} is no base64 text; encode the file's bytes", field=field)
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"{field} is no base64; encode the file's bytes again", field=field) from None
