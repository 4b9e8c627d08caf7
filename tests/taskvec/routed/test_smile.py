"""SMILE beside a naive transcription, token by token, and what becomes of the rest of a model."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from helpers.routed_models import MODELS, in_linear_layers, made, random_vectors, run, run_with
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import smile, weighted_average
from rmtllmf.taskvec.routed.smile import SmileLinear


def layer(m, n, bias=True, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Linear(n, m, bias, dtype=torch.float64)


def naive(base, vectors, x, rank, gate_rank, top_k):
    """The formulas for one token after another."""
    rows = []
    for token in x.reshape(-1, x.shape[-1]):
        factors = [torch.linalg.svd(vector["weight"], full_matrices=False) for vector in vectors]
        r = torch.stack([(Vh[:gate_rank] @ token).norm() for _, _, Vh in factors])
        chosen = r.argsort(descending=True)[:top_k]
        p = r[chosen].exp() / r[chosen].exp().sum()
        y = base(token)
        for weight, i in zip(p, chosen, strict=True):
            U, s, Vh = factors[i]
            y = y + weight * (U[:, :rank] * s[:rank]) @ Vh[:rank] @ token
            if "bias" in vectors[i]:
                y = y + weight * vectors[i]["bias"]
        rows.append(y)
    return torch.stack(rows).reshape(*x.shape[:-1], -1)


@settings(deadline=None, max_examples=25)
@given(
    m=st.integers(1, 9),
    n=st.integers(2, 9),
    count=st.integers(1, 4),
    rank=st.integers(1, 10),
    gate_rank=st.integers(1, 10),
    top_k=st.integers(1, 4),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_as_defined(m, n, count, rank, gate_rank, top_k, bias, seed):
    base = layer(m, n, bias, seed)
    vectors, top_k = random_vectors(base, count, seed=seed), min(top_k, count)
    gate_rank = min(gate_rank, n - 1)  # all n directions hold all of every token: a tie
    x = torch.randn(2, 3, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    routed = smile(base, vectors, rank=rank, gate_rank=gate_rank, top_k=top_k)
    torch.testing.assert_close(routed(x), naive(base, vectors, x, rank, gate_rank, top_k))
    torch.testing.assert_close(routed(x[0, 0]), naive(base, vectors, x[0, :1], rank, gate_rank, top_k)[0])
    assert routed(x[:0]).shape == (0, 3, m)


@pytest.mark.parametrize("name", MODELS)
def test_one_task_of_full_rank_is_the_fine_tuned_model(name):
    """Which the paper claims of its experts, and so holds for every make of attention."""
    base, inputs = made(name)
    (vector,) = random_vectors(base, 1)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    routed = smile(base, [vector], rank=99, gate_rank=1, rest=vector)
    with torch.no_grad():
        expected = run_with(base, vector.apply_to(base.state_dict()), inputs)
        torch.testing.assert_close(run(routed, inputs), expected)
        assert not torch.allclose(run(base, inputs), expected, atol=1e-2)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())
    assert type(routed) is type(base)
    assert not any(parameter.requires_grad for parameter in routed.parameters())


def test_torchs_encoder_calls_its_layers_where_attention_did_not_change():
    base, inputs = made("torch")
    (vector,) = random_vectors(base, 1)
    vector = vector.select("*linear1*")
    with torch.no_grad():
        expected = run_with(base, vector.apply_to(base.state_dict()), inputs)
        torch.testing.assert_close(smile(base, [vector], rank=99, gate_rank=1)(inputs), expected)
        assert not torch.allclose(base(inputs), expected, atol=1e-2)


@pytest.mark.parametrize("name", MODELS)
def test_equal_experts_are_one(name):
    base, inputs = made(name)
    (vector,) = random_vectors(base, 1)
    with torch.no_grad():
        three = run(smile(base, [vector] * 3, rank=2, gate_rank=2, top_k=2), inputs)
        torch.testing.assert_close(three, run(smile(base, [vector], rank=2, gate_rank=2), inputs))


def test_tokens_go_where_their_direction_was_changed():
    base, inputs = layer(4, 6), torch.eye(6, dtype=torch.float64)
    vectors = []
    for index in range(3):
        change = torch.zeros(4, 6, dtype=torch.float64)
        change[0, 2 * index], change[1, 2 * index + 1] = 1.0, 0.5
        vectors.append({"weight": change})
    routed = smile(base, vectors, rank=2, gate_rank=2)
    assert routed.route(inputs)[1][:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_the_rest_stays_or_is_given():
    base, _ = made("open_clip")
    vectors = random_vectors(base)
    linear = in_linear_layers(base)
    average = weighted_average(vectors)
    for rest in (None, average):
        state = smile(base, vectors, rank=1, gate_rank=1, rest=rest).state_dict()
        for key, value in base.state_dict().items():
            if key not in linear:
                torch.testing.assert_close(state[key], value if rest is None else value + rest[key])
            elif "mlp" in key:
                torch.testing.assert_close(state[key], value)


def test_what_no_vector_changes_stays_as_it_is():
    base = nn.Sequential(layer(3, 3), layer(3, 3))
    vectors = [{"0.weight": torch.eye(3), "1.weight": torch.zeros(3, 3)}]
    routed = smile(base, vectors, rank=1, gate_rank=1)
    assert isinstance(routed[0], SmileLinear)
    assert type(routed[1]) is nn.Linear
    assert type(smile(base, vectors, rank=1, gate_rank=1, skip="0.*")[0]) is nn.Linear


def test_an_expert_without_change_is_no_expert():
    base = layer(3, 3)
    vectors = [{"weight": torch.zeros(3, 3)}, {"weight": torch.diag(torch.tensor([0.0, 2.0, 0.0]))}]
    routed = smile(base, vectors, rank=3, gate_rank=3)
    assert routed.route(torch.eye(3, dtype=torch.float64)[1:2])[1].item() == 1
    assert not routed.right[0].any()


def test_shared_layers_are_one_and_shared_weights_none():
    shared = layer(3, 3)
    base = nn.Sequential(shared, nn.ReLU(), shared)
    vectors = [{key: torch.ones_like(value) for key, value in base.state_dict().items()}]
    routed = smile(base, vectors, rank=1, gate_rank=1)
    assert routed[0] is routed[2]
    tied = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    tied["head"].weight = tied["embedding"].weight
    update = {key: torch.ones(5, 3) for key in tied.state_dict()}
    routed = smile(tied, [update], rank=1, gate_rank=1, rest=update)
    assert type(routed["head"]) is nn.Linear
    assert routed["head"].weight is routed["embedding"].weight
    torch.testing.assert_close(routed["head"].weight, tied["head"].weight + 1)


def test_half_precision_strides_and_magnitudes():
    base = nn.Linear(6, 4).to(torch.bfloat16)
    vectors = [{"weight": torch.randn(6, 4, generator=torch.Generator().manual_seed(q)).mT} for q in range(2)]
    routed = smile(base, vectors, rank=2, gate_rank=2)
    assert routed.right.dtype == routed(torch.ones(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    bias_only = smile(base, [{"bias": torch.ones(4)}], rank=2, gate_rank=2)  # in half precision, with no matrix at all
    torch.testing.assert_close(bias_only(torch.ones(2, 6).bfloat16()), base(torch.ones(2, 6).bfloat16()) + 1)
    base = layer(4, 6)
    small, large = (
        smile(base, [{"weight": c * v["weight"].double()} for v in vectors], rank=9, gate_rank=1) for c in (1.0, 1e200)
    )
    torch.testing.assert_close(large.left / 1e200, small.left)


def test_the_same_for_any_number_of_threads():
    base, _ = made("open_clip")
    vectors, threads = random_vectors(base.float()), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = smile(base, vectors, rank=3, gate_rank=2).state_dict()
        torch.set_num_threads(3)
        three = smile(base, vectors, rank=3, gate_rank=2).state_dict()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one[key], three[key]) for key in one)


def test_copies_and_gradients_to_the_input():
    base, inputs = made("timm")
    routed = smile(base, random_vectors(base), rank=2, gate_rank=2, top_k=2)
    with torch.no_grad():
        assert torch.equal(run(copy.deepcopy(routed), inputs), run(routed, inputs))
    linear = smile(layer(2, 3), random_vectors(layer(2, 3)), rank=2, gate_rank=2, top_k=2)
    x = torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(linear, x)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"rank": 0}, InputError, "rank: expected a whole number of at least 1, got 0"),
        ({"gate_rank": 0}, InputError, "gate_rank: expected a whole number of at least 1"),
        ({"top_k": 3}, InputError, "top_k: expected at most 2, the number of vectors, got 3"),
        ({"vectors": []}, InputError, "vectors: expected at least one"),
        ({"vectors": [{"other": torch.ones(2)}]}, StateMismatchError, "model lacks 'other'"),
        (
            {"vectors": [{"weight": torch.ones(2, 2)}]},
            StateMismatchError,
            r"vectors\[0\]\['weight'\] has shape \(2, 2\)",
        ),
        ({"vectors": [{"weight": torch.full((2, 3), torch.nan)}]}, NonFiniteError, r"\['weight'\] holds 6 non-finite"),
        ({"model": dict}, TypeError, "model: expected a torch.nn.Module"),
        ({"skip": "x"}, InputError, "skip: 'x' matches none"),
        ({"rest": {"other": torch.ones(2)}}, StateMismatchError, "base lacks 'other'"),
    ],
)
def test_bad_input(changes, error, message):
    good = {"model": layer(2, 3), "vectors": [{"weight": torch.ones(2, 3)}] * 2, "rank": 1, "gate_rank": 1}
    given = good | changes
    with pytest.raises(error, match=message):
        smile(given.pop("model"), given.pop("vectors"), **given)
