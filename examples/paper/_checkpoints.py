"""The one checkpoint of a fine-tuning run: a safetensors file that is replaced as a whole; nothing is unpickled.

The metadata say what the run is (a mapping of name -> number or string) and after which step it was written. The file
is written beside, brought to disk, and only then takes its name: whenever a run is killed, there is either no
checkpoint or a complete one.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rmtllmf._safetensors import TensorFile
from rmtllmf._untrusted import brief, naming, parsed
from rmtllmf.errors import InputError

NAME = "checkpoint.safetensors"
_PART = f".{NAME}.part"  # what a killed run leaves of it is overwritten by the next checkpoint
_VERSION = 1
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


class Checkpoint(NamedTuple):
    """What `read` found: the number of `steps` that were taken, and `tensors` on the CPU."""

    steps: int
    tensors: dict[str, Tensor]


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The folder, made where there is none, belongs to this process; an error if it is another's."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"checkpoint: expected a folder, {str(folder)!r} is a file")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on this system: two runs in one folder are the caller's to avoid
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"checkpoint: another run is writing to {str(folder)!r}; give each its own") from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(descriptor)


def fingerprint(module: nn.Module) -> str:
    """A digest of all parameters and buffers: names, shapes, dtypes, bits, and which are trained."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype), tensor.requires_grad)).encode())
        digest.update(_memory(tensor))
    return digest.hexdigest()[:32]


def write(folder: Path, run: Mapping[str, Any], steps: int, tensors: Mapping[str, Tensor]) -> None:
    """Replace the checkpoint; an ``OSError`` leaves the old one as it was."""
    note = json.dumps({"version": _VERSION, "steps": steps, "run": dict(run)})
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "finetune": note}}
    # the format wants wide entries first, so that all are aligned
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    at = 0
    for name in names:
        tensor = tensors[name]
        stop = at + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, stop]}
        at = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = folder / _PART
    try:
        with naming(part), open(part, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in names:
                file.write(_memory(tensors[name]))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, folder / NAME)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _sync_folder(folder)


def read(folder: Path, run: Mapping[str, Any]) -> Checkpoint | None:
    """The checkpoint in `folder`, None where there is none; an error if it is of another run, or no checkpoint."""
    path = folder / NAME
    if not path.exists():
        return None
    instead = "pass another folder, or remove the file to start again"
    try:
        file = TensorFile(path, "checkpoint")
        note = parsed(file.metadata.get("finetune", "null"), "its metadata are no JSON")
        tensors = dict(file)
        file.close()
    except InputError as error:
        raise InputError(f"checkpoint: {str(path)!r} is damaged ({error}); {instead}") from None
    if not isinstance(note, dict) or note.get("version") != _VERSION:
        raise InputError(f"checkpoint: {str(path)!r} was not written by this function; {instead}")
    found, steps = note.get("run"), note.get("steps")
    if not isinstance(found, dict) or type(steps) is not int or steps < 0:
        raise InputError(f"checkpoint: {str(path)!r} is damaged (its metadata say {brief(note)}); {instead}")
    names = [name for name in {**found, **run} if found.get(name) != run.get(name)]
    if names:
        differing = "; ".join(f"{name} was {brief(found.get(name))}, now {run.get(name)!r}" for name in names)
        raise InputError(f"checkpoint: {str(path)!r} is of another run: {differing}; {instead}")
    return Checkpoint(steps, tensors)


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be spread over processes, as a whole; all processes must ask for it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, tied ones once, not copied."""
    buffers = dict(module.named_buffers())
    kept = module.state_dict(keep_vars=True).keys() & buffers.keys()
    return dict(module.named_parameters()) | {name: buffers[name] for name in sorted(kept)}


def tensors_of(module: nn.Module, optimizer: torch.optim.Optimizer | None, *, keep: bool) -> dict[str, Tensor]:
    """What a checkpoint holds, on the CPU; gathered one by one, and dropped on processes that do not `keep` it."""
    entries = {f"model.{name}": tensor for name, tensor in _state(module).items()}
    if optimizer is not None:
        for name, parameter in module.named_parameters():
            for what, value in optimizer.state.get(parameter, {}).items():
                entries[f"adamw.{what}.{name}"] = value
    result = {}
    for name, tensor in entries.items():
        gathered = whole(tensor.detach())
        if keep:
            result[name] = gathered.cpu()
    return result


@torch.no_grad()
def put(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """The module takes the values of `tensors_of`."""
    for name, target in _state(module).items():
        target.copy_(_fitting(tensors.get(f"model.{name}"), f"model.{name}", target))


def put_moments(module: nn.Module, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The optimizer goes on where it was, spread as the module is."""
    for name, parameter in module.named_parameters():
        for what in ("step", "exp_avg", "exp_avg_sq"):
            found = tensors.get(f"adamw.{what}.{name}")
            if found is None:  # frozen, or not used by the encoder
                continue
            _fitting(found, f"adamw.{what}.{name}", torch.empty(()) if what == "step" else parameter)
            if what != "step" and hasattr(parameter, "full_tensor"):
                from torch.distributed.tensor import distribute_tensor

                value = distribute_tensor(found.to(parameter.device), parameter.device_mesh, parameter.placements)
            else:
                value = found.clone() if what == "step" else torch.empty_like(parameter).copy_(found)
            optimizer.state[parameter][what] = value


def _fitting(found: Tensor | None, name: str, target: Tensor) -> Tensor:
    """An error unless it has the shape of the tensor whose place it takes: it would be repeated in silence."""
    if found is None or found.shape != target.shape:
        shape = None if found is None else tuple(found.shape)
        raise InputError(f"checkpoint: {name!r} has the shape {shape}; expected {tuple(target.shape)}")
    return found


def _memory(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _sync_folder(folder: Path) -> None:
    """The new name is on disk, too; where folders cannot be opened, the system does that in its own time."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
