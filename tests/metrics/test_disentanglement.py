"""The weight disentanglement error against models that are really loaded and asked."""

import copy

import pytest
import torch
from torch import nn

from helpers.draws import gaussian
from helpers.entangled_tasks import entangled
from rmtllmf.errors import StateMismatchError
from rmtllmf.metrics import weight_disentanglement_error


@pytest.fixture(scope="module")
def setting():
    return entangled(classes=(3, 4, 5), sizes=(0.1, 0.1, 0.1))


def by_hand(setting, scale, single_scale):
    model, base, vectors, tasks = setting

    def loaded(taus, factor):
        fresh = copy.deepcopy(model).eval()
        fresh.load_state_dict({name: base[name] + factor * sum(tau[name] for tau in taus) for name in base})
        return fresh

    together, shares = loaded(vectors, scale), {}
    with torch.no_grad():
        for (name, (head, batches)), tau in zip(tasks.items(), vectors, strict=True):
            x = torch.cat([inputs for inputs, _ in batches])
            alone = loaded([tau], single_scale)
            shares[name] = (head(alone(x)).argmax(-1) != head(together(x)).argmax(-1)).double().mean().item()
    return shares


@pytest.mark.parametrize(
    ("options", "scales"),
    [({}, (0.3, 0.3)), ({"scale": 0.8}, (0.8, 0.8)), ({"scale": 0.5, "single_scale": 1.0}, (0.5, 1.0))],
    ids=["heuristic", "scale", "both"],
)
def test_against_loaded_models(setting, options, scales):
    expected = by_hand(setting, *scales)
    assert 0 < sum(expected.values()) < 3, "the setting must tell something"
    found = weight_disentanglement_error(*setting, **options)
    assert found.per_task == pytest.approx(expected)
    assert found.total == pytest.approx(sum(expected.values()))


def test_a_mapping_of_vectors_goes_by_name(setting):
    model, base, vectors, tasks = setting
    shuffled = {name: vectors["abc".index(name)] for name in "cab"}
    assert weight_disentanglement_error(model, base, shuffled, tasks) == weight_disentanglement_error(*setting)


def test_labels_play_no_part_and_nothing_is_touched(setting):
    model, base, vectors, tasks = setting
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    model.ln_pre.eval()
    weight_disentanglement_error(model, model, vectors, tasks)
    assert model.training
    assert not model.ln_pre.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, base[name]) for name, tensor in before.items())
    assert all(parameter.grad is None for parameter in model.parameters())


def linear(rows):
    return {"weight": torch.tensor(rows)}


def test_tasks_on_separate_features_do_not_interfere():
    """Each task looks at features of its own: total 0; where they share one, the larger vector wins."""
    model, base = nn.Linear(4, 2, bias=False), linear([[0.0] * 4] * 2)
    taus = [linear([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]), linear([[0, 0, 1.0, 0], [0, 0, 0, 1.0]])]
    eye = torch.eye(4)
    tasks = {"a": [(eye[:2], torch.arange(2))], "b": [(eye[2:], torch.arange(2))]}
    assert weight_disentanglement_error(model, base, taus, tasks).total == 0
    taus[1] = linear([[0, 9.0, 1.0, 0], [9.0, 0, 0, 1.0]])
    assert weight_disentanglement_error(model, base, taus, tasks).per_task == {"a": 1.0, "b": 0.0}


def test_buffers_come_from_base_and_torn_ties_are_refused():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3, bias=False)
            self.norm = nn.BatchNorm1d(3)
            self.last = nn.Linear(3, 3, bias=False)
            self.last.weight = self.first.weight

        def forward(self, x):
            return self.last(self.norm(self.first(x)))

    model = Tied()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    base["norm.running_mean"] = torch.tensor([1.0, -2.0, 0.5])
    bent = ("first.weight", "norm.weight", "norm.bias", "last.weight")
    vectors = [{name: gaussian(*base[name].shape, seed=k + 5 * i) for i, name in enumerate(bent)} for k in (1, 2)]
    torn = [dict(vector) for vector in vectors]  # as a channel bends the two names of a tied weight, one by one
    for vector in vectors:
        vector["last.weight"] = vector["first.weight"]
    x = gaussian(50, 3, seed=77)
    tasks = {"a": [(x, torch.zeros(50))], "b": [(x + 1, torch.zeros(50))]}
    with pytest.raises(StateMismatchError, match=r"'first.weight' and 'last.weight' are one tensor in the model"):
        weight_disentanglement_error(model, base, torn, tasks, scale=1.0)
    found = weight_disentanglement_error(model, base, vectors, tasks, scale=1.0)

    def predict(taus, inputs):
        fresh = Tied().eval()
        moved = {name: base[name] + sum(tau[name] for tau in taus) if name in bent else base[name] for name in base}
        fresh.load_state_dict(moved)
        return fresh(inputs).argmax(-1)

    for (name, [(inputs, _)]), tau in zip(tasks.items(), vectors, strict=True):
        share = (predict([tau], inputs) != predict(vectors, inputs)).double().mean()
        assert found.per_task[name] == pytest.approx(float(share))
    assert 0 < found.total < 2
    assert model.norm.num_batches_tracked == 0
