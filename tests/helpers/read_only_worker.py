"""Run as a script: all that writes is asked to write into a folder that may only be read; prints what came of it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers.writers import WRITERS
from rmtllmf.taskvec import fuse_files

NOBODY = 65534


def attempts(locked):
    """What happened to whoever wrote, and whether everything is as it was."""
    before = {path: path.read_bytes() for path in locked.rglob("*") if path.is_file()}
    base, tuned = locked / "0.safetensors", [locked / "1.safetensors"]
    calls = {name: lambda save=save: save(locked, 2) for name, (save, _) in WRITERS.items()}
    calls["fuse_files"] = lambda: fuse_files(base, tuned, locked / "out.safetensors")
    found = {}
    for name, call in calls.items():
        try:
            call()
            kind, message = "nothing", ""
        except Exception as error:
            kind, message = type(error).__name__, str(error)
        found[name] = (kind, message, {p: p.read_bytes() for p in locked.rglob("*") if p.is_file()} == before)
    return found


def main():
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    locked = folder / "locked"
    locked.mkdir()
    try:
        for save, load in WRITERS.values():
            save(locked, 1)
            load(locked)
        for seed in (0, 1):
            save_file({"w": torch.full((2,), float(seed))}, locked / f"{seed}.safetensors")
        fuse_files(locked / "0.safetensors", [locked / "1.safetensors"], locked / "out.safetensors")
        folder.chmod(0o755)
        for path in locked.rglob("*"):
            path.chmod(0o555 if path.is_dir() else 0o444)
        locked.chmod(0o555)
        sys.stdout.flush()
        child = os.fork()
        if not child:
            if os.getuid() == 0:
                os.setuid(NOBODY)
            print(json.dumps(attempts(locked)), flush=True)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        locked.chmod(0o755)
        for path in locked.rglob("*"):
            path.chmod(0o755)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
