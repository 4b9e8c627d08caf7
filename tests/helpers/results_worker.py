"""Run as a script: one process that works on a file of results, or many of them killed at every line of the writer.

A process of its own for all of it, because it is killed, has little disk, or forks.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from paper.results import ProtocolError, Results, run

PROTOCOL = {"seeds": 2, "tasks": ["mnist", "svhn"], "uplink": {"users": 8, "power": 0.1}}


def key(row):
    return row["job"]


def opened(path, protocol=PROTOCOL):
    return Results(path, protocol, key=key)


def note(folder, text):
    """Append to a file at once, which survives being killed."""
    file = os.open(folder / "ran", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    os.write(file, f"{text}\n".encode())
    os.close(file)


def jobs(folder, count, delay=0.0, hang=None):
    """Every run of one is noted in the file `ran`; the one of number `hang` never ends."""

    def job(number):
        note(folder, f"job-{number}")
        time.sleep(3600 if number == hang else delay)
        return {"job": f"job-{number}", "accuracy": number / 7, "per_task": {"é": [1, None, 2.5] * (number % 3)}}

    return [(f"job-{number}", lambda number=number: job(number)) for number in range(count)]


def work(folder, options):
    if options.limit is not None:  # the system writes what fits, and then says that nothing does
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (options.limit, resource.RLIM_INFINITY))
    results = opened(folder / "results.jsonl")
    todo = jobs(folder, options.count, options.delay, options.hang)
    run(todo, results, rank=options.rank, world=options.world, poll=0.01, progress=False)
    assert all(name in results for name, _ in todo)


def create(folder, options):
    """Files that others create at the very same moment: each is of this process's protocol, or of another's."""
    won = 0
    for number in range(options.count):
        while time.time() < options.begin + number * 0.004:
            pass
        try:
            opened(folder / f"{number}.jsonl", PROTOCOL | {"seeds": options.rank if number % 2 else 2})
            won += number % 2
        except ProtocolError:
            assert number % 2
    print(won)


def in_a_child(function):
    """The exit status of a process that does this; negative if it was killed."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        function()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        os._exit(1)
    os._exit(0)


def killed(folder, options):
    """Killed before every line of the writer that is come to, or in the middle of a write, and gone on with."""
    path, ran = folder / "results.jsonl", folder / "ran"

    def whole():
        run(jobs(folder, options.count), opened(path), progress=False)

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def before_line(left):
        def trace(frame, event, argument):
            nonlocal left
            if not frame.f_code.co_filename.endswith("results.py"):
                return None
            if event == "line":
                left -= 1
                if not left:
                    die()
            return trace

        sys.settrace(trace)
        whole()

    def in_write(left):
        write = os.write

        def part(file, data):
            nonlocal left
            if data.startswith(b"{"):
                left -= len(data)
                if left < 0:
                    write(file, data[: left + len(data)])
                    die()
            return write(file, data)

        os.write = part
        whole()

    os.fsync = lambda file: None  # what a killed process has written is in the system's cache
    assert in_a_child(whole) == 0
    expected = path.read_bytes()
    for way in (before_line, in_write):
        step, status, stride = 0, -signal.SIGKILL, options.step * (1 if way is before_line else 7)
        while status:
            path.unlink()
            ran.unlink()
            status = in_a_child(lambda way=way, step=step: way(step + 1 if way is before_line else step))
            assert status in (0, -signal.SIGKILL), (way, step, status)
            left = path.read_bytes() if path.exists() else b""
            assert expected.startswith(left), (way, step)
            had, counted = max(0, left.count(b"\n") - 1), len(ran.read_text().split()) if ran.exists() else 0
            assert had <= counted <= had + 1, (way, step)  # a job that has run is on disk before the next begins
            assert in_a_child(whole) == 0, (way, step)
            assert path.read_bytes() == expected, (way, step)
            assert len(ran.read_text().split()) - counted == options.count - had, (way, step)
            step += stride
        print(f"{way.__name__}: killed {step // stride - 1} times")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=("work", "create", "killed"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("count", type=int)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--hang", type=int)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world", type=int, default=1)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--begin", type=float)
    parser.add_argument("--step", type=int, default=1)
    options = parser.parse_args()
    {"work": work, "create": create, "killed": killed}[options.what](options.folder, options)


if __name__ == "__main__":
    main()
