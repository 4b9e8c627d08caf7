"""Models on disk: one safetensors file, or the shards that a Hugging Face index names, alone or in a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from ._safetensors import Entry, TensorFile
from ._untrusted import StrPath, brief, check_inside, read_json
from .errors import InputError

INDEX, WEIGHTS = ".safetensors.index.json", ".safetensors"
_PREFERRED = ("model.safetensors", "model.safetensors.index.json")  # the order of transformers
_ADAPTER_CONFIG = "adapter_config.json"
_PICKLED = (".bin", ".bin.index.json", ".ckpt", ".pkl", ".pt", ".pth")
_CONVERT = (
    "Convert it once: with transformers from_pretrained, then save_pretrained, or torch.load(..., weights_only=True), "
    "then safetensors.torch.save_file"
)
_OF_OURS = {  # what this library writes that is no model: what it is, and what reads it
    "task_vector": (
        "a task vector, written by TaskVector.save",
        "read it with TaskVector.load, which gives what every rule takes (fuse, too, in place of a fine-tuned model)",
    ),
    "masked_vectors": (
        "the task vectors of several models, written by MaskedVectors.save",
        "read it with MaskedVectors.load, which gives the vector of each task",
    ),
}


class Place(NamedTuple):
    """Where the bytes of a tensor lie: in which file, and from where to where."""

    file: int
    start: int
    stop: int


class ModelFiles(Mapping[str, Tensor]):
    """The tensors of a model on disk, each read when it is asked for. Files stay open until `close`.

    With `vectors` a file of `TaskVector.save` is read as well; else it is an error, because it is no model.

    Attributes:
        files: their paths.
        folder: what was asked for, if that was a folder.
        entries, places: of every tensor.
    """

    def __init__(self, path: StrPath, label: str, *, vectors: bool = False) -> None:
        self.label = label
        self.files, index = files_of(path, label)
        self.folder = Path(path) if Path(path).is_dir() else None
        inside = None if index is None and self.folder is None else self.files[0].parent
        self.entries: dict[str, Entry] = {}
        self.places: dict[str, Place] = {}
        self.stored: list[TensorFile] = []
        try:
            for number, file in enumerate(self.files):
                self.stored.append(TensorFile(file, label, inside=inside))
                if not vectors:
                    _check_kind(self.stored[-1])
                for key, entry in self.stored[-1].entries.items():
                    if key in self.entries:
                        other = self.files[self.places[key].file]
                        raise InputError(f"{label}: {key!r} is in {other.name!r} and in {file.name!r}")
                    self.entries[key] = entry
                    self.places[key] = Place(number, entry.start, entry.stop)
            if index is not None:
                self._check(index)
        except BaseException:
            self.close()
            raise

    def _check(self, index: Mapping[str, str]) -> None:
        held = {key: self.files[place.file].name for key, place in self.places.items()}
        for key in sorted({*index, *held}):
            if index.get(key) != held.get(key):
                raise InputError(
                    f"{self.label}: the index says that {brief(key)} is in {index.get(key)!r}; it is in "
                    f"{held.get(key)!r}"
                )

    def __getitem__(self, key: str) -> Tensor:
        return self.stored[self.places[key].file][key]

    def __contains__(self, key: object) -> bool:
        return key in self.entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    def check_unchanged(self) -> None:
        """Raise if something was written to a file since it was opened."""
        for file in self.stored:
            file.check_unchanged()

    def close(self) -> None:
        """Close the files; nothing can be read from them any more."""
        for file in self.stored:
            file.close()

    __eq__ = object.__eq__  # comparing tensors has no single answer
    __hash__ = object.__hash__


def load_model(path: StrPath, label: str, *, vectors: bool = False) -> dict[str, Tensor]:
    """All tensors of a model on disk, on the CPU."""
    files = ModelFiles(path, label, vectors=vectors)
    try:
        tensors = dict(files)
        files.check_unchanged()
    finally:
        files.close()
    return tensors


def checked_path(path: object, argument: str) -> Path:
    """A path, for sure."""
    if not isinstance(path, str | os.PathLike) or not isinstance(os.fspath(path), str):
        raise TypeError(
            f"{argument}: expected a path, got {type(path).__name__}; `fuse` is for models that are in memory"
        )
    if not os.fspath(path) or "\0" in os.fspath(path):
        raise InputError(f"{argument}: expected a path, got {os.fspath(path)!r}, which is no path")
    return Path(path)


def files_of(path: StrPath, label: str) -> tuple[list[Path], dict[str, str] | None]:
    """The files of a model, and name -> file name if an index says so."""
    where = checked_path(path, label)
    if where.is_dir():
        where = _in_folder(where, label)
    if not where.exists() and not where.name.endswith(_PICKLED):
        raise FileNotFoundError(
            f"{label}: there is no file or folder {str(where)!r}. Nothing is downloaded here: a model of the Hugging "
            "Face hub must be fetched before (hf download), and its folder given"
        )
    if where.name == "adapter_model.safetensors" and (where.parent / _ADAPTER_CONFIG).is_file():
        raise InputError(_is_an_adapter(where.parent, label))
    if where.name.endswith(INDEX):
        index = _index(where, label)
        return [where.parent / name for name in sorted(set(index.values()))], index
    if not where.name.endswith(WEIGHTS):
        raise InputError(
            f"{label}: expected a .safetensors file, a .safetensors.index.json or a folder with one of them, got "
            f"{str(where)!r}; nothing else is read, because it could hold code"
            + (f". {_CONVERT}" if where.name.endswith(_PICKLED) else "")
        )
    return [where], None


def _in_folder(folder: Path, label: str) -> Path:
    """The file or the index of a model's folder: what transformers takes, else the only one that there is."""
    indices, singles = sorted(folder.glob(f"*{INDEX}")), sorted(folder.glob(f"*{WEIGHTS}"))
    preferred = [folder / name for name in _PREFERRED if (folder / name).exists()]
    if not preferred and (folder / _ADAPTER_CONFIG).is_file():
        raise InputError(_is_an_adapter(folder, label))
    found = preferred[:1] or indices or singles
    if len(found) != 1:
        names = [file.name for file in [*indices, *singles]]
        pickled = [file.name for file in sorted(folder.iterdir()) if file.name.endswith(_PICKLED)]
        raise InputError(
            f"{label}: expected one .safetensors file or one .safetensors.index.json in {str(folder)!r}, found "
            f"{brief(names) if names else 'none'}"
            + (
                f", but {brief(pickled)}, which is not opened, because it could hold code. {_CONVERT}"
                if pickled and not names
                else ""
            )
            + ("; shards need their index" if len(singles) > 1 and not indices else "")
        )
    if found[0].name.endswith(INDEX):
        check_inside(found[0], folder, label)
    return found[0]


def _index(path: Path, label: str) -> dict[str, str]:
    content = read_json(path, label)
    index = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(index, dict):
        raise InputError(f"{label}: {str(path)!r} is no index of safetensors shards: it has no weight_map")
    for name in index.values():
        if not isinstance(name, str) or name != os.path.basename(name) or not name.endswith(WEIGHTS):
            raise InputError(
                f"{label}: the index names the shard {brief(name)}; expected the plain name of a file beside it"
            )
    for name, key in {name: key for key, name in index.items()}.items():
        if not os.path.exists(path.parent / name):
            raise FileNotFoundError(
                f"{label}: the shard {brief(name)} that the index names for {brief(key)} is missing"
            )
    if not index:
        raise InputError(f"{label}: {str(path)!r} names no tensors")
    return index


def _check_kind(file: TensorFile) -> None:
    kind = file.metadata.get("rmtllmf", "")
    if kind in _OF_OURS:
        what, how = _OF_OURS[kind]
        raise InputError(f"{file.label} is no model: it holds {what}; {how}")


def _is_an_adapter(folder: Path, label: str) -> str:
    return (
        f"{label}: {str(folder)!r} is an adapter, and no model: read it with adapter_vector({str(folder)!r}), which "
        "gives its task vector, for every rule and for `fuse`"
    )
