"""Run as a script: atheris damages valid files of every kind, and has the library read them.

    python tests/fuzz/harness.py CORPUS_FOLDER -max_total_time=600

An input is the choice of a reader, of one of its files, and of the damage. To see what an input of a crash did:
``python tests/fuzz/harness.py crash-...``.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import atheris

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples")]

import torch  # noqa: E402, F401 (before the rest, which is instrumented)

with atheris.instrument_imports(include=["rmtllmf", "paper"]):
    from helpers.mutations import Choices, damaged
    from helpers.readers import READERS, REFUSALS, files


def prepared():
    """(reader, folder, content of its valid files) of all readers."""
    result = []
    for reader in READERS.values():
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        reader.make(folder)
        result.append((reader, folder, {path: path.read_bytes() for path in files(folder)}))
    return result


os.fsync = lambda file: None  # what matters is what is read
PREPARED = prepared()


def once(data: bytes) -> None:
    choices = Choices(data)
    reader, folder, valid = choices.of(PREPARED)
    path = choices.of(sorted(valid))
    path.write_bytes(damaged(valid[path], choices))
    try:
        reader.read(folder)
    except REFUSALS:
        pass
    finally:
        path.write_bytes(valid[path])
    assert files(folder) == sorted(valid), "files were left or removed"


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if not argument.startswith("-") and not os.path.exists(argument):
            os.makedirs(argument)  # the corpus, to begin with none
    atheris.Setup(sys.argv, once)
    atheris.Fuzz()
