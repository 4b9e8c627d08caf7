"""Rules for tensors that are spread over several processes, with the bits of one process that holds them all.

A rule that works entry by entry is applied to what each process holds. Any other is calculated by every process for
whole tensors, one after another, of which it keeps its part. Either way all processes fail together.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._sharded import any_process, can_be_sharded, largest_of_all, local, part_of, same_layout, sharded_like
from .._state import all_finite
from ..errors import NonFiniteError, StateMismatchError
from ._sinks import Memory, Sink
from ._sources import Source, Spec

if TYPE_CHECKING:
    from ._engine import Fusion

ELSEWHERE = "another process could not fuse its part of the vectors; its error says why"


def templates_of(sources: list[Source]) -> dict[str, Tensor]:
    """Name -> a DTensor that is spread like the vectors' tensors; an error where these are not spread alike."""
    templates: dict[str, Tensor] = {}
    if not can_be_sharded():
        return templates
    for key in sources[0].specs:
        template = sources[0].template(key)
        if template is not None:
            templates[key] = template
        for source in sources[1:]:
            other = source.template(key)
            if not same_layout(other, template):
                raise StateMismatchError(
                    f"{source.label}[{key!r}] is not spread over the processes as {sources[0].label}'s is; "
                    "redistribute one of them"
                )
    return templates


def run_spread(fusion: Fusion, run: Callable[[Fusion], Any], *, by_part: bool) -> Any:
    """`run` on a fusion of the local parts, or on whole tensors of which the parts are kept; the result is spread."""
    inner = copy.copy(fusion)
    inner.templates, inner.keys = {}, sorted(fusion.keys)
    sink = fusion.sink.local()
    parts = [source.local() for source in fusion.sources] if by_part else [None]
    here = [part for part in parts if part is not None]
    if len(here) == fusion.count:
        inner.sources, inner.sink = here, sink
        inner.specs = {key: _local_spec(spec, fusion.templates.get(key)) for key, spec in fusion.specs.items()}
    else:
        inner.sink, inner.together = Scattered(sink, fusion.templates), True
    result: Mapping[str, Tensor] = {}
    failure: Exception | None = None
    try:
        result = run(inner)
    except Exception as error:
        failure = error
    agree(failure, fusion.templates)
    given = fusion.sink.out if isinstance(fusion.sink, Memory) else None
    spread: dict[str, Tensor] = {}
    for key, part in result.items():
        template, original = fusion.templates.get(key), fusion.alias.get(key)
        if given is not None:
            spread[key] = given[key]
        elif original is not None and result[original] is part and original in spread:
            spread[key] = spread[original]
        else:
            spread[key] = part if template is None else sharded_like(part, template)
    return spread


def agree(failure: Exception | None, templates: Mapping[str, Tensor]) -> None:
    """Raise `failure`, on all processes if one of them has one. All of them must ask, at the same place."""
    if any_process(failure is not None, next(iter(templates.values()))):
        raise failure or NonFiniteError(ELSEWHERE)


class Scattered(Sink):
    """Collects a whole tensor, and hands on the part that this process holds.

    Whether that went well is agreed on at once: a process that went on alone would wait for the others forever.
    """

    def __init__(self, inner: Sink, templates: Mapping[str, Tensor]) -> None:
        self.inner, self.templates = inner, templates
        self._whole: Tensor | None = None
        self._left = 0

    def open(self, specs: Mapping[str, Spec], alias: Mapping[str, str], sources: list[Source]) -> None:
        self.specs = specs
        parts = {key: _local_spec(spec, self.templates.get(key)) for key, spec in specs.items()}
        here = [part for source in sources if (part := source.local()) is not None]
        self._agreed(lambda: self.inner.open(parts, alias, here))

    def _agreed(self, step: Callable[[], bool | None]) -> bool:
        """What `step` says, which is False on all processes if it is on one of them; they fail together too."""
        failure: Exception | None = None
        answer: bool | None = True
        try:
            answer = step()
        except Exception as error:
            failure = error
        flags = [float(failure is not None), float(answer is False)]
        failed, refused = largest_of_all(flags, next(iter(self.templates.values())))
        if failed:
            raise failure or NonFiniteError(ELSEWHERE)
        return not refused

    def write(self, key: str, start: int, update: Tensor) -> bool:
        template = self.templates.get(key)
        if template is None:
            return self._agreed(lambda: self.inner.write(key, start, update))
        if not all_finite(update):  # all processes see the same
            return False
        size = self.specs[key].size
        if self._whole is None:  # tensors come one after another
            self._whole, self._left = torch.empty(size, dtype=update.dtype, device=update.device), size
        self._whole[start : start + len(update)] = update
        self._left -= len(update)
        if not self._left:
            part = part_of(self._whole.view(self.specs[key].shape), template).reshape(-1)
            self._whole = None
            return self._agreed(lambda: self.inner.write(key, 0, part) if len(part) else True)
        return True

    def done(self) -> Any:
        return self.inner.done()

    def local(self) -> Sink:
        return self


def _local_spec(spec: Spec, template: Tensor | None) -> Spec:
    return spec if template is None else spec._replace(shape=tuple(local(template).shape))
