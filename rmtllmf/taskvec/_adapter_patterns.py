"""PEFT's patterns, by which single layers have a rank and an alpha of their own: regular expressions from a file.

The search for one can take longer than anybody lives, so that there are bounds of it.
"""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable, Mapping
from math import inf, prod
from typing import Any

from .._untrusted import brief
from ..errors import InputError

MOST_STEPS = 10**9  # of one search, some ten seconds: three wildcards in a name of a hundred characters are a tenth
LONGEST = 60.0  # seconds for all searches together
_TOKEN = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\??|.", re.DOTALL)


class Patterns:
    """What an option of the configuration says of each module.

    Args:
        patterns: pattern -> value.
        modules: the names that will be asked for.
        problem: how errors begin.
    """

    def __init__(self, patterns: Any, modules: Iterable[str], problem: str) -> None:
        if not isinstance(patterns, Mapping):
            raise InputError(f"{problem} is {brief(patterns)}; expected patterns and their numbers")
        self._problem, self._spent = problem, 0.0
        self._values: list[tuple[re.Pattern[str], Any]] = []
        longest = max(map(len, modules), default=0)
        for pattern, value in patterns.items():
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of what may mean something else in a later Python
                    re.compile(pattern)
                    self._values.append((re.compile(rf"(.*\.)?({pattern})$"), value))
            except (re.error, OverflowError, RecursionError) as error:
                raise InputError(f"{problem} holds {brief(pattern)}, no pattern ({error})") from None
            if longest * ways(pattern, longest) > MOST_STEPS:
                raise InputError(
                    f"{problem} holds {brief(pattern)}, the search for which could take forever; expected no more "
                    "than three wildcards, and none of a group"
                )

    def value(self, module: str, default: Any) -> Any:
        """PEFT's rule: that of the first pattern that matches the end of the module's name, from a dot on.

        The first in the file, which PEFT writes sorted: that is what it loads, too.
        """
        start = time.monotonic()
        value = next((value for pattern, value in self._values if pattern.match(module)), default)
        self._spent += time.monotonic() - start
        if self._spent > LONGEST:
            raise InputError(f"{self._problem}: the search for its patterns takes more than {LONGEST:g} seconds")
        return value


def ways(pattern: str, length: int) -> float:
    """At most so many ways to read a text of that length lead through a regular expression; infinity if unknown."""
    total, branches, repeatable = 1.0, [1], True
    for token in _TOKEN.findall(pattern):
        if token in ("*", "+", "{"):
            total *= length + 1 if repeatable else inf
        elif token == "?":
            total *= 2
        elif token == "|":
            branches[-1] += 1
        elif token[0] == "(":
            branches.append(1)
        elif token == ")" and len(branches) > 1:
            total *= branches.pop()
        repeatable = token != ")"
    return total * prod(branches)
