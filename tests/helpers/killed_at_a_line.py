"""A process that is killed before a line of its choice, as by a power cut: nothing is flushed, nothing closed.

For scripts alone, because it forks, which threads do not survive.
"""

from __future__ import annotations

import os
import sys

KILLED = 9


def killed_before(line, files, work):
    """Whether a process that does the work was killed before the `line`-th line of these files that it came to."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == KILLED
    left = line

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.endswith(files):
            return None
        if event == "line":
            left -= 1
            if left == 0:
                os._exit(KILLED)
        return trace

    sys.settrace(trace)
    work()
    os._exit(0)
