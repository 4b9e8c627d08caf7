"""Work shared out between threads: all of it is done, errors arrive, and torch is left as it was."""

import threading

import pytest
import torch

from rmtllmf._threads import share_out


@pytest.fixture(params=[1, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


def test_every_item_once_and_torch_calculates_on_one_thread_inside(threads):
    done, workers, inside = [], [], set()

    def worker():
        workers.append(threading.get_ident())

        def work(item):
            inside.add((torch.get_num_threads(), torch.is_grad_enabled()))
            done.append(item)

        return work

    share_out(worker, range(100))
    assert sorted(done) == list(range(100))
    assert inside == {(1, False)}
    assert 1 <= len(workers) <= threads
    share_out(worker, iter("ab"), alone=True)
    assert workers[-1] == threading.get_ident()
    assert done[-2:] == ["a", "b"]


def test_the_first_error_arrives_and_stops_the_others(threads):
    done = []

    def work(item):
        if item == 5:
            raise KeyError("five")
        done.append(item)

    with pytest.raises(KeyError, match="five"):
        share_out(lambda: work, range(100_000))
    assert len(done) < 100_000


def test_inference_mode_goes_along(threads):
    with torch.inference_mode():
        target = torch.zeros(10)
        share_out(lambda: lambda item: target[item].fill_(1), range(10))
        assert target.sum() == 10


def test_autocast_is_off_inside(threads):
    kinds = set()
    one = torch.ones(2, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        share_out(lambda: lambda item: kinds.add((one @ one).dtype), range(20))
        assert (one @ one).dtype == torch.bfloat16
    assert kinds == {torch.float32}


def test_a_call_inside_a_worker_stays_on_its_thread(threads):
    pairs = []

    def work(item):
        me = threading.get_ident()
        share_out(lambda: lambda inner: pairs.append((me, threading.get_ident())), range(3))
        assert torch.get_num_threads() == 1

    share_out(lambda: work, range(10))
    assert len(pairs) == 30
    assert all(outer == inner for outer, inner in pairs)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_whatever_is_raised_the_number_of_threads_is_restored(threads, error):
    def work(item):
        raise error

    with pytest.raises(error):
        share_out(lambda: work, range(10))
    # the fixture looks at this thread; here is one to come
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [threads]


def test_calls_from_several_threads_at_once_leave_the_number_of_threads(threads):
    started, go_on, inside = threading.Event(), threading.Event(), []

    def wait(item):
        started.set()
        assert go_on.wait(30)

    first = threading.Thread(target=lambda: share_out(lambda: wait, range(1)))
    first.start()
    assert started.wait(30)

    def second():
        share_out(lambda: lambda item: inside.append(torch.get_num_threads()), range(10))
        go_on.set()
        first.join()
        share_out(lambda: lambda item: None, range(10))
        inside.append(torch.get_num_threads())

    other = threading.Thread(target=second)  # new to torch, which is set to one thread at this moment
    other.start()
    other.join()
    assert inside == [1] * 10 + [threads]


def test_a_generator_is_closed_before_an_error_arrives(threads):
    """It may be a progress bar."""
    ends = []

    def items():
        try:
            yield from range(100)
        finally:
            ends.append("closed")

    with pytest.raises(ZeroDivisionError):
        share_out(lambda: lambda item: 1 / (item - 5), items())
    assert ends == ["closed"]
    share_out(lambda: lambda item: None, items())
    assert ends == ["closed"] * 2
