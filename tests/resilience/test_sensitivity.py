"""The ratio of two effects on outputs against closed forms of linear models, over many draws of the noise."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev

from rmtllmf.channel import Reception, UplinkScenario, sic, strongest_user_covariance, transmit
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.resilience import MeasuredSensitivity, measured_sensitivity
from rmtllmf.taskvec import TaskVector


def normal(*shape, seed=0):
    return torch.as_tensor(np.random.default_rng(seed).standard_normal(shape), dtype=torch.float32)


class Setting:
    """A linear model of which only some inputs are excited, and vectors that prefer these."""

    def __init__(self, inputs=200, outputs=150, users=2, excited=20, preference=3.0):
        self.model = nn.Linear(inputs, outputs, bias=False)
        with torch.no_grad():
            self.model.weight.copy_(0.1 * normal(outputs, inputs))
        some = (torch.arange(inputs) < excited).float()
        self.x = normal(16, inputs, seed=1) * some
        self.sent = [
            {"weight": (q + 1) * normal(outputs, inputs, seed=q + 2) * (1 + preference * some)} for q in range(users)
        ]
        self.ratio = self.exact(range(users))

    def exact(self, users):
        """sum tr(tau Sigma tau^T) / sum v outputs tr(Sigma)."""
        sigma = (self.x.T @ self.x / len(self.x)).double()
        tau = [self.sent[q]["weight"].double() for q in users]
        changed = sum(float(torch.trace(t @ sigma @ t.T)) for t in tau)
        white = sum(float(t.square().mean()) for t in tau) * len(tau[0]) * float(torch.trace(sigma))
        return changed / white


def many(setting, reception, draws, **options):
    """Estimates from `draws` transmissions."""
    estimator = options.get("estimator", "additive")
    scale = options.get("scale", "rms")
    return [
        measured_sensitivity(
            setting.model,
            transmit(setting.sent, reception, seed=seed, estimator=estimator, scale=scale),
            reception,
            [setting.x],
            seed=1000 + seed,
            **options,
        )
        for seed in range(draws)
    ]


def checked(found, true):
    """The mean within 4 standard errors, the errors that are told within a factor of 2 of the spread."""
    ratios = np.array([one.ratio for one in found])
    spread = ratios.std(ddof=1)
    told = np.sqrt(np.mean([one.error**2 for one in found]))
    assert abs(ratios.mean() - true) <= 4 * spread / len(found) ** 0.5
    assert 0.5 * spread <= told <= 2 * spread
    return spread


@pytest.mark.parametrize(("mse", "precise"), [(1.0, 0.05), (10.0, 0.3)])
def test_it_is_unbiased_and_its_error_is_told(mse, precise):
    setting = Setting()
    assert setting.ratio > 4
    assert checked(many(setting, [mse, mse], 40), setting.ratio) <= precise * setting.ratio


def test_the_error_told_holds_where_probes_add_little_to_it():
    """Then it is that of the noise that came along, and of its product with what was sent."""
    setting = Setting(inputs=100, outputs=60, excited=5)
    checked(many(setting, [1.0, 1.0], 25, probes=32), setting.ratio)


@pytest.mark.parametrize("estimator", ["mmse", "unbiased"])
def test_estimators_with_gains_in_blocks(estimator):
    setting = Setting()
    checked(many(setting, [[0.6, 0.2], [0.3, 0.8], [0.0, 0.5]], 25, estimator=estimator), setting.ratio)


def test_errors_that_are_correlated():
    up = UplinkScenario(num_users=4).draw(seed=1)
    C = strongest_user_covariance(up.H, up.P, 1000 * up.noise) + up.noise_covariance
    heard_as = sic(up.H, up.P, C, designed_for=up.noise_covariance, order="strongest_first")
    assert float(torch.as_tensor(heard_as.mse).mean()) > 0.3
    setting = Setting(inputs=100, outputs=100, users=4)
    checked(many(setting, heard_as, 25, probes=4), setting.ratio)


def test_the_error_told_is_larger_where_all_users_hear_the_same_noise():
    E = (10 * (0.99 + 0.01 * torch.eye(6, dtype=torch.float64))).to(torch.complex128)
    mse = torch.full((6,), 10.0, dtype=torch.float64)
    heard_as = Reception(mse, None, None, torch.ones_like(mse), None, E, E)
    setting = Setting(inputs=60, outputs=40, users=6, excited=4, preference=0.0)
    for vector in setting.sent:  # all users count alike
        vector["weight"] /= vector["weight"].square().mean().sqrt()
    checked(many(setting, heard_as, 25, probes=12), setting.exact(range(6)))


def test_blocks_of_which_the_first_is_without_noise():
    """Noise is drawn wherever there is some."""
    setting = Setting()
    checked(many(setting, [[0.0, 0.0], [2.0, 2.0]], 25, probes=4), setting.ratio)


def test_a_silent_user_is_left_out_of_both_sides():
    """Gain 0 for one user, in all blocks or in one: the ratio of what was heard."""
    setting = Setting()
    silent = transmit(setting.sent, [0.1, 1.0], seed=0, estimator="mmse")
    scale = [float(vector["weight"].square().mean().sqrt()) for vector in setting.sent]
    options = {"seed": 0, "estimator": "mmse", "scale": scale}
    kappa = measured_sensitivity(setting.model, silent, [0.1, 1.0], [setting.x], **options)
    assert kappa.ratio == pytest.approx(setting.exact([0]), rel=0.05)
    partly = [[0.1, 0.1], [1.0, 0.1]]
    heard = transmit(setting.sent, partly, seed=0, estimator="mmse")
    kappa = measured_sensitivity(setting.model, heard, partly, [setting.x], **options)
    assert kappa.ratio == pytest.approx(setting.ratio, rel=0.05)


def test_white_vectors_have_the_ratio_one_and_useless_ones_none():
    setting = Setting(preference=0.0)
    found = measured_sensitivity(setting.model, setting.sent, [0.0, 0.0], [setting.x], seed=0, probes=16)
    assert found.ratio == pytest.approx(setting.ratio, abs=4 * found.error)
    assert found.ratio == pytest.approx(1.0, rel=0.03)
    unseen = [{"weight": vector["weight"] * (setting.x[0] == 0)} for vector in setting.sent]
    found = measured_sensitivity(setting.model, transmit(unseen, [1.0, 1.0], seed=0), [1.0, 1.0], [setting.x], seed=0)
    assert abs(found.ratio) <= 4 * found.error
    assert found.error <= 0.1
    assert found.lower == 1.0


def test_a_model_that_is_not_linear_by_its_jacobian():
    """Without noise: sum |J tau|^2 over sum v_j |J_j|^2, tensor by tensor, within 4 of the errors told."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 40, bias=False), nn.Tanh(), nn.Linear(40, 20, bias=False)).double()
    x = normal(10, 16).double()
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    sent = [
        {key: (2 * k + 1) * (1 + normal(*t.shape, seed=9 * q + k)).double() for k, (key, t) in enumerate(state.items())}
        for q in (1, 2)
    ]
    jacobian = jacrev(lambda s: functional_call(model, s, (x,)))(state)
    changed = white = 0.0
    for vector in sent:
        moved = sum(torch.tensordot(jacobian[key], vector[key], vector[key].ndim) for key in state)
        changed += float(moved.square().sum())
        white += sum(float(vector[key].square().mean() * jacobian[key].square().sum()) for key in state)
    found = measured_sensitivity(model, sent, [0.0, 0.0], [x], seed=0, probes=200)
    assert abs(changed / white - 1) > 0.05
    assert found.error <= 0.02 * found.ratio
    assert found.ratio == pytest.approx(changed / white, abs=4 * found.error)


class Two(nn.Module):
    """Takes two inputs, has dropout, batch statistics, a tie, and something with logits as its output."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(40, 40, bias=False)
        self.norm = nn.BatchNorm1d(40)
        self.drop = nn.Dropout(0.5)
        self.b = nn.Linear(40, 40, bias=False)
        self.b.weight = self.a.weight

    def forward(self, left, right):
        hidden = self.drop(self.norm(self.a(left)))

        class Output:
            logits = self.b(hidden + right)

        return Output()


def two():
    torch.manual_seed(0)
    model = Two().train()
    model.drop.eval()  # modes of their own
    return model, normal(6, 40, seed=1), normal(6, 40, seed=2)


def vectors_for(model):
    return transmit(
        [{"a.weight": normal(40, 40, seed=q), "norm.bias": normal(40, seed=q)} for q in (3, 4)], [0.5, 0.5], seed=0
    )


def test_inputs_are_positional_or_named():
    model, left, right = two()
    received = vectors_for(model)
    kinds = ([(left, right)], [{"left": left, "right": right}], iter([(left[:2], right[:2]), (left[2:], right[2:])]))
    results = [measured_sensitivity(model, received, [0.5, 0.5], inputs, seed=0) for inputs in kinds]
    assert results[0] == results[1]
    assert results[2].ratio == pytest.approx(results[0].ratio, rel=1e-4)  # a mean over inputs, not over batches
    vectors = [TaskVector(vector) for vector in received]
    assert measured_sensitivity(model, vectors, [0.5, 0.5], [[left, right]], seed=0) == results[0]


def test_the_model_and_the_vectors_are_left_as_they_were():
    model, left, right = two()
    received = vectors_for(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    given = [{key: tensor.clone() for key, tensor in vector.items()} for vector in received]
    modes = [part.training for part in model.modules()]
    state = torch.get_rng_state()
    measured_sensitivity(model, received, [0.5, 0.5], [(left, right)], seed=0)
    assert [part.training for part in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(a[key], b[key]) for a, b in zip(received, given, strict=True) for key in a)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.b.weight is model.a.weight


def test_the_seed_decides():
    setting = Setting(inputs=30, outputs=20)
    received = transmit(setting.sent, [1.0, 1.0], seed=0)

    def run(seed):
        return measured_sensitivity(setting.model, received, [1.0, 1.0], [setting.x], seed=seed)

    assert run(3) == run(3)
    assert run(3) != run(4)
    source = torch.Generator().manual_seed(5)
    first, second = run(source), run(source)
    assert first != second
    assert first == run(torch.Generator().manual_seed(5))


def test_units_of_the_vectors_and_of_the_outputs_do_not_matter():
    setting = Setting(inputs=60, outputs=50)
    received = transmit(setting.sent, [1.0, 0.5], seed=0)
    one = measured_sensitivity(setting.model, received, [1.0, 0.5], [setting.x], seed=0)
    small = [{"weight": 1e-4 * vector["weight"]} for vector in received]
    two_ = measured_sensitivity(setting.model, small, [1.0, 0.5], [100 * setting.x], seed=0)
    assert two_.ratio == pytest.approx(one.ratio, rel=1e-3)
    assert two_.error == pytest.approx(one.error, rel=1e-2)


def test_what_is_safe_to_use():
    assert MeasuredSensitivity(10.0, 2.0).lower == 8.0
    assert MeasuredSensitivity(1.5, 2.0).lower == 1.0
    assert MeasuredSensitivity(-3.0, 1.0).lower == 1.0


def test_where_nothing_was_sent_or_nothing_changes():
    setting = Setting(inputs=30, outputs=20)
    nothing = [{"weight": torch.zeros(20, 30)}] * 2
    assert measured_sensitivity(setting.model, nothing, [0.1, 0.1], [setting.x], seed=0) == MeasuredSensitivity(
        1.0, 0.0
    )
    dark = [torch.zeros(4, 30)]
    assert measured_sensitivity(setting.model, setting.sent, [0.1, 0.1], dark, seed=0) == MeasuredSensitivity(1.0, 0.0)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), x


MODEL = nn.Linear(3, 2, bias=False)
GOOD = [{"weight": torch.ones(2, 3)}]
X = torch.ones(4, 3)
BAD = {
    "no inputs": ((MODEL, GOOD, [0.1], []), {}, InputError, "inputs: expected at least one batch, got none"),
    "empty": ((MODEL, GOOD, [0.1], [X[:0]]), {}, InputError, "inputs: expected at least one input, got empty"),
    "one tensor": ((MODEL, GOOD, [0.1], X), {}, TypeError, "inputs: expected batches of inputs.* got Tensor"),
    "one mapping": ((MODEL, GOOD, [0.1], {"x": X}), {}, TypeError, "inputs: expected batches of inputs.* got dict"),
    "no batches": ((MODEL, GOOD, [0.1], 3), {}, TypeError, "inputs: expected batches of inputs.* got int"),
    "one probe": (
        (MODEL, GOOD, [0.1], [X]),
        {"probes": 1},
        InputError,
        "probes: expected a whole number of at least",
    ),
    "probes": ((MODEL, GOOD, [0.1], [X]), {"probes": 2.5}, TypeError, "probes: expected an int, got float"),
    "seed": ((MODEL, GOOD, [0.1], [X]), {"seed": None}, TypeError, "seed: expected an int or a torch.Generator"),
    "unknown": ((MODEL, [{"w": torch.ones(2, 3)}], [0.1], [X]), {}, StateMismatchError, "received has 'w'|'w'"),
    "shape": ((MODEL, [{"weight": torch.ones(3, 2)}], [0.1], [X]), {}, StateMismatchError, "received.*shape"),
    "users": ((MODEL, GOOD, [0.1, 0.1], [X]), {}, ShapeError, "1 vectors"),
    "scale": ((MODEL, GOOD, [0.1], [X]), {"scale": "peak"}, InputError, "scale: the peak"),
    "estimator": ((MODEL, GOOD, [0.1], [X]), {"estimator": "best"}, InputError, "estimator: expected one of"),
    "NaN": ((MODEL, [{"weight": torch.full((2, 3), math.nan)}], [0.1], [X]), {}, NonFiniteError, "holds NaN"),
    "infinite outputs": ((MODEL, GOOD, [0.1], [X * math.inf]), {}, NonFiniteError, "outputs are not finite"),
    "no logits": (
        (Pair(3, 2, bias=False), GOOD, [0.1], [X]),
        {},
        TypeError,
        "expected a tensor, or something",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    arguments, options, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        measured_sensitivity(*arguments, **{"seed": 0, **options})
