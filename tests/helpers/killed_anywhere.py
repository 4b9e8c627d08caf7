"""Run as a script: a fusion of files is killed before every line (or every n-th) of the writer, and goes on well.

A process of its own for all of it, because it forks, which threads do not survive.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from helpers.killed_at_a_line import KILLED, killed_before
from rmtllmf.taskvec import fuse, fuse_files

FIRST, SECOND = 0.3, 0.7  # two requests for one target
FILES = ("_checkpoint_writer.py", "_journal.py")


def killed_fusion(line, paths, out, scale):
    """Whether the fusion was killed before the `line`-th line of the writer that it comes to; 0: before renaming."""

    def work():
        if not line:
            os.replace = lambda *arguments: os._exit(KILLED)
        fuse_files(paths[0], paths[1:], out, scale=scale)

    return killed_before(line, FILES, work)


def check(found, scale, states):
    expected = fuse(states[0], states[1:], scale=scale)
    files = [found] if found.is_file() else sorted(found.glob("*.safetensors"))
    loaded = {key: tensor for file in files for key, tensor in load_file(file).items()}
    assert set(loaded) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(loaded[key], tensor), (key, scale)


def remove(out):
    shutil.rmtree(out) if out.is_dir() else out.unlink()


def main(folder, target, step):
    torch.set_num_threads(1)
    states = [{"a": torch.randn(3), "b": torch.randn(2, 2), "none": torch.ones(0), "n": torch.tensor(7)} for _ in "abc"]
    paths = [folder / f"{index}.safetensors" for index in range(3)]
    for state, path in zip(states, paths, strict=True):
        save_file(state, path)
    out, line, killed = folder / target, 0, True
    while killed:
        line += step
        for last in (FIRST, SECOND):
            assert killed_fusion(0, paths, out, FIRST)
            killed = killed_fusion(line, paths, out, SECOND)
            if out.exists():
                check(out, SECOND, states)
                remove(out)
            fuse_files(paths[0], paths[1:], out, scale=last)
            check(out, last, states)
            assert not list(folder.glob(".*")), line
            remove(out)
    print(f"killed before each of {line // step - 1} lines")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
