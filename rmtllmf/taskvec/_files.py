"""Task vectors on disk, one or several: safetensors with metadata, written atomically, ties remembered."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Hashable

import torch
from torch import Tensor

from .._state import Tensors, identity
from ..errors import InputError

_KIND = "task_vector"
_VERSION = "1"


def save_tensors(tensors: Tensors, path: str | os.PathLike[str], *, kind: str = _KIND) -> None:
    """Write to a temporary file beside `path`, then rename; `kind` says what the tensors are."""
    from safetensors.torch import save_file

    target = _checked(path)
    stored: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    seen: dict[Hashable, str] = {}
    storages: set[int] = set()
    for key, tensor in tensors.items():
        original = seen.setdefault(identity(tensor), key)
        if original != key:
            tied[key] = original
            continue
        value = tensor.detach().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != value.numel() * value.element_size():
            value = value.clone()  # a view of a larger or shared memory; the format stores whole ones
        storages.add(value.untyped_storage().data_ptr())
        stored[key] = value
    metadata = {"rmtllmf": kind, "version": _VERSION, "tied": json.dumps(tied)}
    folder, name = os.path.split(target)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # as the umask has it
    try:
        save_file(stored, temporary, metadata)
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def load_tensors(
    path: str | os.PathLike[str], device: torch.device | str, *, kind: str = _KIND, writer: str = "TaskVector.save"
) -> dict[str, Tensor]:
    """What `save_tensors` wrote as `kind`, ties included; an error for any other safetensors file."""
    from safetensors import SafetensorError, safe_open

    source = _checked(path)
    if not os.path.isfile(source):
        raise FileNotFoundError(f"path: there is no file {source!r}")
    try:
        with safe_open(source, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("rmtllmf") != kind:
                hint = "; for a whole model use TaskVector.between(base, path)" if kind == _KIND else ""
                raise InputError(f"path: {source!r} holds no {kind.replace('_', ' ')} written by {writer}{hint}")
            if metadata.get("version") != _VERSION:
                raise InputError(f"path: {source!r} is of version {metadata.get('version')!r}; expected {_VERSION!r}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError as error:
        raise InputError(f"path: {source!r} is no safetensors file ({error})") from None
    try:
        tied = dict(json.loads(metadata.get("tied", "{}")).items())
        return tensors | {key: tensors[original] for key, original in tied.items() if key not in tensors}
    except (ValueError, AttributeError, KeyError, TypeError):
        raise InputError(f"path: {source!r} is damaged: its ties {metadata.get('tied')!r} make no sense") from None


def _checked(path: str | os.PathLike[str]) -> str:
    name = os.fspath(path)
    if not isinstance(name, str) or not name.endswith(".safetensors"):
        raise InputError(f"path: expected a path that ends in .safetensors, got {name!r}")
    return name
