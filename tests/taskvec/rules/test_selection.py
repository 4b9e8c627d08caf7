"""Thresholds against sorting, on data made to be awkward."""

import importlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rmtllmf.taskvec._engine as engine
import rmtllmf.taskvec.rules._selection as selection
from rmtllmf.errors import NonFiniteError
from rmtllmf.taskvec import ties
from rmtllmf.taskvec._engine import Fusion
from rmtllmf.taskvec._sources import Source, Stored
from rmtllmf.taskvec.rules._selection import largest
from rmtllmf.taskvec.rules._shares import how_many

NAMES = ("a", "b", "c")


class OnDemand(Source):
    """What a file is to the engine: something with no memory to stride through."""

    def __init__(self, tensors, in_pieces=True):
        self.label, self.inner, self.in_pieces = "on demand", Stored(tensors, "on demand"), in_pieces
        self.specs = self.inner.specs

    def sliceable(self, key):
        return self.in_pieces

    def read(self, key, start, stop, buffer):
        return buffer.copy_(self.inner.read(key, start, stop, buffer))


def kept_by(vectors, groups, density):
    """What `largest` leaves of every vector."""
    fusion = Fusion(vectors, {})
    cuts = largest(fusion, groups, density)
    found = []

    for index in range(fusion.count):
        one = {key: torch.zeros(fusion.specs[key].shape, dtype=fusion.compute[key]) for key in fusion.keys}

        def look(piece, index=index, one=one):
            cut = cuts[piece.key][index]
            step = 7 if len(piece) < 1000 else len(piece)
            for start in range(0, len(piece), step):
                block = slice(start, min(start + step, len(piece)))
                left = cut.keep(index, piece, block, piece.spare(0, block.stop - block.start))
                one[piece.key].view(-1)[piece.start : piece.stop][block] = left

        fusion.survey(look)
        found.append(one)
    return found


def by_sorting(vectors, groups, density):
    """A stable sort of magnitudes: of equal ones the first are kept."""
    result = [{key: torch.zeros_like(tensor) for key, tensor in vector.items()} for vector in vectors]
    for vector, one in zip(vectors, result, strict=True):
        for group in groups:
            flat = torch.cat([vector[key].reshape(-1).double() for key in sorted(group)])
            if not len(flat):
                continue
            flat[flat.abs().argsort(descending=True, stable=True)[how_many(density, len(flat)) :]] = 0
            sizes = [vector[key].numel() for key in sorted(group)]
            for key, part in zip(sorted(group), flat.split(sizes), strict=True):
                one[key] = part.view(vector[key].shape).to(vector[key].dtype)
    return result


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert set(one) == set(other)
        for key in one:
            assert torch.equal(one[key], other[key].to(one[key].dtype)), key


def test_how_many():
    assert [how_many(0.29, 100), how_many(0.57, 100), how_many(0.2, 3), how_many(1.0, 7)] == [29, 57, 1, 7]
    assert [how_many(1 / 3, 300), how_many(1e-9, 5), how_many(0.9999, 3), how_many(0.2, 86_192_640)] == [
        100,
        1,
        2,
        17_238_528,
    ]
    for size in range(1, 400):
        for percent in range(1, 101):
            assert how_many(percent / 100, size) == max(1, percent * size // 100)


@pytest.mark.parametrize("groups", [[NAMES], [("a",), ("b",), ("c",)]], ids=["global", "tensor"])
@pytest.mark.parametrize("way", ["collected", "sampled", "as on another device"])
@settings(max_examples=60)
@given(data=st.data())
def test_whole_numbers_with_many_ties(groups, way, data):
    patch = pytest.MonkeyPatch()
    try:
        patch.setattr(engine, "PIECE", 16)
        patch.setattr(selection, "RUN", 4)
        if way == "as on another device":
            patch.setattr(
                selection, "_census", lambda part, _, at, dtype: selection._census_by_torch(part.abs().to(dtype), *at)
            )
            patch.setattr(selection, "_among", selection._among_by_torch)
        if way != "collected":
            patch.setattr(selection, "SAMPLE", 1)
            patch.setattr(selection, "DEVIATIONS", data.draw(st.sampled_from([0.0, 1.0, 3.5])))  # 0: misses often
        peak = data.draw(st.sampled_from([0, 1, 3, 100]))
        draw = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
        sizes = data.draw(st.tuples(*[st.sampled_from([0, 1, 5, 64, 900])] * 3).filter(any))
        vectors = [
            {
                key: torch.randint(-peak, peak + 1, (size,), generator=draw).float()
                for key, size in zip(NAMES, sizes, strict=True)
            }
            for _ in range(2)
        ]
        if data.draw(st.booleans()):
            vectors = [{key: tensor.sort().values for key, tensor in vector.items()} for vector in vectors]
        density = data.draw(st.sampled_from([1e-6, 0.01, 0.1, 0.29, 0.5, 0.9, 0.999]))
        expected = by_sorting(vectors, groups, density)
        same(kept_by(vectors, groups, density), expected)
        same(kept_by([OnDemand(vector) for vector in vectors], groups, density), expected)
    finally:
        patch.undo()


SIZE = 300_000
AWKWARD = {
    "normal": lambda draw: torch.randn(SIZE, generator=draw),
    "sorted": lambda draw: torch.randn(SIZE, generator=draw).sort().values,
    "constant": lambda draw: torch.full((SIZE,), -0.3),
    "zero": lambda draw: torch.zeros(SIZE),
    "sparse": lambda draw: torch.randn(SIZE, generator=draw) * (torch.rand(SIZE, generator=draw) < 0.05),
    "bfloat16": lambda draw: torch.randn(SIZE, generator=draw).bfloat16(),
    "float16": lambda draw: torch.randn(SIZE, generator=draw).half(),
    "float64": lambda draw: torch.randn(SIZE, generator=draw, dtype=torch.float64),
    "tiny": lambda draw: torch.randn(SIZE, generator=draw) * 1e-44,
    "periodic": lambda draw: torch.randn(SIZE, generator=draw) * (torch.arange(SIZE) % 768 < 100),
    "blocks": lambda draw: torch.randn(SIZE, generator=draw) * 10.0 ** (torch.arange(SIZE) // 50_000),
    "transposed": lambda draw: torch.randn(300, 1000, generator=draw).mT,
    "unlike its sample": lambda draw: torch.randn(SIZE, generator=draw),  # see below
}


@pytest.mark.parametrize("density", [1e-6, 0.2, 0.97])
@pytest.mark.parametrize("kind", AWKWARD)
def test_awkward_data(kind, density):
    vectors = []
    for seed in range(2):
        tensor = AWKWARD[kind](torch.Generator().manual_seed(seed))
        if kind == "unlike its sample":
            stride = SIZE // round(2 * SIZE ** (2 / 3))
            while any(stride % prime == 0 for prime in (2, 3, 5, 7, 11, 13)):
                stride += 1
            tensor[stride // 2 :: stride] *= 100
        vectors.append({"w": tensor})
    same(kept_by(vectors, [["w"]], density), by_sorting(vectors, [["w"]], density))


@pytest.mark.parametrize("direct", [True, False])
def test_float32_and_float64_under_one_threshold(direct, monkeypatch):
    monkeypatch.setattr(selection, "SAMPLE", 1 << 20 if direct else 1)
    draw = torch.Generator().manual_seed(0)
    single, double = torch.randn(2000, generator=draw), torch.randn(2000, generator=draw, dtype=torch.float64)
    for density in (0.1, 0.37, 0.5001, 0.8):
        vectors = [{"a": single, "b": double}]
        same(kept_by(vectors, [["a", "b"]], density), by_sorting(vectors, [["a", "b"]], density))
    tie = torch.tensor([0.1, 0.1, 5.0])  # 0.1 in float32 is above 0.1
    vectors = [{"a": tie, "b": torch.tensor([0.1, 0.1, 0.1], dtype=torch.float64)}]
    for kept in range(1, 6):
        same(kept_by(vectors, [["a", "b"]], kept / 6), by_sorting(vectors, [["a", "b"]], kept / 6))


def test_a_missed_bracket_is_found_by_bits(monkeypatch):
    calls = []
    by_bits = selection._Batch._by_bits
    monkeypatch.setattr(selection._Batch, "_by_bits", lambda self, units: calls.append(units) or by_bits(self, units))
    monkeypatch.setattr(selection._Batch, "_bracket", lambda self, unit: selection._Bracket(1e30, 1e31, 0))
    for dtype in (torch.float32, torch.float64):
        vectors = [{"w": torch.randn(5000, dtype=dtype, generator=torch.Generator().manual_seed(3))}]
        for density in (0.0001, 0.2, 0.99):
            same(kept_by(vectors, [["w"]], density), by_sorting(vectors, [["w"]], density))
    assert calls == [[(0, 0)]] * 6


def test_no_piece_collects_more_than_it_should(monkeypatch):
    """A bracket that is far too wide is given up, not collected."""
    monkeypatch.setattr(selection._Batch, "_bracket", lambda self, unit: selection._Bracket(0.0, 1e30, 10))
    collected = []
    settled = selection._settled
    monkeypatch.setattr(selection, "_settled", lambda *a: collected.extend(c.inside for _, c in a[1]) or settled(*a))
    vectors = [{"w": torch.randn(5000, generator=torch.Generator().manual_seed(3))}]
    same(kept_by(vectors, [["w"]], 0.2), by_sorting(vectors, [["w"]], 0.2))
    assert collected[0] is None


def test_equal_magnitudes_in_a_long_piece_are_looked_for_once(monkeypatch):
    """A tensor that is made as a whole is one piece of many blocks: not every block may go through all of it."""
    looked = []
    monkeypatch.setattr(importlib.import_module("rmtllmf.taskvec.rules.ties"), "BLOCK", 10)
    search = selection.Cut._end
    monkeypatch.setattr(selection.Cut, "_end", lambda self, *a: looked.append(0) or search(self, *a))
    vectors = [
        {"w": torch.randint(-2, 3, (30, 40), generator=torch.Generator().manual_seed(q)).float()} for q in (3, 4)
    ]
    for density in (0.1, 0.3, 0.5, 0.7):
        looked.clear()
        fused = ties([OnDemand(vector, in_pieces=False) for vector in vectors], density, combine="sum")
        assert len(looked) <= 2
        assert torch.equal(fused["w"], ties(vectors, density, combine="sum")["w"])
        (kept,) = by_sorting(vectors[:1], [["w"]], density)
        assert torch.equal(ties([OnDemand(vectors[0], in_pieces=False)], density)["w"], kept["w"])


@pytest.mark.parametrize("trim", ["global", "tensor"])
@pytest.mark.parametrize("broken", [1, 20_000, 60_000])
def test_a_vector_of_nan_is_named(trim, broken):
    """Also if there are more of them than entries to be kept, so that the threshold is one."""
    vectors = [{"a": torch.ones(5), "w": torch.randn(60_000)} for _ in range(2)]
    vectors[1]["w"][:broken] = float("nan")
    with pytest.raises(NonFiniteError, match=rf"vectors\[1\]\['w'\] holds {broken} non-finite"):
        ties(vectors, trim=trim)


@pytest.mark.parametrize("bracket", [(-1.0, float("inf")), (1.0, 1.0), (0.5, 2.0), (3.0, float("inf"))])
def test_torch_counts_what_numpy_counts(bracket):
    draw = torch.Generator().manual_seed(4)
    values = torch.randint(-6, 7, (1000,), generator=draw) / 2
    piece = engine.Piece("w", 0, 1000, values, lambda slot, length: torch.empty(1000), 1, lambda index, slot: values)
    ours = selection._census(values, piece, selection._Bracket(*bracket, 1000), torch.float32)
    other = selection._census_by_torch(values.abs(), *bracket, 1000)
    assert ours[:4] == other[:4]
    assert torch.equal(ours.inside, other.inside)


def test_the_torch_path_from_end_to_end(monkeypatch):
    monkeypatch.setattr(
        selection, "_census", lambda part, piece, bracket, dtype: selection._census_by_torch(part.abs(), *bracket)
    )
    vectors = [{"w": torch.randn(60_000, generator=torch.Generator().manual_seed(seed))} for seed in range(3)]
    same(kept_by(vectors, [["w"]], 0.2), by_sorting(vectors, [["w"]], 0.2))


@pytest.mark.gpu
def test_on_the_device():
    vectors = [{"w": torch.randn(SIZE, generator=torch.Generator().manual_seed(seed))} for seed in range(2)]
    expected = by_sorting(vectors, [["w"]], 0.2)
    there = [{key: tensor.cuda() for key, tensor in vector.items()} for vector in vectors]
    cuts = largest(Fusion(there, {}), [["w"]], 0.2)["w"]
    for cut, vector, one in zip(cuts, there, expected, strict=True):
        there_is = vector["w"]
        piece = engine.Piece(
            "w",
            0,
            SIZE,
            there_is,
            lambda slot, length: torch.empty(SIZE, device="cuda"),
            1,
            lambda index, slot, w=there_is: w,
        )
        assert torch.equal(cut.keep(0, piece, slice(0, SIZE), torch.empty_like(vector["w"])).cpu(), one["w"])
