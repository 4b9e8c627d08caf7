"""Run as a script: a process that saves is killed before every line of what writes, and what is there is looked at."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from helpers.killed_at_a_line import killed_before
from helpers.writers import WRITERS

FILES = ("taskvec/_files.py", "taskvec/_adapter_save.py", "rmtllmf/_safetensors.py")


def main(folder, what):
    torch.set_num_threads(1)
    save, load = WRITERS[what]
    line, seen = 0, {1.0: 0, 2.0: 0}
    while True:
        save(folder, 1)
        line += 1
        killed = killed_before(line, FILES, lambda: save(folder, 2))
        (value,) = load(folder)
        seen[value] += 1
        if not killed:
            break
    assert value == 2.0
    print(line, seen[1.0], seen[2.0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
