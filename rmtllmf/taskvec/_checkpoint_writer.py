"""A safetensors checkpoint written piece by piece, atomically, so that a run that was killed can go on.

Everything goes to a file (folder) with the ending ``.part`` beside the target, which takes its name at the end. A
journal beside it says what it is a part of, and which tensors are complete; it counts only for the same request, on
the same boot of the same machine: what a killed process has written is in the system's cache, and survives it.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import stat
import threading
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from .._model_files import checked_path
from .._safetensors import NAMES, header_of
from .._state import overflows
from .._untrusted import naming, opened
from ..errors import InputError, NonFiniteError
from ._beside import CONFIG, beside, config_in
from ._checkpoint import Checkpoint
from ._journal import NO_LINK, boot, locked, names
from ._sinks import Storage
from ._sources import Source, Spec

_COPY = 1 << 22  # bytes copied at once
_FLUSH = 1 << 26  # bytes after which the disk is set to work, while the rest is still calculated
_OTHER_FILES = (".bin", ".ckpt", ".gguf", ".h5", ".json", ".npz", ".onnx", ".pkl", ".pt", ".pth", ".safetensor", ".sft")


class Files(Storage):
    """Writes a model of the names and shapes of `base`: what is fused, piece by piece, and the rest as it is there.

    The fused entries take the dtype that they are opened with, and a configuration beside them says `dtype` if there is
    one. `models` are all that is read, the base first.
    """

    def __init__(
        self,
        models: Sequence[Checkpoint],
        out: str | os.PathLike[str],
        request: dict[str, Any],
        dtype: torch.dtype | None = None,
    ) -> None:
        self.models, self.base = models, models[0]
        self.out = checked_path(out, "out")
        self.single = self.out.name.endswith(".safetensors")
        if not self.single and (self.out.suffix.lower() in _OTHER_FILES or self.out.is_file()):
            raise InputError(f"out: expected a path that ends in .safetensors, or a folder, got {str(self.out)!r}")
        if self.single and self.out.is_dir():
            raise InputError(f"out: {str(self.out)!r} is a folder; expected a file, or a folder that does not exist")
        if not self.single and self.out.exists():
            raise FileExistsError(f"out: the folder {str(self.out)!r} exists; a folder cannot be replaced atomically")
        if not self.out.parent.is_dir():
            raise FileNotFoundError(f"out: there is no folder {str(self.out.parent)!r}")
        for model in models if self.out.exists() else ():
            if any(self.out.samefile(file) for file in model.model.files):
                raise InputError(f"out: is {model.label} itself, which must not be written to")
        self.folder = None if self.single else self.base.model.folder
        self.beside = [] if self.folder is None else beside(self.folder, "base")
        self.config = None if self.folder is None or dtype is None else config_in(self.folder, dtype, "base")
        self.part = self.out.with_name(f".{self.out.name}.part")
        self.journal = self.out.with_name(f".{self.out.name}.part.journal")
        self.request = request | {"files": [model.fingerprint() for model in models], "boot": boot()}
        self._finished: set[str] = set()
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()
        self._local = threading.local()
        self.descriptors: list[int] = []
        self._flusher: _Flusher | None = None
        self._log: Any = None

    @property
    def finished(self) -> Container[str]:
        return self._finished

    def open(self, specs: Mapping[str, Spec], alias: Mapping[str, str], sources: list[Source]) -> None:
        self.specs = {key: specs.get(key, spec) for key, spec in self.base.specs.items()}
        self.fused = set(specs)
        self._log = locked(self.journal)
        layout = self._layout()
        request = json.dumps(self.request | {"specs": {k: [NAMES[s.dtype], s.shape] for k, s in self.specs.items()}})
        self._log.seek(0)
        lines = self._log.read().split("\n")
        finished = names(lines[1:-1], self.fused)  # the last may be cut short
        going_on = lines[0] == request and self.request["boot"] is not None and self._parts_are_there(layout)
        if going_on and finished is not None:
            self._log.truncate(sum(len(line.encode()) + 1 for line in lines[:-1]))
            self._finished = finished
        else:
            self._begin(request, layout)
        paths = [self._path(name) for name, _, _ in layout]
        for path in paths:
            self.descriptors.append(os.open(path, os.O_RDWR | NO_LINK))
        self._flusher = _Flusher(self.descriptors)
        self._left = {key: self.specs[key].size for key in self.fused}
        for key in self.fused:
            if not self._left[key]:
                self._complete(key)

    def _layout(self) -> list[tuple[str, bytes, int]]:
        """(name, header, size) of every file; notes where every tensor goes."""
        self.places: dict[str, tuple[int, int]] = {}
        groups = [sorted(self.base.specs)] if self.single else [[] for _ in self.base.model.files]
        if not self.single:
            for key in sorted(self.base.specs):
                groups[self.base.model.places[key].file].append(key)
        result = []
        for number, keys in enumerate(groups):
            kinds = {key: (self.specs[key].dtype, self.specs[key].shape) for key in keys}
            header, places = header_of(kinds, {"format": "pt"})
            self.places |= {key: (number, place.start) for key, place in places.items()}
            name = self.out.name if self.single else self.base.model.files[number].name
            result.append((name, header, max((place.stop for place in places.values()), default=len(header))))
        return result

    def _path(self, name: str) -> Path:
        return self.part if self.single else self.part / name

    def _parts_are_there(self, layout: list[tuple[str, bytes, int]]) -> bool:
        if not self.single and self.part.is_symlink():
            return False
        for name, _, size in layout:
            try:
                status = os.lstat(self._path(name))
            except OSError:
                return False
            # neither a link nor a second name of a file that is somebody else's
            if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1 or status.st_size != size:
                return False
        return True

    def _begin(self, request: str, layout: list[tuple[str, bytes, int]]) -> None:
        self._log.seek(0)
        self._log.truncate()  # first: it must never stand beside parts that it is not about
        _remove(self.part)
        if not self.single:
            self.part.mkdir()
        for name, header, size in layout:
            with naming(self._path(name)), open(self._path(name), "xb") as file:
                file.write(header)
                file.truncate(size)
        self._note(request)

    def put(self, key: str, start: int, values: Tensor) -> None:
        spec, count = self.specs[key], len(values)
        values = values.detach().to("cpu")
        if spec.dtype != values.dtype:
            stage = getattr(self._local, "stage", None)
            if stage is None or len(stage) < count or stage.dtype != spec.dtype:
                stage = self._local.stage = torch.empty(count, dtype=spec.dtype, device="cpu")
            narrow = stage[:count].copy_(values)
            if overflows(values, narrow):
                raise NonFiniteError(f"the fused {key!r} overflows {spec.dtype}")
            values = narrow
        file, offset = self.places[key]
        self._write_bytes(file, offset + start * spec.dtype.itemsize, values.contiguous().view(torch.uint8))
        with self._lock:
            self._left[key] -= count
            if not self._left[key]:
                self._complete(key)

    def _complete(self, key: str) -> None:
        if key not in self._finished:
            self._note(json.dumps(key))

    def _note(self, line: str) -> None:
        with naming(self.journal):
            self._log.write(line + "\n")
            self._log.flush()

    def _write_bytes(self, file: int, offset: int, values: Tensor) -> None:
        memory: Any = memoryview(values.numpy())  # type: ignore[arg-type]
        with naming(self.part):
            while len(memory):
                count = os.pwrite(self.descriptors[file], memory, offset)
                memory, offset = memory[count:], offset + count
        if self._flusher is not None:
            self._flusher.written(values.numel())

    def done(self) -> dict[str, Any]:
        """Carry over what was not fused, make sure that all of it is on disk, and give it its name."""
        stage = torch.empty(_COPY, dtype=torch.uint8, device="cpu")
        for key, spec in self.base.specs.items():
            if key in self.fused:
                continue
            (source, begin, end), (file, offset) = self.base.model.places[key], self.places[key]
            for at in range(0, spec.size * spec.dtype.itemsize, _COPY):
                piece = stage[: min(_COPY, end - begin - at)]
                self.base.read_bytes(source, begin + at, piece)
                self._write_bytes(file, offset + at, piece)
        for model in self.models:
            model.check_unchanged()
        if self._flusher is not None:
            with naming(self.part):
                self._flusher.finish()
        if not self.single and len(self.base.model.files) > 1:
            total = sum(spec.size * spec.dtype.itemsize for spec in self.specs.values())
            shards = {key: self.base.model.files[file].name for key, (file, _) in sorted(self.places.items())}
            index = json.dumps({"metadata": {"total_size": total}, "weight_map": shards}, indent=2)
            self._put_beside("model.safetensors.index.json", io.BytesIO(index.encode()))
        if self.folder is not None:
            for path in self.beside:
                with open(opened(path, self.base.label, inside=self.folder), "rb") as content:
                    self._put_beside(str(path.relative_to(self.folder)), content)
        if self.config is not None:
            self._put_beside(CONFIG, io.BytesIO(self.config))
        os.replace(self.part, self.out)
        os.unlink(self.journal)
        return {}

    def _put_beside(self, name: str, content: IO[bytes]) -> None:
        """A small file beside the shards; an earlier run may have begun it."""
        path = self.part / name
        if path.parent.is_symlink():
            path.parent.unlink()
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        with naming(path), open(path, "xb") as file:
            shutil.copyfileobj(content, file)
            file.flush()
            os.fsync(file.fileno())

    def close(self, *, forget: bool) -> None:
        """Let go of the files; with `forget` remove what was written."""
        if self._flusher is not None:
            self._flusher.stop()
            forget = forget or self._flusher.error is not None  # what was read back is not what is on disk
        while self.descriptors:
            os.close(self.descriptors.pop())
        if self._log is not None:
            if forget:
                _remove(self.part)
                self.journal.unlink(missing_ok=True)
            with suppress(OSError):  # what did not get into the journal is calculated again
                self._log.close()


class _Flusher:
    """A thread that has the system write files to disk while they are written to, so that little is left to wait for.

    The system tells of a failure once, to whoever asks first, and takes what it could not write for written.
    """

    def __init__(self, descriptors: Sequence[int]) -> None:
        self.error: OSError | None = None
        self._descriptors = tuple(descriptors)
        self._waiting = 0
        self._stopped = False
        self._woken = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="rmtllmf-flush", daemon=True)
        self._thread.start()

    def written(self, count: int) -> None:
        """So many bytes more."""
        with self._woken:
            self._waiting += count
            if self._waiting >= _FLUSH:
                self._woken.notify()

    def finish(self) -> None:
        """Return when all is on disk; raise if something is not."""
        self.stop()
        self._flush()
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Return when no descriptor is in use any more."""
        with self._woken:
            self._stopped = True
            self._woken.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._woken:
                self._woken.wait_for(lambda: self._stopped or self._waiting >= _FLUSH)
                if self._stopped:
                    return
                self._waiting = 0
            self._flush()

    def _flush(self) -> None:
        try:
            for descriptor in self._descriptors:
                os.fsync(descriptor)
        except OSError as error:
            self.error = self.error or error


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
