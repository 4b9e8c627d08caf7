"""A base plus vectors as a function of coefficients: values and gradients beside torch's own, ties, buffers, errors."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

from helpers.learned_world import Encoder, fingerprint, normal, same_fingerprint, vectors_of
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import TaskVector, task_arithmetic
from rmtllmf.taskvec._options import FusionOptions
from rmtllmf.taskvec.learned._interpolated import Interpolated, descend


def naive(model, vectors, weights, inputs, coefficients):
    """The loss as torch would differentiate it by the coefficients of every name."""
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for name in vectors[0]:
        for q, vector in enumerate(vectors):
            state[name] = state[name] + coefficients[name][q] * weights[q] * vector[name]
    state["again.weight"] = state["middle.weight"]
    return functional_call(model, state, (inputs,)).square().sum()


def test_values_and_gradients():
    model, inputs, weights = Encoder().eval(), normal(4, 5), [1.0, -0.5, 2.0]
    vectors = vectors_of(model)
    at = Interpolated(vectors, model, None, FusionOptions(weights=weights))
    assert len(at.layers) == len(vectors[0]) - 1  # two names are one tensor
    chosen = normal(len(at.layers), 3, seed=5)
    by_name = {
        name: row.clone().requires_grad_() for layer, row in zip(at.layers, chosen, strict=True) for name in layer.names
    }
    by_name["again.weight"] = by_name["middle.weight"]
    expected = naive(model, vectors, weights, inputs, by_name)
    expected.backward()
    before = fingerprint(model)
    value = at.at(chosen)(inputs).square().sum()
    torch.testing.assert_close(value, expected)
    descend(value, 1.0, at.parameters, "x")
    gradients = torch.stack([by_name[layer.names[0]].grad for layer in at.layers])
    torch.testing.assert_close(at.slopes(), gradients)
    same_fingerprint(fingerprint(model), before)


def test_gradients_of_several_losses_add_up_and_are_forgotten():
    model, inputs = Encoder().eval(), normal(4, 5)
    at = Interpolated(vectors_of(model), model, None, FusionOptions())
    chosen = torch.full((len(at.layers), 3), 0.3, dtype=torch.float64)

    def slopes(*shares):
        call = at.at(chosen)
        for share in shares:
            descend(call(inputs).square().sum(), share, at.parameters, "x")
        return at.slopes()

    torch.testing.assert_close(slopes(0.25, 0.5), 0.75 * slopes(1.0))


def test_the_weights_are_those_of_the_sum():
    model, inputs = Encoder().eval(), normal(4, 5)
    vectors = vectors_of(model)
    at = Interpolated(vectors, model, None, FusionOptions(weights={"enter.*": [1, 2, 3], "*": 0.5}, skip="gain"))
    chosen = normal(len(at.layers), 3, seed=6)
    weights = at.weights(chosen)
    assert list(weights) == [name for name in vectors[0] if name != "gain"]
    assert weights["middle.weight"] == weights["again.weight"]
    fused = task_arithmetic(vectors, 1.0, weights=weights, skip="gain").apply_to(model.state_dict())
    torch.testing.assert_close(at.at(chosen)(inputs), functional_call(model, fused, (inputs,)))


def test_a_base_that_is_not_the_model_and_one_name_of_a_tie():
    model, other, inputs = Encoder().eval(), Encoder().eval(), normal(4, 5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    vectors = [TaskVector({"again.weight": 0.1 * normal(6, 6)})]
    at = Interpolated(vectors, model, other.state_dict(), FusionOptions())
    call = at.at(torch.full((1, 1), 2.0, dtype=torch.float64))
    with torch.no_grad():
        other.middle.weight.add_(vectors[0]["again.weight"], alpha=2.0)
    torch.testing.assert_close(call(inputs), other(inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_half_precision_is_added_up_in_float32(dtype):
    model = nn.Linear(5, 3, dtype=dtype)
    vectors = [
        {name: 0.01 * normal(*t.shape, seed=q, dtype=dtype) for name, t in model.named_parameters()} for q in (0, 1)
    ]
    at = Interpolated(vectors, model, None, FusionOptions())
    call = at.at(torch.full((2, 2), 0.3))
    for layer, parameter in zip(at.layers, at.parameters, strict=True):
        name = layer.names[0]
        exact = model.state_dict()[name].double() + 0.3 * sum(v[name].double() for v in vectors)
        torch.testing.assert_close(
            parameter.detach(), exact.to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6
        )
    descend(call(normal(4, 5, dtype=dtype)).float().sum(), 1.0, at.parameters, "x")
    assert at.slopes().dtype == torch.float64
    assert at.slopes().all()


def test_tensors_of_several_dtypes():
    model = nn.Sequential(nn.Linear(5, 3, dtype=torch.float64), nn.Linear(3, 2))
    model[1].register_forward_pre_hook(lambda module, inputs: inputs[0].float())
    at = Interpolated(
        [{name: torch.ones_like(t) for name, t in model.state_dict().items()}], model, None, FusionOptions()
    )
    descend(at.at(torch.ones(4, 1))(normal(4, 5)).sum(), 1.0, at.parameters, "x")
    assert at.slopes().dtype == torch.float64
    assert at.slopes().all()


def test_empty_and_unused_tensors_have_no_slope():
    model = nn.ModuleDict({"used": nn.Linear(2, 2, bias=False), "unused": nn.Linear(2, 2, bias=False)})
    model.none = nn.Parameter(torch.zeros(0, 3))
    model.forward = model.used.forward
    vectors = [{name: torch.ones_like(t) for name, t in model.state_dict().items()}]
    at = Interpolated(vectors, model, None, FusionOptions())
    descend(at.at(torch.ones(3, 1))(torch.ones(1, 2)).sum(), 1.0, at.parameters, "x")
    slopes = {layer.names[0]: float(slope) for layer, slope in zip(at.layers, at.slopes(), strict=True)}
    assert slopes == {"none": 0.0, "used.weight": 4.0, "unused.weight": 0.0}


def test_bad_input():
    model = Encoder()
    vectors = vectors_of(model)
    options = FusionOptions()
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got dict"):
        Interpolated(vectors, {}, None, options)
    with pytest.raises(StateMismatchError, match="model lacks 'nowhere', which the vectors change"):
        Interpolated([{"nowhere": torch.ones(1)}], model, None, options)
    with pytest.raises(StateMismatchError, match=r"model\['gain'\] has shape \(\); vectors\[0\] has \(1,\)"):
        Interpolated([{"gain": torch.ones(1)}], model, None, options)
    with pytest.raises(StateMismatchError, match=r"model\['calls'\] is torch.int64, but the vectors change it"):
        Interpolated([{"calls": torch.tensor(1.0)}], model, None, options)
    with pytest.raises(StateMismatchError, match="base lacks"):
        Interpolated(vectors, model, {}, options)
    with pytest.raises(InputError, match="skip: 'nothing' matches none"):
        Interpolated(vectors, model, None, FusionOptions(skip="nothing"))
    apart = [{**vector, "again.weight": vector["again.weight"] + 1} for vector in vectors]
    with pytest.raises(StateMismatchError, match=r"'middle.weight' and 'again.weight' are one tensor in the model"):
        Interpolated(apart, model, None, options)
    with pytest.raises(StateMismatchError, match="are one tensor in the model"):
        Interpolated(vectors, model, None, FusionOptions(weights={"again.weight": 2, "*": 1}))
    broken = [dict(vector) for vector in vectors]
    broken[1]["gain"] = torch.tensor(float("nan"))
    with pytest.raises(NonFiniteError, match=r"vectors\[1\]\['gain'\] holds 1 non-finite entries"):
        Interpolated(broken, model, None, options)


def test_bad_losses():
    parameters = [torch.ones(2, requires_grad=True)]
    for value, error, message in (
        (1.0, TypeError, "loss: expected a tensor, got float for it"),
        (torch.ones(2), InputError, r"loss: expected one number, got shape \(2,\) for it"),
        (torch.tensor(float("nan")), NonFiniteError, "loss of it is nan"),
        (torch.tensor(1.0), InputError, "loss of it does not depend on what the vectors change"),
    ):
        with pytest.raises(error, match=message):
            descend(value, 1.0, parameters, "it")
