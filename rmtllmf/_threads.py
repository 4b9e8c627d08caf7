"""Work shared out between threads: torch and its linear algebra release the interpreter lock while they calculate.

As many threads as torch would use itself (``torch.set_num_threads``, ``OMP_NUM_THREADS``), and inside each of them
torch calculates on one: sums are taken in the same order for any number of threads, so the bits are the same.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

Item = TypeVar("Item")


def share_out(worker: Callable[[], Callable[[Item], None]], items: Iterable[Item], *, alone: bool = False) -> None:
    """Call ``worker()`` once a thread, and what it returns on every item of `items`, each on some thread.

    Args:
        worker: makes the function that is called on items; buffers made inside belong to one thread.
        items: handed out in order.
        alone: on this thread only (for a GPU, whose work is queued anyway, or for collective communication).

    Gradients are off inside. The first exception ends the work, and is raised.
    """
    threads = 1 if alone else torch.get_num_threads()
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
        torch.set_num_threads(1)
        try:
            with torch.inference_mode(inference), torch.no_grad():  # torch keeps these for each thread
                work = worker()
                for item in take():
                    work(item)
        except BaseException:
            stop.set()
            raise

    with _threads_restored():
        if threads == 1:
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
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
