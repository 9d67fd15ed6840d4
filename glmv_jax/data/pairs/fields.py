"""Which fields of a record are its picture and its texts, whatever the format: columns, keys of a JSON file, features
of an example, or the files of a sample by extension.

Texts are taken from fields that name a language (en, zh, caption_en, zh.txt ...) and, for languages that none names,
from the first of `TEXTS` that is there; its language is what the source declares or, with "auto", what its characters
say.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from glmv_jax.data.emoji import LANGUAGES
from glmv_jax.data.files import EXTENSIONS
from glmv_jax.typing import UserError

Record = Mapping[str, Any]

IMAGES = ("image", "img", "picture", "bytes", *EXTENSIONS)
TEXTS = ("txt", "caption", "captions", "text", "texts", "sentences", "raw", "alt_text", "alt", "title")
_WORDS = {*TEXTS, "cn", "chinese", "english", *LANGUAGES}
_OF = {"en": "en", "english": "en", "zh": "zh", "cn": "zh", "chinese": "zh"}

# A share of the letters from which a text is Chinese: "iPhone 手机壳" is, "Beijing (北京) is large" is not.
CHINESE = 0.3
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\U00020000-\U0003ffff]")


@dataclasses.dataclass(frozen=True)
class Fields:
    """Names of what a record holds, "" for those commonly used.

    image: the picture's field.   text: the only field that texts are taken from.
    lang: "en" or "zh", declared: fields of the other language are ignored; "auto": told from the field or the text.
    """

    image: str = ""
    text: str = ""
    lang: str = "auto"

    def picture(self, record: Record) -> bytes:
        """The encoded picture. UserError: none, or none that is bytes."""
        names = [n for n in ((self.image,) if self.image else IMAGES) if record.get(n) is not None]
        values = [_content(record[name]) for name in names]
        if not names:
            asked = self.image or "image, jpg, ..."
            raise UserError(f"no picture ({asked}), only {', '.join(sorted(record)) or 'nothing'}")
        found = next((v for v in values if isinstance(v, bytes) and v), None)  # a JSON's "image" may be a name
        if found is None:
            raise UserError(f"its picture {names[0]!r} is {_kind(values[0])}, not the bytes of a picture file")
        return found

    def texts(self, record: Record) -> dict[str, list[str]]:
        """Texts by language; a language is there only with a text. UserError: none, or something other than text."""
        named: dict[str, list[str]] = {}
        for name in record:
            lang = _language_of(name) if self.text in ("", name) else ""
            if lang and self.lang in ("auto", lang):
                named.setdefault(lang, []).extend(_strings(name, record[name]))
        found: dict[str, list[str]] = {}
        name = self.text or next((n for n in TEXTS if record.get(n) is not None), "")
        for text in _strings(name, record.get(name)) if not _language_of(name) else ():
            found.setdefault(language(text) if self.lang == "auto" else self.lang, []).append(text)
        found |= {lang: texts for lang, texts in named.items() if texts}
        if not found:
            what = f"its text {name!r} is empty" if record.get(name) is not None else "no text"
            raise UserError(f"{what}; it has {', '.join(sorted(record)) or 'nothing'}")
        return found

    def uses(self, name: str, picture: bool) -> bool:
        """Whether a field of this name may be what is taken."""
        text = name == self.text if self.text else name in TEXTS or bool(_language_of(name))
        return text or (picture and (name == self.image if self.image else name in IMAGES))


def _content(value: Any) -> Any:
    """What a picture's field holds: the bytes in Hugging Face's {"bytes", "path"} and in a feature of an Example."""
    if isinstance(value, Mapping):
        value = value.get("bytes")
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def language(text: str) -> str:
    """ "zh" when at least CHINESE of the letters are Chinese characters, else "en", which stands for all others."""
    letters = sum(c.isalpha() for c in text)
    return "zh" if letters and len(_HAN.findall(text)) >= CHINESE * letters else "en"


def _language_of(name: str) -> str:
    """The language that a field's name says: "caption_en", "zh", "en.txt"; "" for "caption" and "seg.png"."""
    words = re.split(r"[._\-/]", name.lower())
    named = {_OF[word] for word in words if word in _OF}
    return named.pop() if len(named) == 1 and _WORDS.issuperset(words) else ""


def _strings(name: str, value: Any) -> list[str]:
    """All texts in a value, stripped, the empty ones left out. A file (txt) has one a line."""
    if isinstance(value, Mapping):  # one of COCO's annotations, or a sequence of them as TFDS gives it
        inner = next((key for key in TEXTS if key in value), None)
        return _strings(name, value[inner]) if inner else _wrong(name, value)
    if isinstance(value, (list, tuple, np.ndarray)):
        return [text for item in value for text in _strings(name, item)]
    if isinstance(value, bytes):
        value = value.decode()
    if value is None:
        return []
    if not isinstance(value, str):
        return _wrong(name, value)
    lines = value.splitlines() if name.endswith("txt") else [" ".join(value.split())]
    return [line.strip() for line in lines if line.strip()]


def _wrong(name: str, value: Any) -> list[str]:
    raise UserError(f"its text {name!r} is {_kind(value)}, not text")


def _kind(value: Any) -> str:
    return "empty" if isinstance(value, bytes) else type(value).__name__


def from_json(content: bytes) -> dict[str, Any]:
    """The fields of a JSON file. UserError: no JSON, or no object."""
    try:
        fields = json.loads(content)
    except ValueError as error:  # of which broken UTF-8 is one
        raise UserError(f"its json is broken ({error})") from None
    if not isinstance(fields, dict):
        raise UserError(f"its json is {_kind(fields)}, not an object of fields")
    return fields
