"""Whether a program has printed what is shown of it: the same words, and the same numbers up to their last digit."""

from __future__ import annotations

import re

import pytest

NUMBER = re.compile(r"[+-]?\d+\.?\d*(?:e[+-]?\d+)?")


def check_printed(printed: str, shown: str, where: str) -> None:
    """An assertion error that says `where`, unless they agree; numbers may differ by 2 % or 1.5 of the last digit."""
    words = [re.findall(r"[A-Za-z]+", text) for text in (printed, shown)]
    assert words[0] == words[1], where
    numbers = [NUMBER.findall(text) for text in (printed, shown)]
    assert len(numbers[0]) == len(numbers[1]), where
    for got, expected in zip(*numbers, strict=True):
        last_digit = 0.0 if "e" in expected else 10.0 ** -len(expected.partition(".")[2])
        assert float(got) == pytest.approx(float(expected), rel=0.02, abs=1.5 * last_digit), where
