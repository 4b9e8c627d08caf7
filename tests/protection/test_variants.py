"""Codes and realignments of the comparison are what their rows say."""

from dataclasses import replace

import pytest
import torch
from protection.codes import ADAPTERS, LOADED, LOW_RANK, SIGNS, TOP_K, matrices, repeated
from protection.conditions import BLACK_BOX, black_box
from protection.methods import CODES, METHODS, REALIGNMENTS
from protection.realignments import anchored, everything, lora, new_heads, normalisations, posterior_variance, stopped
from protection.stage import Stage

from helpers.toy_world import Toy
from paper.protocol import TESTBED
from paper.uplink import reception
from rmtllmf.resilience import channel_uses, embedding_keys, normalization_keys, reliable_bits

pytestmark = pytest.mark.usefixtures("one_thread")

PROTOCOL = replace(
    TESTBED, tasks=tuple("abcdefgh"), blocks=2, realignment_steps=2, realignment_batch=4, shots=3, reference="30"
)
EVERY_CODE = {"low rank": LOW_RANK, "adapters": ADAPTERS, "top-k": TOP_K, "signs": SIGNS, "power loading": LOADED}


class Wider(Toy):
    """With matrices that codes are worth something for."""

    width = 32


@pytest.fixture
def stage(tmp_path):
    return Stage(Wider(PROTOCOL, tmp_path), PROTOCOL, 0)


def squared_error(stage, vectors):
    names = matrices(stage)
    return sum(
        float((vector[name] - sent[name]).square().sum())
        for vector, sent in zip(vectors, stage.sent, strict=True)
        for name in names
    )


@pytest.mark.parametrize("condition", BLACK_BOX)
@pytest.mark.parametrize("name", EVERY_CODE)
def test_numbers_bits_and_repetitions_fit_into_the_channel_uses_of_the_vectors(stage, name, condition):
    channel = reception(PROTOCOL, condition, 0)
    codes = EVERY_CODE[name].encode(stage, channel)
    times = min(repeated(code, whole, channel) for code, whole in zip(codes, stage.sent, strict=True))
    bits = reliable_bits(channel)
    for code, whole in zip(codes, stage.sent, strict=True):
        numbers = -(-sum(tensor.numel() for tensor in code.sent.values()) // 2)
        assert times >= 1
        assert times * numbers + code.bits / bits <= channel_uses(whole)
    assert (codes[0].bits > 0) == (name in ("top-k", "signs", "power loading"))
    assert (times > 1) == (name in ("low rank", "adapters", "top-k"))


def test_the_largest_density_that_fits_is_used(stage):
    channel = reception(PROTOCOL, "sum_rate", 0)
    code = TOP_K.encode(stage, channel)[0]
    used = 8 * channel_uses(code.sent) + code.bits / reliable_bits(channel)
    assert 0.97 * channel_uses(stage.sent[0]) < used <= channel_uses(stage.sent[0])


@pytest.mark.parametrize("name", CODES)
def test_what_is_not_sent_is_the_base_models_and_what_is_is_better_than_nothing(stage, name):
    heard = CODES[name].heard(stage, "link", "ideal")
    embeddings = embedding_keys(stage.world.base)
    assert embeddings
    assert all(not vector[key].any() for vector in heard.vectors for key in embeddings)
    assert set(heard.vectors[0]) == set(stage.sent[0])
    zero = squared_error(stage, [vector.map(lambda name, tensor: torch.zeros_like(tensor)) for vector in stage.sent])
    assert squared_error(stage, heard.vectors) < 0.99 * zero


def test_signs_of_one_modulus_are_received_better(stage):
    errors = [
        squared_error(stage, CODES[name].heard(stage, "link", "sum_rate").vectors)
        for name in ("signs", "signs, one modulus")
    ]
    assert errors[1] < 0.8 * errors[0]


def test_power_goes_where_outputs_depend_on_it(stage):
    channel = reception(PROTOCOL, "sum_rate", 0)
    (code, *_), names = LOADED.encode(stage, channel), matrices(stage)
    power = {name: float(code.sent[name].square().mean()) for name in names}
    assert len({round(value, 6) for value in power.values()}) > 1
    whole = sum(float(code.sent[name].square().sum()) for name in names)
    assert whole == pytest.approx(sum(float(stage.sent[0][name].square().sum()) for name in names), rel=1e-4)


def test_the_posterior_variance_is_the_error_of_the_fused_estimate(stage):
    heard = black_box(stage.sent, "ideal", 0)
    found = posterior_variance(heard)
    signal = 0.05**2  # the toy's vectors are white
    noise = signal * 10**1.62
    each = signal * noise / (signal + noise)
    large = [name for name in matrices(stage) if stage.sent[0][name].numel() >= 3000]
    assert large
    for name in large:
        assert found[name] == pytest.approx(0.3**2 * 8 * each, rel=0.15)


def test_every_realignment_trains_what_it_says(stage):
    model = METHODS["shrink"].make(stage, heard := black_box(stage.sent, "ideal", 0))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changed = {}
    for by in (everything, anchored, lora, normalisations):
        tuned = by(stage, stage_copy(stage, before), heard).state_dict()
        changed[by] = {name for name in before if not torch.equal(tuned[name], before[name])}
    assert changed[normalisations] == set(normalization_keys(model))
    assert changed[lora] <= {name for name, tensor in before.items() if tensor.ndim == 2}
    assert changed[lora]
    assert set(normalization_keys(model)) < changed[everything]
    assert len(changed[anchored]) == len(changed[everything])


def stage_copy(stage, state):
    model = stage.model()
    model.load_state_dict(state)
    return model


def test_the_anchor_holds_a_model_the_more_the_less_noise_there_is(stage):
    moved = {}
    for condition in ("ideal", "sum_rate"):
        heard = black_box(stage.sent, condition, 0)
        exact = replace(heard, vectors=stage.sent, reception=torch.full((8,), 1e-6, dtype=torch.float64))
        for name, known in (("noisy", heard), ("exact", exact)):
            model = METHODS["shrink"].make(stage, known)
            before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
            free = everything(stage, stage_copy(stage, before)).state_dict()
            tuned = anchored(stage, model, known).state_dict()
            far = [sum(float((end[key] - before[key]).square().sum()) for key in before) for end in (tuned, free)]
            moved[condition, name] = far[0] / far[1]
    assert moved["ideal", "exact"] < 0.1 * moved["ideal", "noisy"]
    assert all(share <= 1 for share in moved.values())


def test_the_number_of_steps_is_the_one_that_was_chosen(stage, monkeypatch):
    import protection.realignments as module

    heard = black_box(stage.sent, "ideal", 0)
    chosen = []
    original = module.steps_by_cross_validation

    def chooses(*arguments, **options):
        found = original(*arguments, **options)
        chosen.append(found)
        return replace(found, steps=0)

    monkeypatch.setattr(module, "steps_by_cross_validation", chooses)
    model = METHODS["shrink"].make(stage, heard)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    after = stopped(stage, model, heard).state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert chosen[0].evaluated[-1] == PROTOCOL.realignment_steps


def test_new_heads_are_what_is_evaluated(stage):
    method = REALIGNMENTS["shrink, heads"]
    model = method.make(stage, method.heard(stage, "black_box", "ideal"))
    own = {task: stage.world.arena(task).head.weight.clone() for task in PROTOCOL.tasks}
    heads = new_heads(stage, model)
    assert all(not torch.equal(heads[task].weight, own[task]) for task in own)
    assert all(torch.equal(stage.world.arena(task).head.weight, own[task]) for task in own)

    wrong = {task: torch.nn.Linear(8, 3, bias=False) for task in own}
    for head in wrong.values():
        torch.nn.init.zeros_(head.weight)  # always says class 0
    found = replace(method, heads=lambda stage, model: wrong).accuracies(stage, "black_box", "ideal")
    assert found == dict.fromkeys(own, pytest.approx(1 / 3))
    assert method.accuracies(stage, "black_box", "ideal") == stage.accuracies(model, heads)
