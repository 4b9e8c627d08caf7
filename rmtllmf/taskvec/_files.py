"""Task vectors on disk, one or several: safetensors with metadata, written atomically, ties remembered."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Hashable

import torch
from torch import Tensor

from .._safetensors import TensorFile, write
from .._state import Tensors, check_finite, identity
from .._untrusted import brief, parsed
from ..errors import InputError

_KIND = "task_vector"
_VERSION = "1"


def save_tensors(tensors: Tensors, path: str | os.PathLike[str], *, kind: str = _KIND) -> None:
    """Write to a temporary file beside `path`, then rename; `kind` says what the tensors are."""
    target = _checked(path)
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Hashable, str] = {}
    for key, tensor in tensors.items():
        original = seen.setdefault(identity(tensor), key)
        if original == key:
            stored[key] = tensor
        else:
            tied[key] = original
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # as the umask has it
    try:
        write(temporary, stored, {"rmtllmf": kind, "version": _VERSION, "tied": json.dumps(tied)})
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def load_tensors(
    path: str | os.PathLike[str], device: torch.device | str, *, kind: str = _KIND, writer: str = "TaskVector.save"
) -> dict[str, Tensor]:
    """What `save_tensors` wrote as `kind`, ties included; an error for any other safetensors file."""
    source = _checked(path)
    file = TensorFile(source, "path")
    try:
        metadata = file.metadata
        if metadata.get("rmtllmf") != kind:
            hint = "; for a whole model use TaskVector.between(base, path)" if kind == _KIND else ""
            raise InputError(f"path: {source!r} holds no {kind.replace('_', ' ')} written by {writer}{hint}")
        if metadata.get("version") != _VERSION:
            raise InputError(f"path: {source!r} is of version {brief(metadata.get('version'))}; expected {_VERSION!r}")
        tensors = {key: tensor.to(device) for key, tensor in file.items()}
        file.check_unchanged()
    finally:
        file.close()
    tied = parsed(metadata.get("tied", "{}"), f"path: {source!r} is damaged: its ties are no JSON")
    for key, original in tied.items() if isinstance(tied, dict) else [("", None)]:
        if key in tensors or not isinstance(original, str) or original not in file:
            raise InputError(f"path: {source!r} is damaged: its ties {brief(tied)} make no sense")
        tensors[key] = tensors[original]
    return tensors


def check_vector(tensors: Tensors, path: str | os.PathLike[str]) -> None:
    """Raise unless what was read from `path` is a task vector: floating-point entries, all of them finite."""
    label = f"path: {os.fspath(path)!r}"
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InputError(f"{label} is damaged: {key!r} is {tensor.dtype}; expected floating-point entries")
    if not tensors:
        raise InputError(f"{label} is damaged: expected at least one tensor, it holds none")
    check_finite(tensors, label)


def _checked(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        raise InputError(f"path: expected a path that ends in .safetensors, got {name!r}")
    return name
