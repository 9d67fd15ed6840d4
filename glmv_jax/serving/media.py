"""Pictures that a request brings: as base64, and by URL where the server may fetch. Never files of the server."""

from __future__ import annotations

import base64
import binascii
import re

from PIL import Image

from glmv_jax.data.naflex import load_image
from glmv_jax.serving.limits import Limits, Refused
from glmv_jax.typing import UserError

_DATA = re.compile(r"data:(image/[\w.+-]+)?((?:;[\w.+=-]+)*),", re.ASCII)


class Gallery:
    """Collects the pictures of one request, in reading order. images: undecoded."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.images: list[bytes] = []

    def add_base64(self, data: object, field: str) -> None:
        """A picture in base64. Raises Refused."""
        if not isinstance(data, str):
            raise Refused(f"{field} is no base64 text; encode the image's bytes", field=field)
        try:
            self._add(base64.b64decode(data, validate=True), field)
        except (binascii.Error, ValueError):
            raise Refused(f"{field} is no base64; encode the image's bytes again", field=field) from None

    def add_url(self, url: object, field: str) -> None:
        """A picture by address: a data: URL, or one to fetch. Raises Refused for all others."""
        if not isinstance(url, str):
            raise Refused(f"{field} is no URL; give a data: URL", field=field)
        if found := _DATA.match(url):
            if "base64" not in found[2].split(";"):
                raise Refused(f"{field} is a data: URL without base64; encode the image's bytes", field=field)
            self.add_base64(url[found.end() :], field)
        elif self._limits.fetch and url.startswith(("https://", "http://")):
            from glmv_jax.serving import fetching

            self._add(fetching.fetch(url, self._limits.body), field)
        else:
            how = "this server fetches none" if not self._limits.fetch else "only http and https are fetched"
            raise Refused(f"{field} is no data: URL, and {how}; send the image as base64", field=field)

    def _add(self, data: bytes, field: str) -> None:
        if len(self.images) == self._limits.images:
            raise Refused(f"more than {self._limits.images} images in a request; leave some out", field=field)
        self.images.append(data)

    def decoded(self) -> list[Image.Image]:
        """The pictures as RGB, upright. Raises Refused for what is none, or too large by what its head says."""
        try:
            return [load_image(data, self._limits.pixels) for data in self.images]
        except UserError as error:
            raise Refused(str(error), field="messages") from None
