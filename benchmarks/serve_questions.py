"""What the clients of `serve_load.py` ask."""

from __future__ import annotations

import base64
import io
import json
import random
from typing import Any

from serve_client import Question

LENGTHS = (8, 16, 32, 64, 128, 256, 512)
WORDS = (
    "what which where how many colour red blue green heart star circle is in the picture left of right under".split()
)
TOOL = {"name": "zoom", "description": "A part of the picture.",
        "schema": {"type": "object", "properties": {"where": {"type": "string"}}}}  # fmt: skip


def pictures(count: int) -> list[str]:
    """Small PNGs in base64, of many sizes and shapes, each with a rectangle."""
    from PIL import Image, ImageDraw

    rng, found = random.Random(0), []
    for _ in range(count):
        width, height = rng.randint(24, 160), rng.randint(24, 160)
        colour = lambda: tuple(rng.randrange(256) for _ in range(3))  # noqa: E731
        image, file = Image.new("RGB", (width, height), colour()), io.BytesIO()
        ImageDraw.Draw(image).rectangle((4, 4, rng.randint(8, width), rng.randint(8, height)), fill=colour())
        image.save(file, "PNG")
        found.append(base64.b64encode(file.getvalue()).decode())
    return found


class Questions:
    """Draws them. Texts and images come from small stores, so that some are asked again."""

    def __init__(self, model: str) -> None:
        rng = random.Random(1)
        self._model, self._images = model, pictures(24)
        self._texts = [" ".join(rng.choices(WORDS, k=rng.choice((4, 8, 16, 120)))) + "?" for _ in range(40)]
        self._rng = random.Random(2)

    def draw(self, wanted: int | None = None) -> Question:
        rng = self._rng
        wire = rng.choice(("openai", "anthropic"))
        wanted = wanted or rng.choices(LENGTHS, [n**-0.8 for n in LENGTHS])[0]
        text, image = (
            rng.randrange(len(self._texts)),
            rng.randrange(len(self._images)) if rng.random() < 1 / 3 else None,
        )
        kind = rng.choices(("plain", "tools", "result"), (0.8, 0.1, 0.1))[0]
        seed, whole = rng.randrange(3), rng.random() < 0.05
        leaves = rng.random() < 1 / 12
        leave = rng.choice((0, 1, 2, 5, 20)) if leaves and not whole else None
        patience = rng.choice((0.01, 0.1, 0.5)) if leaves and (whole or rng.random() < 0.3) else None
        body = getattr(self, f"_{wire}")(self._texts[text], image, kind, wanted, seed)
        body |= {"model": self._model, "stream": not whole}
        kinds = f"{'image' if image is not None else 'text'}, {kind}"
        return Question(wire, kinds, body, wanted, leave, patience, json.dumps([wire, text, image, kind, wanted, seed]))

    def _openai(self, text: str, image: int | None, kind: str, wanted: int, seed: int) -> dict[str, Any]:
        url = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{self._images[image]}"}}] if (
            image is not None) else []  # fmt: skip
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*url, {"type": "text", "text": text}]}]
        if kind == "result":
            call = {"id": "1", "type": "function", "function": {"name": "zoom", "arguments": '{"where": "left"}'}}
            messages = [{"role": "user", "content": text}, {"role": "assistant", "tool_calls": [call]},
                        {"role": "tool", "tool_call_id": "1", "content": url or "nothing"}]  # fmt: skip
        about = {"name": TOOL["name"], "description": TOOL["description"], "parameters": TOOL["schema"]}
        tools = {} if kind == "plain" else {"tools": [{"type": "function", "function": about}]}
        forced = {"tool_choice": "required"} if kind == "tools" and seed == 0 else {}
        return {"messages": messages, "max_completion_tokens": wanted, "temperature": 1.0, "seed": seed,
                "stream_options": {"include_usage": True}} | tools | forced  # fmt: skip

    def _anthropic(self, text: str, image: int | None, kind: str, wanted: int, seed: int) -> dict[str, Any]:
        blocks: list[dict[str, Any]] = []
        if image is not None:
            source = {"type": "base64", "media_type": "image/png", "data": self._images[image]}
            blocks = [{"type": "image", "source": source}]
        messages: list[dict[str, Any]] = [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}]
        if kind == "result":
            use = {"type": "tool_use", "id": "t", "name": "zoom", "input": {"where": "left"}}
            result = {"type": "tool_result", "tool_use_id": "t", "content": blocks or "nothing"}
            messages = [{"role": "user", "content": text}, {"role": "assistant", "content": [use]},
                        {"role": "user", "content": [result]}]  # fmt: skip
        about = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["schema"]}
        tools = {} if kind == "plain" else {"tools": [about]}
        thinking = {"thinking": {"type": "enabled", "budget_tokens": 1024}} if seed == 1 else {}
        return {"messages": messages, "max_tokens": wanted, "temperature": 0, "system": "Be brief."} | tools | thinking
