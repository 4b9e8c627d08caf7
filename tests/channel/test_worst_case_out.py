"""The worst covariance written into memory of the caller: the same bits, and every `out` that is refused."""

import sys

import numpy as np
import pytest
import torch

from helpers.oracles import complex_normal
from rmtllmf.channel import worst_case, worst_case_covariance
from rmtllmf.errors import InputError, ShapeError


def as_array(value):
    return value.resolve_conj().numpy() if isinstance(value, torch.Tensor) else value


def out_cases():
    """(id, H, P_N): a single draw, its general way, a small batch, and one that is solved in chunks."""
    rng = np.random.default_rng(14)
    return {
        "single": (complex_normal(rng, 5, 3), 2.0),
        "no jammer": (complex_normal(rng, 5, 3), 0.0),
        "batch": (complex_normal(rng, 4, 1, 5, 3), np.array([0.0, 2.0])),
        "chunks": (complex_normal(rng, 5000, 4, 2), rng.uniform(0.1, 3.0, 5000)),
    }


@pytest.mark.parametrize("single_precision", [False, True])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy], ids=["numpy", "torch"])
@pytest.mark.parametrize("case", ["single", "no jammer", "batch", "chunks"])
def test_out_holds_the_same_bits(case, kind, single_precision):
    H, P_N = out_cases()[case]
    H = kind(H.astype(np.complex64) if single_precision else H)
    expected = worst_case(H, 0.7, P_N, noise=0.1)
    shape = expected.covariance.shape
    plain = np.full(shape, np.nan, dtype=H.numpy().dtype if isinstance(H, torch.Tensor) else H.dtype)
    spaced = np.full((*shape[:-1], 2 * shape[-1]), np.nan, dtype=plain.dtype)
    odd = np.full(plain.size + 1, np.nan, dtype=plain.dtype)[1:].reshape(shape)  # another alignment
    outs = [kind(plain), kind(spaced)[..., ::2], kind(odd), kind(np.full_like(plain, np.nan).swapaxes(-1, -2))]
    if kind is torch.from_numpy:
        outs.append(torch.full(shape, torch.nan, dtype=H.dtype))  # torch's own alignment
        outs.append(torch.full(shape, torch.nan, dtype=H.dtype).mH)  # conjugated when read, and transposed
    for out in outs:
        found = worst_case(H, 0.7, P_N, noise=0.1, out=out)
        assert found.covariance is out
        for name in ("covariance", "sum_rate", "level"):
            np.testing.assert_array_equal(as_array(getattr(found, name)), as_array(getattr(expected, name)))
        assert found.iterations == expected.iterations
        out[...] = 0
        assert worst_case_covariance(H, 0.7, P_N, noise=0.1, out=out) is out
        np.testing.assert_array_equal(as_array(out), as_array(expected.covariance))
    if kind is np.asarray:
        np.testing.assert_array_equal(spaced[..., 1::2], np.nan)  # what lies between is left alone


def test_out_is_used_again():
    """Batch after batch, silent draws and draws of deficient rank among them; nothing of the last one is left."""
    rng = np.random.default_rng(15)
    out = np.empty((3000, 4, 4), dtype=complex)
    for _ in range(3):
        H = complex_normal(rng, 3000, 4, 2)
        H[::7] = 0
        H[1::7] = H[1::7, :, :1]
        worst_case(H, 1.0, 2.0, out=out)
        np.testing.assert_array_equal(out, worst_case_covariance(H, 1.0, 2.0))


def test_long_batches_are_written_into_out_directly(monkeypatch):
    """No memory of the size of the result is asked for; and what is fresh is as well aligned as torch's own."""
    module = sys.modules[worst_case.__module__]
    H = torch.from_numpy(out_cases()["chunks"][0])
    seen = []

    def recorded(*arguments):
        seen.append(fresh(*arguments))
        return seen[-1]

    fresh = module.fresh
    monkeypatch.setattr(module, "fresh", recorded)
    out = torch.empty(len(H), 4, 4, dtype=torch.complex128)
    address = out.data_ptr()
    worst_case(H, 1.0, 2.0, out=out)
    assert (len(seen), out.data_ptr()) == (0, address)
    C = worst_case_covariance(H, 1.0, 2.0)
    assert C.data_ptr() == seen[0].data_ptr()
    assert C.data_ptr() % 64 == 0


H_OUT = complex_normal(np.random.default_rng(16), 2, 3, 2)
BUFFER = np.empty((2, 3, 5), dtype=complex)
BUFFER[..., 3:] = H_OUT
WRONG_OUT = {
    "a list": (H_OUT, [[0j]], TypeError, "out: expected an array, like the inputs, got list"),
    "a tensor for arrays": (H_OUT, torch.empty(2, 3, 3, dtype=torch.complex128), TypeError, "out: .* got Tensor"),
    "an array for tensors": (torch.from_numpy(H_OUT), np.empty((2, 3, 3), complex), TypeError, "out: .* got ndarray"),
    "real": (H_OUT, np.empty((2, 3, 3)), TypeError, "out: .* got <f8"),
    "a real tensor": (torch.from_numpy(H_OUT), torch.empty(2, 3, 3), TypeError, "out: .*complex128.*got torch.float32"),
    "too coarse": (H_OUT, np.empty((2, 3, 3), np.complex64), TypeError, "out: .*torch.complex128.*got torch.complex64"),
    "too fine": (H_OUT.astype("c8"), np.empty((2, 3, 3), "c16"), TypeError, "complex64.*got torch.complex128"),
    "byte-swapped": (H_OUT, np.empty((2, 3, 3), ">c16"), TypeError, "out: expected native .* got >c16"),
    "too small": (H_OUT, np.empty((2, 2, 2), complex), ShapeError, r"out: .*\(2, 3, 3\), got \(2, 2, 2\)"),
    "would broadcast": (H_OUT[0], np.empty((2, 3, 3), complex), ShapeError, r"out: .*\(3, 3\), got \(2, 3, 3\)"),
    "expanded": (
        torch.from_numpy(H_OUT),
        torch.empty(3, 3, dtype=torch.complex128).expand(2, 3, 3),
        InputError,
        "out: .* entries share memory",
    ),
    "sliding": (
        torch.from_numpy(H_OUT),
        torch.empty(18, dtype=torch.complex128).as_strided((2, 3, 3), (6, 2, 1)),
        InputError,
        "out: .* entries share memory",
    ),
    "sparse": (
        torch.from_numpy(H_OUT),
        torch.zeros(2, 3, 3, dtype=torch.complex128).to_sparse(),
        TypeError,
        "out: expected a dense",
    ),
    "read-only": (H_OUT, np.broadcast_to(np.empty((3, 3), complex), (2, 3, 3)), InputError, "out: is read-only"),
    "backward": (H_OUT, np.empty((2, 3, 3), complex)[::-1], InputError, "out: strides"),
    "elsewhere": (
        torch.from_numpy(H_OUT),
        torch.empty(2, 3, 3, dtype=torch.complex128, device="meta"),
        InputError,
        "out: expected a tensor on cpu.*got one on meta",
    ),
    "half an entry off": (
        H_OUT,
        np.empty(37)[1:].view(complex).reshape(2, 3, 3),
        InputError,
        "out: starts 8 bytes off",
    ),
    "a byte off": (
        H_OUT[0],
        np.empty(145, np.uint8)[1:].view(complex).reshape(3, 3),
        InputError,
        "out: starts . bytes",
    ),
    "in H": (BUFFER[..., 3:], BUFFER[..., :3], InputError, "out: lies in the memory of H"),
    "in H, tensors": (
        torch.from_numpy(BUFFER)[..., 3:],
        torch.from_numpy(BUFFER)[..., :3],
        InputError,
        "out: lies in the memory of H",
    ),
    "with a gradient": (
        torch.from_numpy(H_OUT).requires_grad_(),
        torch.empty(2, 3, 3, dtype=torch.complex128),
        InputError,
        "out: .* has no gradient",
    ),
    "that is a parameter": (
        torch.from_numpy(H_OUT),
        torch.zeros(2, 3, 3, dtype=torch.complex128, requires_grad=True),
        InputError,
        "out: .* has no gradient",
    ),
}


@pytest.mark.parametrize(("H", "out", "error", "message"), WRONG_OUT.values(), ids=WRONG_OUT)
def test_wrong_out(H, out, error, message):
    for function in (worst_case, worst_case_covariance):
        with pytest.raises(error, match=message):
            function(H, 1.0, 2.0, noise=0.1, out=out)


def test_out_in_the_memory_of_the_powers():
    memory = torch.ones(2 * 3 * 3, dtype=torch.complex128)
    out, real = memory.view(2, 3, 3), torch.view_as_real(memory).flatten()
    H = torch.from_numpy(H_OUT)
    with pytest.raises(InputError, match="memory of P,"):
        worst_case(H, real[:4].view(2, 2), 2.0, out=out)
    with pytest.raises(InputError, match="memory of P_N,"):
        worst_case(H, 1.0, real[-2:], out=out)
    with pytest.raises(InputError, match="memory of noise,"):
        worst_case(H, 1.0, 2.0, noise=real[-2:], out=out)


def test_out_without_gradient_mode():
    H = torch.from_numpy(H_OUT).clone().requires_grad_()
    out = torch.empty(2, 3, 3, dtype=torch.complex128)
    with torch.no_grad():
        assert worst_case(H, 1.0, 2.0, out=out).covariance is out
    assert not out.requires_grad
    torch.testing.assert_close(out, worst_case_covariance(H, 1.0, 2.0).detach(), rtol=0, atol=0)


def test_out_of_inference_mode():
    H = torch.from_numpy(H_OUT)
    with torch.inference_mode():
        out = torch.empty(2, 3, 3, dtype=torch.complex128)
        assert worst_case(H, 1.0, 2.0, out=out).covariance is out
    with pytest.raises(InputError, match=r"out: was made in .*inference_mode"):
        worst_case(H, 1.0, 2.0, out=out)
