"""Checkpoints in, one checkpoint out: fusion of models that need not fit into memory."""

from __future__ import annotations

import functools
import hashlib
import inspect
import os
import secrets
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch

from .._random import Seed, seed_number
from .._sharded import full
from .._state import Tensors
from ._agreement import check_model, left_alone
from ._checkpoint import Checkpoint
from ._checkpoint_writer import Files
from ._kinship import warn_unless_related
from ._noisy import mse_of, noisy
from ._options import checked_dtype
from ._sinks import Applied
from ._sources import Base, Difference, Source
from .fuse import is_ours, listed, name_of, rule_given_once, run
from .rules.arithmetic import task_arithmetic

__all__ = ["fuse_files"]

Path = str | os.PathLike[str]


@rule_given_once
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
    skip: str | Iterable[str] = (),
    mixed_dtypes: bool = False,
    progress: bool = False,
    **options: Any,
) -> None:
    r"""Fuse fine-tuned checkpoints on disk into one, in memory that does not depend on their size.

    .. math:: \theta = \theta_0 + \mathrm{rule}(\theta_1 - \theta_0, \dots, \theta_N - \theta_0)

    What is written is, bit for bit, what `fuse` returns for the same models in memory. Rules that work entry by entry
    need a few megabytes. Rules for whole matrices need, in every thread, those of all models in float32 and what they
    are decomposed into: 10 to 40 times the largest matrix for three to eight models.

    Args:
        base: the pre-trained model: a ``.safetensors`` file, an index of shards (``.safetensors.index.json``), or a
            folder that holds one of them, such as Hugging Face writes. Of several in a folder it is
            ``model.safetensors``, else ``model.safetensors.index.json``, as for transformers. Links that lead out of
            a folder are not followed, except in the cache of the Hugging Face hub; nothing is downloaded.
        finetuned: N of them with the same names, shapes and dtypes (but see `skip` and `mixed_dtypes`); how they are
            divided into shards does not matter.
        out: a path that ends in ``.safetensors``, which is replaced if it exists; or a folder, which must not exist,
            for shards of the names of the base's, with their index. If `base` is a folder too, configuration,
            tokenizer and texts in it are copied, so that the result can be loaded like the base: ``.json``, ``.txt``,
            ``.md``, ``.jinja``, ``.model``, ``.tiktoken``, ``.bpe``, ``.spm``, ``LICENSE``, ``NOTICE``, and templates
            in ``chat_templates`` and ``additional_chat_templates``. Code (``modeling_*.py``), other formats of the
            weights, ``adapter_config.json`` and ``trainer_state.json`` are not.
        rule: a rule of this package. Any other function of a list of task vectors is given all of them in memory.
        mse: to send the task vectors over the channel on the way: the N mean squared errors of the receiver, as of
            `rmtllmf.channel.sic`, or a number for all. Each vector gets the noise that `rmtllmf.channel.transmit` gives
            it with these `mse`, `scale` and `seed` (estimator "additive", independent errors).
        scale, seed: with `mse` those of the channel, and not of the rule: what coefficients are divided by before they
            are sent, "rms", "peak", "tensor_rms", "tensor_peak" or a number (of the size of the vectors' entries, which
            is 1e-4 to 1e-2 for most fine-tuned models: a rule's 0.3 makes the noise a thousand times too large), and an
            int or a ``torch.Generator``. Without `mse` they are options of the rule. To give both their own, bind the
            rule's: ``functools.partial(task_arithmetic, scale=0.3)``, ``functools.partial(dare, seed=0)``.
        dtype: of the fused entries; by default the base's. A ``config.json`` that is copied says it (``dtype``,
            ``torch_dtype``), where it says one.
        skip, mixed_dtypes: as for `fuse`: names of what stays as in the base, which other models may have otherwise or
            not at all; and whether models may have other floating dtypes than the base.
        progress: show a progress bar.
        options: of the rule, such as ``density=0.2``, and those of `FusionOptions` but ``out``.

    Raises:
        StateMismatchError: names, shapes or dtypes disagree. NonFiniteError: NaN or infinity that is not the same in
        base and model. InputError: a file that is no safetensors file, or is damaged; what is no model (an adapter,
        a file of `TaskVector.save`); a pattern of `skip` that matches nothing; a target that another process is
        writing, or that is one of the inputs; an input that changes meanwhile. FileNotFoundError,
        FileExistsError, PermissionError: as they say. TypeError: an option that the rule and the channel both need, and
        that is not bound. Otherwise as the rule.

    Warns:
        RmtllmfWarning: models whose matrices have nothing in common with the base's, as of `fuse`; with `mse` a number
        is given as `scale` that is more than 100 times the rms of a vector.

    Note:
        The result appears under its name only when it is complete. A run that was killed (not one that failed) goes on
        where it was when it is called again with the same arguments and files, before the next boot; so does one that
        was interrupted, or that the system failed (a full disk). Until then a ``.part`` and its journal lie beside the
        target. With a rule that is no rule of this package it begins anew.

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
        for index, path in enumerate(listed(finetuned)):
            opened.append(Checkpoint(path, f"finetuned[{index}]"))
        apart, rest = left_alone(origin, opened[1:], [], skip, mixed=mixed_dtypes)
        for model in opened[1:]:
            check_model(model, origin, apart, mixed=mixed_dtypes)
        options |= {"skip": rest} if rest else {}
        warn_unless_related(origin, opened[1:], apart)
        shared = Base(origin)
        vectors: list[Source] = [Difference(shared, model, model.label, apart) for model in opened[1:]]
        if mse is None:
            options |= {} if scale == "rms" else {"scale": scale}
            options |= {} if seed is None else {"seed": seed}
        else:
            seed = None if seed is None else seed_number(seed)
            _check_own_seed(rule)
            errors = mse_of(mse, len(vectors))
            vectors = noisy(vectors, errors, scale, seed)
            channel = {"mse": errors, "scale": scale if isinstance(scale, str) else float(scale), "seed": seed}
        dtype = checked_dtype(dtype)
        request = {
            "rule": _described(rule),
            "options": {name: _described(value) for name, value in sorted(options.items())},
            "dtype": str(dtype),
            "apart": sorted(apart),
            "channel": channel,
            "versions": [torch.__version__, sys.modules["rmtllmf"].__version__],
        }
        sink = Files(opened, out, request, dtype)
        try:
            run(rule, vectors, Applied(shared, sink, dtype), options | ({"progress": True} if progress else {}))
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


def _check_own_seed(rule: Callable[..., Tensors]) -> None:
    try:
        own = inspect.signature(rule).parameters.get("seed")
    except (TypeError, ValueError):
        return
    if own is not None and own.kind is own.KEYWORD_ONLY and own.default is own.empty:
        name = name_of(rule)
        raise TypeError(
            f"seed: with mse it is the channel's, and {name} needs one of its own; bind it: functools.partial({name}, "
            "seed=...)"
        )


def _described(value: Any) -> Any:
    """The same text for the same value in another process; never twice the same where that cannot be told."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return repr(value)
    if isinstance(value, np.generic):
        return repr(value.item())
    if isinstance(value, np.ndarray) and value.dtype != object:
        value = torch.from_numpy(np.ascontiguousarray(value))
    if isinstance(value, torch.Tensor):  # there may be one for each of the model's
        entries = full(value.detach()).cpu().contiguous().reshape(-1)
        return [str(value.dtype), list(value.shape), hashlib.sha256(entries.view(torch.uint8).numpy().data).hexdigest()]
    if isinstance(value, Mapping):
        return [[_described(key), _described(item)] for key, item in value.items()]
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, functools.partial) and is_ours(value):
        return [_described(value.func), _described(value.args), _described(value.keywords)]
    if callable(value) and is_ours(value):
        return f"{value.__module__}.{value.__qualname__}"
    return secrets.token_hex(16)  # a function may have changed, a generator has moved on
