"""Damage to a file, decided by a string of bytes: who chooses the bytes, Hypothesis or a fuzzer, chooses the damage."""

from __future__ import annotations

import json
import struct
from math import prod

MANY = 100_000
VALUES = (
    None, True, -1, 0, 1, 2, 7, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 0.5, 1e308, float("nan"), float("inf"),
    "", "F32", "I64", "BF16", "BOOL", "F8_E4M3", "C64", "F64", "../../x.safetensors", "/dev/zero", "a.safetensors",
    "(a+)+$", "\ud800", "x" * 5000, [], {}, [0], [2**40, 2**40], [2**62, 2**62, 0], [1] * 200, [0, 8], [8, 0],
    {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "{", "[" * MANY, '{"fc.bias": "fc.weight"}', 10**400,
)  # fmt: skip
TEXTS = (
    b"",
    b"[" * MANY,
    b'{"a":' * MANY,
    b"\xff\xfe{}",
    b"{}",
    b"[]",
    b"null",
    b"NaN",
    b'{"a":1,"a":2}',
    b"\0",
    b"1" * 5000,
)


class Choices:
    """Numbers out of a string of bytes; zeros when it has come to its end."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def below(self, count: int) -> int:
        """From 0 to count - 1."""
        width = max(1, (max(count - 1, 1).bit_length() + 7) // 8)
        taken, self.data = self.data[:width], self.data[width:]
        return int.from_bytes(taken) % max(count, 1)

    def of(self, options):
        """One of several."""
        return options[self.below(len(options))]


def damaged(content: bytes, choices: Choices) -> bytes:
    """The content of a file after one or a few changes."""
    kinds = (_rebuilt, _rebuilt, _rebuilt, _rebuilt, _said, _said, _flipped, _cut, _inserted, _length)
    for _ in range(1 + choices.below(2)):
        content = choices.of(kinds)(content, choices)
    return content


def _flipped(content, choices):
    if not content:
        return content
    where = choices.below(len(content))
    return content[:where] + bytes([choices.below(256)]) + content[where + 1 :]


def _cut(content, choices):
    return content[: choices.below(len(content) + 1)]


def _inserted(content, choices):
    where = choices.below(len(content) + 1)
    return content[:where] + bytes(choices.below(256) for _ in range(choices.below(16))) + content[where:]


def _length(content, choices):
    """The header of a safetensors file claims to be of another length."""
    claimed = choices.of((0, 1, 2, 7, 8, len(content), len(content) - 8, 2**31, 10**8, 2**63 - 1, 2**63, 2**64 - 1))
    return struct.pack("<Q", max(claimed, 0)) + content[8:]


def _rebuilt(content, choices):
    """A safetensors file in which one tensor is another, is gone or has another name, and all else fits that."""
    length = int.from_bytes(content[:8], "little")
    try:
        header = json.loads(content[8 : 8 + length])
        begin = {key: value.get("data_offsets", [0, 0]) for key, value in header.items()}
        tensors = {key: (header[key], content[8 + length :][slice(*begin[key])]) for key in header}
    except (ValueError, RecursionError, AttributeError, TypeError):
        return _said(content, choices)
    metadata, _ = tensors.pop("__metadata__", ({}, b""))
    if not tensors:
        return content
    key = choices.of(sorted(tensors))
    what, data = tensors[key]
    how = choices.below(7)
    if how == 0:
        del tensors[key]
    elif how == 1:
        other = choices.of(
            (*sorted(tensors), key + ".x", "mask.0." + key, "vector." + key, "mask.1.w", "routing", "", "\n")
        )
        tensors[other] = tensors.pop(key)
    elif how == 2:
        tensors[choices.of((key + ".lora_A", "x.right", "model.x", "rescalers", "0.shift"))] = tensors[key]
    elif how == 3:
        width = max(1, len(data) // max(1, _size(what)))
        names = {
            1: ("U8", "BOOL", "F8_E4M3", "I8"),
            2: ("F16", "BF16", "I16"),
            4: ("F32", "I32", "U32"),
            8: ("F64", "I64"),
        }
        tensors[key] = (what | {"dtype": choices.of(names.get(width, ("F32",)))}, data)
    elif how == 4:
        size = _size(what)
        shape = choices.of(([size], [1, size], [size, 1], [size, 1, 1], [], [0], [0, 2**40], [2**62, 0]))
        tensors[key] = (what | {"shape": shape}, data if 0 not in shape else b"")
    elif how == 5:
        fill = choices.of((b"\xff", b"\0", b"\x7f", b"\x80\x7f", b"\0\0\x80\x7f", b"\x01"))
        tensors[key] = (what, (fill * len(data))[: len(data)])
    else:
        metadata = _changed(metadata, choices)
    at, header = 0, {"__metadata__": metadata}
    for name, (value, bits) in tensors.items():
        header[name] = value | {"data_offsets": [at, at + len(bits)]}
        at += len(bits)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + b"".join(bits for _, bits in tensors.values())


def _size(what):
    shape = what.get("shape")
    sane = isinstance(shape, list) and all(type(width) is int and 0 <= width < MANY for width in shape[:9])
    return prod(shape[:9]) if sane else 1


def _said(content, choices):
    """Another header of a safetensors file, or content of a file of JSON, in which one thing is different."""
    length = int.from_bytes(content[:8], "little")
    binary = 8 + length <= len(content)
    text = content[8 : 8 + length] if binary else content
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if value is None or choices.below(8) == 0:
        text = choices.of(TEXTS)
    else:
        text = json.dumps(_changed(value, choices)).encode(errors="surrogatepass")
        if choices.below(8) == 0:  # the same name twice
            text = text.replace(b", ", b', "w": 1, "w": 2, ', 1)
    return struct.pack("<Q", len(text)) + text + content[8 + length :] if binary else text


def _changed(value, choices):
    """A JSON value in which one thing, somewhere, is another, gone, or there under another name."""
    if isinstance(value, str) and value[:1] in ("{", "[") and choices.below(2):
        try:
            return json.dumps(_changed(json.loads(value), choices))  # JSON in JSON: metadata
        except (ValueError, RecursionError):
            return value
    if not isinstance(value, dict | list) or not value or choices.below(6) == 0:
        return choices.of(VALUES)
    if isinstance(value, list):
        where = choices.below(len(value))
        return [*value[:where], _changed(value[where], choices), *value[where + 1 :]]
    key = choices.of(sorted(value))
    rest = {name: inner for name, inner in value.items() if name != key}
    how = choices.below(5)
    if how == 0:
        return rest
    if how == 1:
        name = choices.of(
            (*sorted(value), "", "__metadata__", "w", "vector.x", "mask.0.", "mask.9.w", "x" * 5000, "\ud800")
        )
        return rest | {name: value[key]}
    return value | {key: _changed(value[key], choices)}
