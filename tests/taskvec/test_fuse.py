"""Whole models in memory: the same bits as task vectors made by hand, for every rule."""

from functools import partial

import pytest
import torch

from helpers.fusion_rules import ROWS
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import TaskVector, fuse, task_arithmetic, ties

INF = float("inf")


pytestmark = pytest.mark.usefixtures("small_pieces")


def model(seed, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    shapes = {"emb": (5, 4), "l0.w": (6, 4), "l0.b": (6,), "s": ()}
    state = {key: torch.randn(shape, generator=source).to(dtype) for key, shape in shapes.items()}
    mask = torch.full((3, 3), -INF).triu(1)
    return state | {"mask": mask, "steps": torch.tensor(seed), "bn.running_mean": torch.randn(2, generator=source)}


def same_bits(left, right):
    assert list(left) == list(right)
    for key in left:
        assert left[key].dtype == right[key].dtype
        assert torch.equal(left[key], right[key]), key


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_between_rule_apply_to(row, dtype):
    base, tuned = model(0, dtype), [model(seed, dtype) for seed in range(1, max(5, row.fewest + 1))]
    by_hand = row.rule([TaskVector.between(base, m) for m in tuned]).apply_to(base)
    fused = fuse(base, tuned, row.rule)
    same_bits(fused, by_hand)
    same_bits(fuse(base, [TaskVector.between(base, m) for m in tuned], row.rule), by_hand)
    out = {key: torch.empty_like(tensor) for key, tensor in base.items()}
    again = fuse(base, tuned, row.rule, out=out)
    same_bits(again, by_hand)
    assert all(again[key].data_ptr() == out[key].data_ptr() for key in out)
    for mine, theirs in zip(tuned, range(1, 10), strict=False):
        same_bits(mine, model(theirs, dtype))
    same_bits(base, model(0, dtype))


def test_result_shares_nothing_with_the_base_and_keeps_ties():
    base, tuned = model(0), [model(1), model(2)]
    for state in (base, *tuned):
        state["head"] = state["emb"]
    fused = fuse(base, tuned, skip="l0.*")
    assert fused["head"].data_ptr() == fused["emb"].data_ptr()
    assert torch.equal(fused["l0.w"], base["l0.w"])
    places = {tensor.untyped_storage().data_ptr() for tensor in base.values()}
    assert not places & {tensor.untyped_storage().data_ptr() for tensor in fused.values()}


def test_vectors_tied_on_an_untied_base_are_two_results():
    base = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([30.0, 40.0])}
    step = torch.tensor([0.5, 0.5])
    fused = fuse(base, [TaskVector({"a": step, "b": step})], scale=1.0)
    assert fused["a"].tolist() == [1.5, 2.5]
    assert fused["b"].tolist() == [30.5, 40.5]


def test_any_function_is_a_rule():
    base, tuned = model(0), [model(1), model(2)]
    same_bits(fuse(base, tuned, lambda vectors: sum(vectors) * 0.3), fuse(base, tuned, scale=0.3))
    same_bits(fuse(base, tuned, partial(task_arithmetic, scale=0.5)), fuse(base, tuned, scale=0.5))
    with pytest.raises(TypeError, match="rule: expected it to return a mapping"):
        fuse(base, tuned, lambda vectors: 3)
    with pytest.raises(StateMismatchError, match="unexpected"):
        fuse(base, tuned, lambda vectors: {"other": torch.ones(1)})


def test_modules_and_dtype():
    models = [torch.nn.Linear(3, 2) for _ in range(3)]
    fused = fuse(models[0], models[1:], scale=0.5, dtype=torch.float64)
    expected = (models[1].weight + models[2].weight).double() / 2
    assert fused["weight"].dtype == torch.float64
    torch.testing.assert_close(fused["weight"], expected.detach(), rtol=1e-6, atol=1e-6)


def test_errors():
    base, tuned = model(0), [model(1), model(2)]
    tuned[1]["l0.b"][3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"finetuned\[1\]\['l0.b'\] holds 1"):
        fuse(base, tuned)
    tuned[1] = model(2)
    tuned[1]["mask"][0, 2] = 0.0  # base is -inf there: the difference is infinite
    with pytest.raises(NonFiniteError, match=r"finetuned\[1\]\['mask'\]"):
        fuse(base, tuned)
    with pytest.raises(TypeError, match="finetuned: expected a sequence of models"):
        fuse(base, tuned[0])
    with pytest.raises(InputError, match="shares memory with base"):
        fuse(base, [model(1)], out=dict(base))
    with pytest.raises(StateMismatchError, match="out lacks 'steps'"):
        fuse(base, [model(1)], out={key: tensor.clone() for key, tensor in base.items() if key != "steps"})
    with pytest.raises(StateMismatchError, match="float16"):
        fuse(base, [model(1, torch.float16)])
    half = {"w": torch.tensor([60000.0], dtype=torch.float16)}
    with pytest.raises(NonFiniteError, match=r"overflows torch\.float16"):
        fuse(half, [TaskVector({"w": torch.tensor([60000.0])})], scale=1.0)
    with pytest.raises(TypeError, match="unexpected keyword 'densty'"):
        fuse(base, [model(1)], densty=0.2)


def test_what_is_tied_in_the_base_moves_together():
    base, tuned = model(0), [model(1), model(2)]
    for state in (base, *tuned):
        state["head"] = state["emb"]
    by_hand = task_arithmetic([TaskVector.between(base, m) for m in tuned], skip="emb").apply_to(base)
    fused = fuse(base, tuned, skip="emb")
    same_bits(fused, by_hand)
    assert fused["emb"] is fused["head"]
    out = {key: torch.empty_like(tensor) for key, tensor in base.items()}
    same_bits(fuse(base, tuned, skip="emb", out=out), by_hand)
    out["emb"] = out["head"]
    same_bits(fuse(base, tuned, skip="emb", out=out), by_hand)
    tuned[1]["head"] = tuned[1]["head"] + 1
    with pytest.raises(StateMismatchError, match="'emb' and 'head' are tied in base"):
        fuse(base, tuned)


def test_out_is_checked_as_a_whole():
    base, tuned = model(0), [model(1)]
    for key, wrong, message in (
        ("steps", tuned[0]["steps"], r"out\['steps'\] shares memory with finetuned\[0\]\['steps'\]"),
        ("bn.running_mean", base["bn.running_mean"], r"shares memory with base\['bn.running_mean'\]"),
        ("steps", torch.tensor([1]), "shape"),
        ("steps", torch.tensor(1.0), "float32"),
    ):
        out = {k: torch.empty_like(t) for k, t in base.items()} | {key: wrong}
        with pytest.raises(InputError, match=message):
            fuse(base, tuned, out=out)
    same_bits(base, model(0))
    same_bits(tuned[0], model(1))
    with pytest.raises(TypeError, match="out: expected a mapping"):
        fuse(base, tuned, out=3)
    out = {key: torch.empty_like(t).requires_grad_(t.is_floating_point()) for key, t in base.items()}
    same_bits(fuse(base, tuned, out=out), fuse(base, tuned))


def test_a_rule_of_ones_own_may_have_any_keywords_but_no_other_shapes():
    base, tuned = model(0), [model(1), model(2)]
    expected = fuse(base, tuned, scale=0.5)
    same_bits(fuse(base, tuned, lambda vectors, **options: sum(vectors) * 0.5), expected)
    same_bits(fuse(base, tuned, lambda vectors, out=None: sum(vectors) * 0.5), expected)
    same_bits(
        fuse(base, tuned, lambda vectors, **options: ties(vectors, **options), density=0.3),
        fuse(base, tuned, ties, density=0.3),
    )
    with pytest.raises(StateMismatchError, match=r"the rule's result has the shape \(1,\) for 's'"):
        fuse(base, tuned, lambda vectors: {"s": torch.ones(1)})
    with pytest.raises(NonFiniteError, match=r"the rule's result\['s'\] holds 1 non-finite"):
        fuse(base, tuned, lambda vectors: {"s": torch.tensor(INF)})


def test_gradients_are_not_lost_in_silence():
    step = torch.ones(2, requires_grad=True)
    with pytest.raises(InputError, match="gradients do not flow through fuse"):
        fuse({"w": torch.ones(2)}, [TaskVector({"w": step})])
    with torch.no_grad():
        assert fuse({"w": torch.ones(2)}, [TaskVector({"w": step})])["w"].tolist() == [2.0, 2.0]
    with pytest.raises(InputError, match="finetuned: expected at least one model"):
        fuse({"w": torch.ones(2)}, [])
    with pytest.raises(InputError, match=r"base\['w'\] is on the meta device"):
        fuse({"w": torch.ones(2, device="meta")}, [{"w": torch.ones(2)}])
