"""SLERP: the great circle, its ends and degenerate directions, of task vectors and of models; and others' code."""

import math

import pytest
import torch

import rmtllmf.taskvec._engine as engine
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import TaskVector, aligned, slerp

SHAPES = {"w": (6, 40), "conv": (2, 3, 2, 2), "b": (5,), "s": (), "none": (0, 3)}


def make(seed=0, count=2, dtype=torch.float32, shapes=SHAPES):
    draw = torch.Generator().manual_seed(seed)
    return [{key: torch.randn(shape, generator=draw).to(dtype) for key, shape in shapes.items()} for _ in range(count)]


def by_hand(a, b, t, parallel=0.9995):
    """Of two tensors in float64, with the angle from unit vectors."""
    if not a.any() or not b.any():
        return (1 - t) * a + t * b
    cosine = float(((a / a.norm()) * (b / b.norm())).sum())
    if abs(cosine) > parallel:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def same_bits(left, right):
    assert list(left) == list(right)
    for key in left:
        assert torch.equal(left[key], right[key]), key


@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("offset", [None, 0.0, 0.1, 3.0])
def test_the_formula(t, offset, monkeypatch):
    monkeypatch.setattr(engine, "PIECE", 16)
    a, b = make()
    base = None if offset is None else {key: offset * tensor for key, tensor in make(1)[0].items()}
    fused = slerp([a, b], t, base=base, scale=0.7)
    for key in SHAPES:
        at = torch.zeros(SHAPES[key]).double() if base is None else base[key].double()
        expected = 0.7 * (by_hand(at + a[key].double(), at + b[key].double(), t) - at)
        torch.testing.assert_close(fused[key].double(), expected, rtol=1e-5, atol=1e-6)


def test_the_length_is_kept_and_the_angle_is_cut_in_proportion():
    """What it is used for."""
    a, b = (tensor / tensor.norm() for tensor in make(2, shapes={"w": (300,)})[0:2] for tensor in tensor.values())
    angle = math.acos(float(a @ b))
    for t in (0.1, 0.25, 0.8):
        fused = slerp([{"w": a}, {"w": b}], t)["w"]
        assert float(fused.norm()) == pytest.approx(1, abs=1e-6)
        assert math.acos(float(fused @ a)) == pytest.approx(t * angle, abs=1e-5)


def test_the_ends_are_the_vectors():
    a, b = make()
    for base in (None, make(1)[0]):
        for t, end in ((0.0, a), (1.0, b)):
            fused = slerp([a, b], t, base=base)
            for key, tensor in end.items():
                torch.testing.assert_close(fused[key], tensor, rtol=1e-6, atol=1e-6)


def test_directions_that_are_one_opposite_or_none():
    a = torch.tensor([1.0, 2.0, 3.0])
    for b in (a, 3 * a, -a, -2 * a, torch.zeros(3), a + 1e-4):
        for limit in (0.9995, 1.0):
            fused = slerp([{"w": a}, {"w": b}], 0.25, parallel=limit)["w"]
            torch.testing.assert_close(fused, 0.75 * a + 0.25 * b, rtol=1e-5, atol=1e-6)
    wide = slerp([{"w": a}, {"w": torch.tensor([3.0, -1.0, 1.0])}], 0.25, parallel=0.0)["w"]
    torch.testing.assert_close(wide, torch.tensor([1.5, 1.25, 2.5]))


def test_models_that_are_far_from_the_origin_are_averaged():
    a, b = make()
    base = {key: 1e3 * tensor for key, tensor in make(1)[0].items()}
    fused = slerp([a, b], 0.5, base=base)
    torch.testing.assert_close(fused["w"], (a["w"] + b["w"]) / 2, rtol=1e-3, atol=1e-3)


def test_the_base_may_have_more_and_be_a_module():
    model = torch.nn.BatchNorm1d(4)
    with torch.no_grad():
        model.weight.copy_(torch.arange(1.0, 5.0))
    vectors = [{"weight": tensor["w"], "bias": tensor["v"]} for tensor in make(shapes={"w": (4,), "v": (4,)})]
    same_bits(slerp(vectors, base=model), slerp(vectors, base=dict(model.state_dict())))
    one = slerp(vectors, base=model, skip="bias")
    assert list(one) == ["weight"]


@pytest.mark.parametrize("weights", [[2.0, 0.5], torch.tensor([2.0, 0.5]), {"w": [2.0, 0.5], "conv": 3.0}])
@pytest.mark.parametrize("with_base", [False, True])
def test_weights(weights, with_base):
    vectors, base = make(), make(1)[0] if with_base else None
    table = weights if isinstance(weights, dict) else dict.fromkeys(SHAPES, weights)
    by_hand = [dict(vector) for vector in vectors]
    for key, pair in table.items():
        for index, vector in enumerate(by_hand):
            vector[key] = vector[key] * (pair if isinstance(pair, float) else float(pair[index]))
    fused, expected = slerp(vectors, base=base, weights=weights), slerp(by_hand, base=base)
    for key in SHAPES:
        torch.testing.assert_close(fused[key], expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_base", [False, True])
def test_as_every_rule(with_base, monkeypatch):
    """Bits for any threads, order and way of reading; `out`; half precision; what is tied; inputs are left alone."""
    monkeypatch.setattr(engine, "PIECE", 16)
    vectors, base = make(dtype=torch.bfloat16), make(1)[0] if with_base else None
    kept = [{key: tensor.clone() for key, tensor in vector.items()} for vector in vectors]
    expected = slerp(vectors, 0.3, base=base)
    assert isinstance(expected, TaskVector)
    assert expected["w"].dtype == torch.bfloat16
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        same_bits(slerp(vectors, 0.3, base=base), expected)
    finally:
        torch.set_num_threads(before)
    turned = slerp([dict(reversed(vector.items())) for vector in vectors], 0.3, base=base)
    same_bits({key: turned[key] for key in SHAPES}, expected)
    same_bits(slerp(aligned(vectors), 0.3, base=base), expected)
    across = [{k: t.mT.contiguous().mT if t.ndim == 2 else t for k, t in vector.items()} for vector in vectors]
    same_bits(slerp(across, 0.3, base=base), expected)
    out = {key: torch.empty_like(tensor) for key, tensor in expected.items()}
    same_bits(slerp(vectors, 0.3, base=base, out=out), expected)
    assert out["w"].data_ptr() == slerp(vectors, base=base, out=out)["w"].data_ptr()
    for vector, copy in zip(vectors, kept, strict=True):
        same_bits(vector, copy)
    for vector in vectors:
        vector["tied"] = vector["w"]
    if base is not None:
        base["tied"] = base["w"]
    fused = slerp(vectors, 0.3, base=base)
    assert fused["tied"].data_ptr() == fused["w"].data_ptr()
    same_bits({key: fused[key] for key in SHAPES}, expected)


@pytest.mark.parametrize(
    ("count", "arguments", "error", "message"),
    [
        (3, {}, InputError, "vectors: expected two, between which to interpolate, got 3"),
        (1, {}, InputError, "vectors: expected two, between which to interpolate, got 1"),
        (2, {"t": 1.5}, InputError, r"t: expected a number in \[0, 1\], got 1.5"),
        (2, {"parallel": -1}, InputError, r"parallel: expected a number in \[0, 1\], got -1"),
        (2, {"scale": math.inf}, InputError, "scale: expected a finite number"),
        (2, {"base": {"w": torch.ones(6, 40)}}, StateMismatchError, "base"),
        (2, {"base": make(shapes=SHAPES | {"w": (40, 6)})[0]}, StateMismatchError, r"base\['w'\] has shape \(40, 6\)"),
    ],
)
def test_bad_input(count, arguments, error, message):
    with pytest.raises(error, match=message):
        slerp(make(count=count), **arguments)


def test_who_is_not_finite():
    broken = make()
    broken[1]["w"][2, 3] = math.nan
    for base in (None, make(1)[0]):
        with pytest.raises(NonFiniteError, match=r"vectors\[1\]\['w'\] holds 1 non-finite"):
            slerp(broken, base=base)
    base = make(1)[0]
    base["w"][0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"base\['w'\] holds 1 non-finite"):
        slerp(make(), base=base)
    with pytest.raises(InputError, match="gradients do not flow"):
        slerp([{"w": torch.ones(3, requires_grad=True)}] * 2)


@pytest.mark.parametrize("t", [0.2, 0.5])
def test_beside_mergekit(t):
    merge = pytest.importorskip("mergekit.merge_methods.registry").get("slerp")
    group = pytest.importorskip("mergekit.merge_methods.base").TensorGroup.from_tensors
    vectors, base = make(shapes={"w": (30, 20)}), make(1, shapes={"w": (30, 20)})[0]
    models = [base["w"] + vector["w"] for vector in vectors]
    (theirs,) = merge([group(models, base_index=0)], parameters={"t": t})
    torch.testing.assert_close(base["w"] + slerp(vectors, t, base=base)["w"], theirs, rtol=1e-4, atol=1e-5)
    (theirs,) = merge([group([vector["w"] for vector in vectors], base_index=0)], parameters={"t": t})
    torch.testing.assert_close(slerp(vectors, t)["w"], theirs, rtol=1e-4, atol=1e-5)
