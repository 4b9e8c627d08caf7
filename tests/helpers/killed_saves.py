"""Run as a script: a process that saves is killed before every line of what writes, and what is there is looked at."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "examples"), str(ROOT / "tests" / "load")]

from test_disk import WRITERS  # noqa: E402

KILLED = 9
FILES = ("taskvec/_files.py", "taskvec/_adapter_save.py", "rmtllmf/_safetensors.py")


def killed_before(line, save, folder):
    """Whether a process was killed before the `line`-th line that it came to."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    left = line

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.endswith(FILES):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os._exit(KILLED)  # nothing is flushed, nothing closed
        return trace

    sys.settrace(trace)
    save(folder, 2)
    os._exit(0)


def main(folder, what):
    torch.set_num_threads(1)
    save, load = WRITERS[what]
    line, seen = 0, {1.0: 0, 2.0: 0}
    while True:
        save(folder, 1)
        line += 1
        killed = killed_before(line, save, folder)
        (value,) = load(folder)
        seen[value] += 1
        if not killed:
            break
    assert value == 2.0
    print(line, seen[1.0], seen[2.0])


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
