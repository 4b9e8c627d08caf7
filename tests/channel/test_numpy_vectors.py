"""NumPy vectors over the channel: the numbers of tensors, in arrays."""

import numpy as np
import pytest
import torch

from rmtllmf.channel import lmmse, transmit, transmit_sum, transmit_symbols
from rmtllmf.errors import InputError

H = np.eye(3, 2) + 0.3j
FLOOR = 0.1 * np.eye(3)

WAYS = {
    "transmit": lambda vectors, **kw: transmit(vectors, lmmse(H, 1.0, FLOOR), seed=0, **kw),
    "mse": lambda vectors, **kw: transmit(vectors, np.array([0.1, 0.2]), seed=0, **kw),
    "sum": lambda vectors, **kw: [transmit_sum(vectors, lmmse(H, 1.0, FLOOR), seed=0, **kw)],
    "analog": lambda vectors: transmit_symbols(vectors, H, 1.0, FLOOR, seed=0, modulation="analog"),
    "digital": lambda vectors: transmit_symbols(vectors, H, 1.0, FLOOR, seed=0, modulation=16),
}


def arrays(dtype=np.float32):
    rng = np.random.default_rng(0)
    return [
        {"a.w": rng.standard_normal((30, 7)).astype(dtype), "b": rng.standard_normal(5), "steps": np.array(q)}
        for q in range(2)
    ]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("name", WAYS)
def test_same_bits_as_of_tensors(name, dtype):
    given = arrays(dtype)
    kept = [{key: array.copy() for key, array in vector.items()} for vector in given]
    found = WAYS[name](given)
    expected = WAYS[name]([{key: torch.from_numpy(array) for key, array in vector.items()} for vector in given])
    for vector, other in zip(found, expected, strict=True):
        assert type(vector) is dict
        assert list(vector) == list(other)
        for key, array in vector.items():
            assert type(array) is np.ndarray
            assert array.dtype == other[key].numpy().dtype
            np.testing.assert_array_equal(array, other[key].numpy())
            assert not any(np.shares_memory(array, source[key]) for source in given)
    for vector, copy in zip(given, kept, strict=True):
        assert all(np.array_equal(vector[key], copy[key]) for key in copy)


@pytest.mark.parametrize(
    "change",
    [
        lambda array: np.broadcast_to(array, array.shape),
        lambda array: np.asfortranarray(array),
        lambda array: array[::-1].copy()[::-1] if array.ndim else array,
        lambda array: array.astype(array.dtype.newbyteorder()),
        lambda array: np.asmatrix(array) if array.ndim == 2 else array,
    ],
    ids=["read-only", "fortran", "reversed", "byte-swapped", "matrix"],
)
@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_arrays_of_any_layout(change):
    plain = WAYS["transmit"](arrays())
    other = WAYS["transmit"]([{key: change(array) for key, array in vector.items()} for vector in arrays()])
    for vector, expected in zip(other, plain, strict=True):
        for key, array in expected.items():
            np.testing.assert_array_equal(np.asarray(vector[key]), array)


def test_one_array_under_two_names_is_sent_once():
    shared = np.arange(1.0, 7.0)
    fixed = shared.copy()
    fixed.setflags(write=False)  # these are copied inside
    for array in (shared, fixed):
        (heard,) = transmit([{"embedding": array, "head": array}], 0.5, seed=0)
        assert np.shares_memory(heard["embedding"], heard["head"])


@pytest.mark.parametrize(
    ("vectors", "pattern"),
    [
        (
            [{"w": np.ones(3)}, {"w": torch.ones(3)}],
            r"vectors\[0\]\['w'\] is a NumPy array, but vectors\[1\]\['w'\] is a",
        ),
        ([{"v": torch.ones(3), "w": np.ones(3)}], r"vectors\[0\]\['w'\] is a NumPy array.*one kind"),
        ([{"w": np.ma.masked_array(np.ones(3))}], r"vectors\[0\]\['w'\]: .*masked"),
        ([{"w": np.ones(3, complex)}], "'w': complex entries"),
        ([{"w": np.ones(3, np.longdouble)}], r"vectors\[0\]\['w'\]: .*dtype float128|longdouble"),
        ([{"w": np.array(["a"])}], r"vectors\[0\]\['w'\]: .*dtype <U1"),
        ([{"w": [1.0, 2.0]}], r"vectors\[0\]\['w'\]: expected a tensor, got list"),
    ],
)
@pytest.mark.parametrize("function", [transmit, transmit_sum])
def test_what_is_no_vector(function, vectors, pattern):
    with pytest.raises(TypeError, match=pattern):
        function(vectors, 0.1, seed=0)


def test_arrays_have_neither_gradients_nor_memory_to_write_to():
    with pytest.raises(InputError, match="reception: asks for a gradient, which NumPy vectors cannot carry"):
        transmit(arrays(), torch.tensor([0.1, 0.2], requires_grad=True), seed=0)
    with pytest.raises(InputError, match="out: NumPy vectors come back in fresh memory"):
        WAYS["transmit"](arrays(), out=arrays())
    with pytest.raises(InputError, match="out: NumPy vectors come back in fresh memory"):
        WAYS["sum"](arrays(), out=arrays()[0])
