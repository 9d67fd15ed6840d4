"""tf.train.Example, the record that TFDS, big_vision and T5X pipelines write, read without TensorFlow.

An Example is a protocol buffer of three levels, whose few field numbers are all there is to know
(tensorflow/core/example/feature.proto):

    Example     1: Features            Features   1: repeated entry of a map (1: name, 2: Feature)
    Feature     1: BytesList, 2: FloatList, 3: Int64List, each with 1: repeated value (numbers may be packed)
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

from glmv_jax.typing import UserError

_VARINT, _EIGHT, _LENGTH, _FOUR = 0, 1, 2, 5


def parse(record: bytes) -> dict[str, list[bytes] | list[float] | list[int]]:
    """Feature name -> its values. UserError: not an Example."""
    try:
        found: dict[str, Any] = {}
        for number, features in _fields(memoryview(record)):
            if number != 1:
                raise ValueError("an unknown field")
            for _, entry in _fields(features):
                parts = dict(_fields(entry))
                found[bytes(parts[1]).decode()] = _values(parts[2]) if 2 in parts else []
        return found
    except (ValueError, KeyError, IndexError, TypeError, struct.error) as error:
        raise UserError(f"the record is no tf.train.Example ({error})") from None


def _values(feature: memoryview) -> list[Any]:
    for kind, values in _fields(feature):
        if kind == 1:
            return [bytes(value) for _, value in _fields(values)]
        found: list[Any] = []
        for _, value in _fields(values):
            if isinstance(value, int):  # one that is not packed
                found.append(_signed(value))
            elif kind == 2:
                found += struct.unpack(f"<{len(value) // 4}f", value)
            else:
                at = 0
                while at < len(value):
                    number, at = _varint(value, at)
                    found.append(_signed(number))
        return found
    return []


def _fields(message: memoryview) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a message: an int, or a memoryview."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _LENGTH:
            size, at = _varint(message, at)
        elif kind in (_FOUR, _EIGHT):
            size = 4 if kind == _FOUR else 8
        else:
            raise ValueError(f"wire type {kind}")
        if at + size > len(message):
            raise ValueError("cut short")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
