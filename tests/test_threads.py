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
