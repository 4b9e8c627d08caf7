"""Checkpoints in, one checkpoint out: fusion of models that need not fit into memory."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .._random import Seed, seed_number
from .._state import Tensors
from ..errors import StateMismatchError
from ._checkpoint import Checkpoint
from ._checkpoint_writer import Files
from ._noisy import mse_of, noisy
from ._sinks import Applied
from ._sources import Base, Difference, Source, check_same
from .arithmetic import task_arithmetic
from .fuse import _listed, run

__all__ = ["fuse_files"]

Path = str | os.PathLike[str]


def fuse_files(
    base: Path,
    finetuned: Iterable[Path],
    out: Path,
    rule: Callable[..., Tensors] = task_arithmetic,
    *,
    mse: Any = None,
    scale: str | float = "rms",
    seed: Seed | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
    **options: Any,
) -> None:
    r"""Fuse fine-tuned checkpoints on disk into one, in memory that does not depend on their size.

    .. math:: \theta = \theta_0 + \mathrm{rule}(\theta_1 - \theta_0, \dots, \theta_N - \theta_0)

    What is written is, bit for bit, what `fuse` returns for the same models in memory. Rules that work entry by entry
    need a few megabytes, rules for matrices a few times the largest matrix.

    Args:
        base: the pre-trained model: a ``.safetensors`` file, an index of shards (``.safetensors.index.json``), or a
            folder that holds one of them, such as Hugging Face writes.
        finetuned: N of them with the same names, shapes and dtypes; how they are divided into shards does not matter.
        out: a path that ends in ``.safetensors``, which is replaced if it exists; or a folder, which must not exist,
            for shards of the names of the base's, with their index.
        rule: a rule of this package. Any other function of a list of task vectors is given all of them in memory.
        mse: to send the task vectors over the channel on the way: the N mean squared errors of the receiver, as of
            `rmtllmf.channel.sic`, or a number for all. Each vector gets the noise that `rmtllmf.channel.transmit` gives
            it with these `mse`, `scale` and `seed` (estimator "additive", independent errors).
        scale, seed: with `mse` those of the channel: "rms", "peak", "tensor_rms", "tensor_peak" or a number, and an int
            or a ``torch.Generator``. Without it they are options of the rule. To give both their own, bind the rule's:
            ``functools.partial(task_arithmetic, scale=0.3)``.
        dtype: of the fused entries; by default the base's.
        progress: show a progress bar.
        options: of the rule, such as ``density=0.2``, and those of `FusionOptions` but ``out``.

    Raises:
        StateMismatchError: names, shapes or dtypes disagree. NonFiniteError: NaN or infinity that is not the same in
        base and model. InputError: a file that is no safetensors file, or is damaged; a target that another process is
        writing. FileNotFoundError, FileExistsError: as they say. Otherwise as the rule.

    Note:
        The result appears under its name only when it is complete. A run that was killed (not one that failed) goes on
        where it was when it is called again with the same arguments and files, before the next boot; until then a
        ``.part`` and its journal lie beside the target.

    Source: Ilharco et al., "Editing models with task arithmetic", 2023; R-MTLLMF, eq. 1 and 6.

    Example:
        >>> import tempfile, torch
        >>> from safetensors.torch import load_file, save_file
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name, value in ("base", 10.0), ("a", 11.0), ("b", 13.0):
        ...         save_file({"w": torch.tensor([value])}, f"{folder}/{name}.safetensors")
        ...     models = [f"{folder}/a.safetensors", f"{folder}/b.safetensors"]
        ...     fuse_files(f"{folder}/base.safetensors", models, f"{folder}/fused.safetensors", scale=0.5)
        ...     load_file(f"{folder}/fused.safetensors")
        {'w': tensor([12.])}
    """
    opened: list[Checkpoint] = []
    channel: dict[str, Any] = {}
    try:
        origin = Checkpoint(base, "base")
        opened.append(origin)
        for index, path in enumerate(_listed(finetuned)):
            opened.append(Checkpoint(path, f"finetuned[{index}]"))
            _check(opened[-1], origin)
        shared = Base(origin)
        vectors: list[Source] = [Difference(shared, model, model.label) for model in opened[1:]]
        if mse is None:
            options |= {} if scale == "rms" else {"scale": scale}
            options |= {} if seed is None else {"seed": seed}
        else:
            seed = None if seed is None else seed_number(seed)
            vectors = noisy(vectors, mse, scale, seed)
            channel = {"mse": mse_of(mse, len(vectors)), "scale": scale, "seed": seed}
        request = {
            "files": [file.fingerprint() for file in opened],
            "rule": _described(rule),
            "options": {name: _described(value) for name, value in sorted(options.items())},
            "dtype": str(dtype),
            "channel": channel,
            "torch": torch.__version__,
        }
        sink = Files(origin, out, request)
        try:
            run(rule, vectors, Applied(shared, sink, dtype), options | {"progress": progress} if progress else options)
        except (KeyboardInterrupt, SystemExit, OSError):
            sink.close(forget=False)  # to go on with
            raise
        except BaseException:
            sink.close(forget=True)
            raise
        sink.close(forget=False)
    finally:
        for file in opened:
            file.close()


def _check(model: Checkpoint, base: Checkpoint) -> None:
    check_same(model, base)
    for key, spec in model.specs.items():
        if spec.dtype != base.specs[key].dtype:
            raise StateMismatchError(
                f"{model.label}[{key!r}] is {spec.dtype}; base has {base.specs[key].dtype}. Convert one of them first: "
                "nothing is cast in silence"
            )


def _described(value: Any) -> str:
    """The same text for the same value in another process."""
    if isinstance(value, functools.partial):
        return f"{_described(value.func)} {value.args!r} {sorted(value.keywords.items())!r}"
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', repr(value))}"
    if isinstance(value, torch.Tensor):
        return repr(value.tolist())
    return repr(value)
