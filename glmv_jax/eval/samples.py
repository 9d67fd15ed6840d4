"""Pictures and answers for the report: a folder of PNGs and one samples.jsonl."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from PIL import Image


class SampleWriter:
    """Writes records into a folder that exists; a picture is written once however many records show it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        (self.folder / "samples.jsonl").write_text("", encoding="utf-8")

    def image(self, name: str, picture: Image.Image) -> str:
        """The file name of a picture called `name` (characters a file system may dislike are replaced)."""
        file = re.sub(r"[^\w.-]", "_", name) + ".png"
        if not (self.folder / file).exists():
            picture.save(self.folder / file)
        return file

    def add(self, **record: Any) -> None:
        """One record: id, source, image(s), prompt, answer, gold, correct or reward, boxes ...; see eval/report."""
        with open(self.folder / "samples.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
