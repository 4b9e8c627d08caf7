"""The chunks that threads transmit: the bits of one thread, in memory of the caller too, in every mode of autograd."""

import math

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal
from helpers.transmitted import USERS, same_bits
from rmtllmf._state import inner_product
from rmtllmf.channel import lmmse, transmit
from rmtllmf.channel._scale import scales_of
from rmtllmf.taskvec import TaskVector


def odd_vectors(dtype=torch.float32):
    """Odd lengths, an empty, a tied, a transposed and two carried entries; several chunks."""
    sent = []
    for q in range(USERS):
        source = torch.Generator().manual_seed(q)
        shapes = {"a": (3,), "b": (301, 257), "c": (100_001,), "e": (0, 3), "f": (1,), "n.running_mean": (4,)}
        vector = {key: (0.01 * torch.randn(shape, generator=source)).to(dtype) for key, shape in shapes.items()}
        turned = torch.randn(130, 70, generator=source).to(dtype).T
        sent.append({**vector, "tied": vector["b"], "turned": turned, "steps": torch.tensor(3)})
    return sent


@pytest.mark.parametrize("scale", ["rms", "peak", 0.013])
@pytest.mark.parametrize("estimator", ["additive", "mmse", "unbiased"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_threads_and_autograd_give_the_same_bits(mismatched, dtype, estimator, scale):
    """The chunks of all threads, for all ways to mix noise, against the plain operations that autograd follows."""
    sent = odd_vectors(dtype)
    blocks = np.array([[0.01, 0.1, 0.9], [0.5, 0.05, 0.0], [0.2, 0.2, 0.2]])
    fading = lmmse(complex_normal(np.random.default_rng(5), 2, 4, USERS), 0.5, np.eye(4), designed_for=0.1 * np.eye(4))
    threads = torch.get_num_threads()
    for reception in (blocks, mismatched, fading):
        followed = [
            {key: value.clone().requires_grad_(value.is_floating_point()) for key, value in vector.items()}
            for vector in sent
        ]
        for vector in followed:
            vector["tied"] = vector["b"]
        plain = transmit(followed, reception, seed=7, estimator=estimator, scale=scale)
        assert plain[0]["c"].requires_grad
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert same_bits(plain, transmit(sent, reception, seed=7, estimator=estimator, scale=scale))
                assert torch.get_num_threads() == count
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_scales_have_the_bits_of_one_thread(threads):
    sent = odd_vectors()
    keys = ["a", "b", "c", "turned"]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        flat = [{key: vector[key].reshape(-1) for key in keys} for vector in sent]
        found = scales_of(sent, flat, keys, "tensor_rms", ["v"] * USERS)
        peaks = scales_of(sent, flat, keys, "tensor_peak", ["v"] * USERS)
    finally:
        torch.set_num_threads(before)
    for q, vector in enumerate(sent):
        for key in keys:
            assert found[q][key] == math.sqrt(inner_product(vector[key], vector[key]) / vector[key].numel())
            assert peaks[q][key] == float(vector[key].abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_out_is_what_the_result_is_made_of(mismatched, dtype):
    sent = odd_vectors(dtype)
    fresh = transmit(sent, mismatched, seed=3)
    out = [{key: torch.full_like(value, 77) for key, value in vector.items()} for vector in sent]
    out[1]["tied"] = out[1]["b"]
    out[2]["c"] = torch.empty(100_001, 2, dtype=dtype)[:, 1]  # not contiguous
    got = transmit(sent, mismatched, seed=3, out=out)
    assert same_bits(fresh, got)
    assert same_bits(fresh, out)
    for place, result in zip(out, got, strict=True):
        assert all(result[key].data_ptr() == place[key].data_ptr() for key in place)
    assert same_bits(fresh, transmit(sent, mismatched, seed=3, out=out))  # once more into the same


def test_out_may_be_task_vectors_or_parts_of_one_memory(vectors):
    fresh = transmit(vectors, 0.1, seed=3)
    out = [vector * 0.0 for vector in vectors]
    got = transmit(vectors, 0.1, seed=3, out=out)
    assert all(isinstance(vector, TaskVector) for vector in got)
    assert same_bits(fresh, got)
    assert got[0]["conv1.weight"].data_ptr() == out[0]["conv1.weight"].data_ptr()
    memory = torch.empty(USERS, sum(value.numel() for value in vectors[0].values()))
    lengths = [value.numel() for value in vectors[0].values()]
    out = [
        {key: part.view(value.shape) for (key, value), part in zip(vectors[0].items(), row.split(lengths), strict=True)}
        for row in memory
    ]
    assert same_bits(fresh, transmit(vectors, 0.1, seed=3, out=out))
    held = [{key: value.clone().requires_grad_() for key, value in vector.items()} for vector in vectors]
    with torch.no_grad():
        assert same_bits(fresh, transmit(held, 0.1, seed=3, out=out))


def test_inference_mode_reaches_all_threads(vectors):
    fresh = transmit(vectors, 0.1, seed=3)
    with torch.inference_mode():
        got = transmit(vectors, 0.1, seed=3)
        assert got[0]["conv1.weight"].is_inference()
    assert same_bits(fresh, got)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:FutureWarning")  # of torch's own making
def test_forward_derivatives_pass():
    sent = torch.linspace(-1, 1, 100_001)
    with torch.autograd.forward_ad.dual_level():
        (got,) = transmit([{"w": torch.autograd.forward_ad.make_dual(sent, sent)}], 0.1, seed=0, scale=1.0)
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(got["w"]).tangent, sent)
