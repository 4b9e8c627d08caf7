"""The engine under the fusion rules: reads vectors piece by piece, calls the rule on every piece, guards the result.

A rule that works entry by entry is given pieces short enough for the cache, on all cores; a rule that needs whole
matrices is given one matrix a thread. Peak memory is the vectors and the result plus a few pieces (matrices) a thread.
A rule that must know something of the whole vectors first (norms, thresholds) surveys them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._state import Tensors, all_finite, is_bendable, select_names
from .._threads import share_out
from ..errors import InputError, NonFiniteError
from ._distributed import run_spread, templates_of
from ._options import FusionOptions, checked_dtype, checked_options, weights_of
from ._sinks import Memory, Sink
from ._sources import Source, Spec, Stored, sources_of
from .vector import TaskVector

Found = TypeVar("Found")

PIECE = 1 << 18  # entries: what is calculated with stays in the cache, and a piece is worth its overhead
PIECE_ON_DEVICE = 1 << 24  # on a GPU a piece should keep it busy
BLOCK = 1 << 17  # entries: of as many, the values of all vectors stay in the cache of a core


@dataclass
class Piece:
    """Entries [start, stop) of one flattened tensor, of all vectors."""

    key: str
    start: int
    stop: int
    into: Tensor  # where the update goes
    spare: Callable[[int, int], Tensor]  # spare(0, n), spare(1, n), ...: scratch memory of n entries, at most len()
    count: int  # of vectors
    read: Callable[[int, int], Tensor]  # read(q, slot): the part of a vector, valid until the slot is read to again

    @cached_property
    def parts(self) -> list[Tensor]:
        """One a vector, in the dtype of the calculation; not to be written to."""
        return [self.read(index, index) for index in range(self.count)]

    def __len__(self) -> int:
        return self.stop - self.start


class Fusion:
    """Vectors and options, checked, and what can be done with them.

    Attributes:
        argument: what errors call the vectors.
        count: number of vectors.
        keys: the names that are fused, one for each memory, in the order given.
        specs: what the update is, for each of `keys`.
        weights: name -> a weight for each vector.
        templates: name -> a DTensor like the vectors', where these are spread over several processes.
        together: all processes do the same in the same order.
        longer: how many times as long as usual pieces are.
        differentiable: whether the caller expects gradients to flow to the vectors.
    """

    def __init__(self, vectors: Iterable[Tensors], options: FusionOptions, *, argument: str = "vectors") -> None:
        options = checked_options(options)
        self.argument = argument
        self.sources: Sequence[Source] = sources_of(vectors, argument)
        self.count = len(self.sources)
        names = [key for key, spec in self.sources[0].specs.items() if is_bendable(key, spec.dtype)]
        if not names:
            raise InputError(f"{argument}: hold no floating-point entries, so there is nothing to fuse")
        skipped = set(select_names(names, options.get("skip", ()), "skip"))
        names = [key for key in names if key not in skipped]
        if not names:
            raise InputError("skip: leaves nothing to fuse")
        self.weights = weights_of(options.get("weights"), self.count, names)
        out: Any = options.get("out")
        self.sink: Sink = out if isinstance(out, Sink) else Memory(out)
        self.keys, self.alias = self._ties(names)
        for key in self.keys:
            for source in self.sources:
                checked_dtype(source.specs[key].dtype, f"{source.label}[{key!r}]")
        compute = options.get("compute_dtype")
        self.compute = {key: compute or self._calculated_in(key) for key in self.keys}
        dtype = options.get("dtype")
        self.specs = {key: self._spec(key, dtype) for key in self.keys}
        self.differentiable = torch.is_grad_enabled() and any(source.wants_gradient for source in self.sources)
        self.templates = templates_of(list(self.sources))
        self.sink.check_layout(self.keys, self.templates)
        self.together = False
        self.longer = 1
        self.progress = bool(options.get("progress", False))

    def lengthen(self, times: int) -> None:
        """Let pieces be `times` as long, if the vectors are in memory: for a rule that needs little memory of its own.

        They are handed out less often then, from which several threads gain.
        """
        self.longer = times if all(isinstance(source, Stored) for source in self.sources) else 1

    def by_entry(
        self, combine: Callable[[Piece], None], *, weighted: bool = True, positional: bool = False
    ) -> TaskVector:
        """The update of a rule that works entry by entry: `combine` fills ``piece.into``.

        With `weighted` the parts come multiplied by their weights. `positional`: what becomes of an entry depends on
        where in its tensor it is, so that ``piece.start`` must count from the start of the whole tensor.
        """
        return self._run([], None, combine, weighted, by_part=not positional)

    def by_matrix(
        self,
        combine: Callable[[str, list[Tensor]], Tensor],
        otherwise: Callable[[Piece], None],
        *,
        keys: Iterable[str] | None = None,
        weighted: bool = True,
    ) -> TaskVector:
        """The update of a rule for matrices: a new one from N weighted ones, and `otherwise` for all other tensors.

        `keys`: other tensors than those of two dimensions that `combine` is for.
        """
        if keys is None:
            keys = [key for key in self.keys if len(self.specs[key].shape) == 2]
        matrices = [key for key in keys if self.specs[key].size]
        matrices.sort(key=lambda key: (-self.specs[key].size, key))  # the longest first, so that no thread waits
        return self._run(matrices, combine, otherwise, weighted, by_part=not matrices)

    def survey(
        self, look: Callable[[Piece], Found], *, keys: Iterable[str] | None = None, weighted: bool = True
    ) -> list[Found]:
        """What `look` finds in every piece, in the order of sorted names: sums of it do not depend on threads."""
        pieces = list(self._pieces(sorted(self.keys if keys is None else keys)))
        found: list[Any] = [None] * len(pieces)

        def worker() -> Callable[[tuple[int, tuple[str, int, int]]], None]:
            space = _Space(self)

            def work(item: tuple[int, tuple[str, int, int]]) -> None:
                index, (key, start, stop) = item
                found[index] = look(self._piece(space, key, start, stop, None, weighted))

            return work

        share_out(worker, enumerate(self._shown(pieces, "surveying")), alone=self._alone)
        return found

    def blame(self, key: str) -> NonFiniteError:
        """Whose fault it is that the update of `key` is not finite."""
        for source in self.sources:
            whole = source.whole(key)
            if not all_finite(whole):
                count = int((~torch.isfinite(whole)).sum())
                return NonFiniteError(
                    f"{source.label}[{key!r}] holds {count} non-finite entries; expected finite numbers"
                )
        return NonFiniteError(f"the fused {key!r} overflows {self.compute[key]}")

    def _run(
        self,
        matrices: list[str],
        combine: Callable[[str, list[Tensor]], Tensor] | None,
        by_entry: Callable[[Piece], None],
        weighted: bool,
        *,
        by_part: bool = True,
    ) -> TaskVector:
        if self.differentiable:
            raise InputError(
                "vectors: gradients flow through linear rules only (task_arithmetic, weighted_average); detach the "
                "vectors, or call the rule under torch.no_grad()"
            )
        if self.templates:
            spread = run_spread(self, lambda f: f._run(matrices, combine, by_entry, weighted), by_part=by_part)
            return self._result(spread)
        self.sink.open(self.specs, self.alias, list(self.sources))
        finished, chosen = self.sink.finished, set(matrices)
        items: list[tuple[str, int, int]] = [(key, 0, -1) for key in matrices if key not in finished]
        items += self._pieces(key for key in self.keys if key not in chosen and key not in finished)

        def worker() -> Callable[[tuple[str, int, int]], None]:
            space = _Space(self)

            def work(item: tuple[str, int, int]) -> None:
                key, start, stop = item
                if stop < 0 and combine is not None:
                    update = self._matrix(key, combine, weighted)
                else:
                    piece = self._piece(space, key, start, stop, self.sink, weighted)
                    by_entry(piece)
                    update = piece.into
                if not self.sink.write(key, start, update):
                    raise self.blame(key)

            return work

        share_out(worker, self._shown(items, "fusing"), alone=self._alone)
        return self._result(self.sink.done())

    def _result(self, fused: Any) -> TaskVector:
        if not isinstance(self.sink, Memory):
            return fused  # for `fuse` and `fuse_files`, which own the sink
        return TaskVector._of({key: fused[key] for key in self.sources[0].specs if key in fused})

    def _matrix(self, key: str, combine: Callable[[str, list[Tensor]], Tensor], weighted: bool) -> Tensor:
        parts = [source.whole(key, self.compute[key], self.specs[key].device) for source in self.sources]
        if weighted:
            parts = [part if w == 1 else part * w for part, w in zip(parts, self.weights(key), strict=True)]
        try:
            return combine(key, parts).reshape(-1)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if all(all_finite(part) for part in parts):
                raise
            raise self.blame(key) from None

    def _piece(self, space: _Space, key: str, start: int, stop: int, sink: Sink | None, weighted: bool) -> Piece:
        dtype, device, length = self.compute[key], self.specs[key].device, stop - start
        space.use(dtype, device)
        weights = self.weights(key)

        def read(index: int, slot: int) -> Tensor:
            source = self.sources[index]
            part = source.view(key, start, stop, dtype, device)
            if part is None:
                part = source.read(key, start, stop, space.row(slot, length))
            if weighted and weights[index] != 1:
                part = torch.mul(part, weights[index], out=space.row(slot, length))
            return part

        target = None if sink is None else sink.target(key, start, stop)
        if target is None or target.dtype != dtype or target.device != device:
            target = space.row(-1, length)
        return Piece(key, start, stop, target, lambda slot, entries: space.row(-2 - slot, entries), self.count, read)

    def _pieces(self, keys: Iterable[str]) -> Iterator[tuple[str, int, int]]:
        for key in keys:
            spec = self.specs[key]
            longest = self.longer * (PIECE if spec.device.type == "cpu" else PIECE_ON_DEVICE)
            if not all(source.sliceable(key) for source in self.sources):
                longest = max(1, spec.size)
            for start in range(0, spec.size, longest):
                yield key, start, min(start + longest, spec.size)

    @property
    def _alone(self) -> bool:
        small = sum(spec.size for spec in self.specs.values()) <= PIECE  # not worth a thread
        return (
            small
            or self.together
            or bool(self.templates)
            or any(spec.device.type != "cpu" for spec in self.specs.values())
        )

    def _shown(self, items: list[tuple[str, int, int]], what: str) -> Iterable[tuple[str, int, int]]:
        if not self.progress:
            return items
        return self._with_bar(items, what)

    def _with_bar(self, items: list[tuple[str, int, int]], what: str) -> Iterator[tuple[str, int, int]]:
        from tqdm.auto import tqdm

        sizes = [self.specs[key].size if stop < 0 else stop - start for key, start, stop in items]
        with tqdm(total=sum(sizes), desc=what, unit=" entries", unit_scale=True) as bar:
            for item, size in zip(items, sizes, strict=True):
                yield item
                bar.update(size)

    def _ties(self, names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
        """Names to fuse, and those tied to one of them in every vector (and weighted alike)."""
        seen = Counter(self.sources[0].identity(key) for key in names)
        known: dict[Hashable, str] = {}
        alias: dict[str, str] = {}
        for key in sorted(names) if len(seen) < len(names) else ():
            if seen[self.sources[0].identity(key)] == 1:
                continue
            memory = (*(source.identity(key) for source in self.sources), self.sink.identity(key), *self.weights(key))
            original = known.setdefault(memory, key)
            if original != key:
                alias[key] = original
        return [key for key in names if key not in alias], alias

    def _calculated_in(self, key: str) -> torch.dtype:
        double = any(source.specs[key].dtype == torch.float64 for source in self.sources)
        return torch.float64 if double else torch.float32

    def _spec(self, key: str, dtype: torch.dtype | None) -> Spec:
        dtypes = {source.specs[key].dtype for source in self.sources}
        return (
            self.sources[0]
            .specs[key]
            ._replace(dtype=dtype or (dtypes.pop() if len(dtypes) == 1 else self._calculated_in(key)))
        )


class _Space:
    """Buffers of one thread, used again for every piece."""

    def __init__(self, fusion: Fusion) -> None:
        self.longest = max((stop - start for _, start, stop in fusion._pieces(fusion.keys)), default=0)
        self.kind: tuple[torch.dtype, torch.device] | None = None
        self.kinds: dict[Hashable, dict[int, Tensor]] = {}

    def use(self, dtype: torch.dtype, device: torch.device) -> None:
        """What rows are asked for from now on."""
        if self.kind != (dtype, device):
            self.kind = (dtype, device)
            self.rows = self.kinds.setdefault(self.kind, {})

    def row(self, slot: int, length: int) -> Tensor:
        """Memory of a slot, the same at every call until more is asked for."""
        found = self.rows.get(slot)
        if (found is None or len(found) < length) and self.kind is not None:
            entries = min(self.longest, max(BLOCK, 1 << (length - 1).bit_length()))
            found = self.rows[slot] = torch.empty(entries, dtype=self.kind[0], device=self.kind[1])
        return found[:length]  # type: ignore[index]
