"""Work shared out between threads: torch and its linear algebra release the interpreter lock while they calculate.

As many threads as torch would use itself (``torch.set_num_threads``, ``OMP_NUM_THREADS``), and inside each of them
torch calculates on one: sums are taken in the same order for any number of threads, so the bits are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")

_lock = threading.Lock()
_running = 0  # calls of `share_out` at this moment, of all threads
_outside = 1  # what torch's number of threads was before the first of them
_mine = threading.local()  # .working: this thread is inside of one of them


def share_out(worker: Callable[[], Callable[[Item], None]], items: Iterable[Item], *, alone: bool = False) -> None:
    """Call ``worker()`` once a thread, and what it returns on every item of `items`, each on some thread.

    Args:
        worker: makes the function that is called on items; buffers made inside belong to one thread.
        items: handed out in order; a generator is closed in the end, however that comes.
        alone: on this thread only (for a GPU, whose work is queued anyway, or for collective communication).

    Gradients and autocast are off inside. An exception ends the work, and is raised. A call from inside `worker`
    stays on its thread.
    """
    inference = torch.is_inference_mode_enabled()
    queue, lock, stop = iter(items), threading.Lock(), threading.Event()

    def take() -> Iterator[Item]:
        while not stop.is_set():
            with lock:
                try:
                    item = next(queue)
                except StopIteration:
                    return
            yield item

    def run() -> None:
        nested, _mine.working = getattr(_mine, "working", False), True
        torch.set_num_threads(1)
        try:
            # torch keeps these for each thread
            with torch.inference_mode(inference), torch.no_grad(), _as_written():
                work = worker()
                for item in take():
                    work(item)
        except BaseException:
            stop.set()
            raise
        finally:
            _mine.working = nested

    with _closed(queue), _threads_restored() as threads:
        if alone or threads == 1:
            run()
            return
        with ThreadPoolExecutor(threads, thread_name_prefix="rmtllmf") as pool:
            futures = [pool.submit(run) for _ in range(threads)]
            try:
                for future in futures:
                    future.result()
            finally:
                stop.set()


@contextmanager
def _closed(items: Iterator[Item]) -> Iterator[None]:
    try:
        yield
    finally:
        if isinstance(items, Generator):
            items.close()


@contextmanager
def _as_written() -> Iterator[None]:
    """Without autocast, which would calculate in half precision on this thread and not on others."""
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _threads_restored() -> Iterator[int]:
    """The number of threads to use, which is torch's again in the end.

    torch keeps the number for each thread, and in the process for threads to come (and for its linear algebra): while
    another thread is in here, the latter is not the user's.
    """
    global _running, _outside
    if getattr(_mine, "working", False):
        yield 1
        return
    with _lock:
        if not _running:
            _outside = torch.get_num_threads()
        _running += 1
        threads = _outside
    try:
        yield threads
    finally:
        with _lock:
            _running -= 1
            torch.set_num_threads(threads)
