"""`protect` is its steps by hand, touches nothing when it refuses, and is worth it on tasks made in a second."""

import copy
import math
import weakref
from functools import lru_cache, partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from rmtllmf.channel import Reception, UplinkScenario, lmmse, sic, strongest_user_covariance, transmit
from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.resilience import joint_shrink, measured_sensitivity, protect, realign, search_scale
from rmtllmf.resilience._protection import Protection, TensorReport
from rmtllmf.resilience._screening import Uplink
from rmtllmf.resilience.protect import _REFINEMENTS, _SCALES
from rmtllmf.taskvec import TaskVector, task_arithmetic, ties

NAN = float("nan")


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def encoder(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16))


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, state):
    return all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def vectors_like(state, users=4, size=0.05):
    return [
        {name: size * gaussian(*tensor.shape, seed=100 * q + k) for k, (name, tensor) in enumerate(state.items())}
        for q in range(users)
    ]


@pytest.fixture
def setting():
    base = state_of(encoder())
    heard = transmit(vectors_like(base), 0.3, seed=0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = [nn.Linear(16, 3) for _ in range(2)]
    tasks = {
        name: (heads[k], [(gaussian(6, 24, seed=7 * k + i), torch.arange(6) % 3) for i in range(2)])
        for k, name in enumerate("ab")
    }
    return base, heard, tasks


class TestComposition:
    def test_without_samples_it_is_shrink_and_rule(self, setting):
        base, heard, _ = setting
        model = encoder(1)
        done = protect(model, base, heard, 0.3, seed=0, sensitivity={"0.*": 4.0}, rule=partial(ties, density=0.5))
        estimates = joint_shrink(heard, 0.3, sensitivity={"0.*": 4.0})
        update = ties(estimates, density=0.5)
        assert same(model, update.apply_to(base))
        assert all(torch.equal(done.update[name], update[name]) for name in update)
        assert (done.users, dict(done.reasons), done.scale) == ((0, 1, 2, 3), {}, 1.0)
        assert done.sensitivity is None
        assert done.realignment is None
        for name, report in done.tensors.items():
            before, after = (torch.stack([v[name] for v in vectors]).norm() for vectors in (heard, estimates))
            assert report.kept == pytest.approx(float(after / before))

    def test_sensitivity_is_measured_on_the_base_model_with_the_inputs(self, setting):
        base, sent = setting[0], vectors_like(setting[0])
        there = (torch.arange(24) < 6).float()  # of the inputs, and of what was tuned
        for vector in sent:
            vector["0.weight"] *= 4 * there
        heard = transmit(sent, 0.3, seed=0)
        model, inputs = encoder(1), [gaussian(8, 24, seed=3) * there, gaussian(4, 24, seed=4) * there]
        done = protect(model, base, heard, 0.3, seed=5, inputs=iter(inputs))
        measured = measured_sensitivity(encoder(), heard, 0.3, inputs, seed=5)
        assert done.sensitivity == measured
        assert measured.lower > 1.5  # so that it matters
        assert same(model, task_arithmetic(joint_shrink(heard, 0.3, sensitivity=measured.lower)).apply_to(base))

    def test_with_samples_it_is_also_search_and_realign(self, setting):
        base, heard, tasks = setting
        model, peer = encoder(1), encoder(2)
        done = protect(model, base, heard, 0.3, tasks, seed=5, steps=4, lr=1e-3)
        firsts = [batches[0][0] for _, batches in tasks.values()]
        measured = measured_sensitivity(encoder(), heard, 0.3, firsts, seed=5)
        update = task_arithmetic(joint_shrink(heard, 0.3, sensitivity=measured.lower))
        found = search_scale(peer, base, update, tasks, scales=_SCALES, refinements=_REFINEMENTS)
        peer.load_state_dict((update * found.scale).apply_to(base))
        realigned = realign(peer, tasks, steps=4, lr=1e-3)
        assert done.sensitivity == measured
        assert done.scale == found.scale not in (0.0, 1.0)
        assert done.realignment.losses == realigned.losses
        assert same(model, peer.state_dict())

    def test_the_scale_is_searched_with_what_is_frozen_at_the_base(self, setting):
        base, heard, tasks = setting
        model, frozen = encoder(1), (name for name in ("0.*",))
        done = protect(model, base, heard, 0.3, tasks, seed=0, sensitivity=1.0, steps=0, frozen=frozen)
        update = task_arithmetic(joint_shrink(heard, 0.3))
        rest = update.select("2.*")
        found = search_scale(encoder(), base, rest, tasks, scales=_SCALES, refinements=_REFINEMENTS)
        everything = search_scale(encoder(), base, update, tasks, scales=_SCALES, refinements=_REFINEMENTS)
        assert done.scale == found.scale != everything.scale
        assert same(model, (rest * found.scale).apply_to(base))

    def test_without_search_the_scale_is_the_rules(self, setting):
        base, heard, tasks = setting
        model = encoder(1)
        done = protect(model, base, heard, 0.3, tasks, seed=0, sensitivity=1.0, search=False, steps=0)
        assert done.scale == 1
        assert same(model, task_arithmetic(joint_shrink(heard, 0.3)).apply_to(base))

    def test_without_noise_it_is_task_arithmetic(self, setting):
        base, _, _ = setting
        sent, model = vectors_like(base), encoder(1)
        done = protect(model, base, sent, 0.0, seed=0)
        assert same(model, task_arithmetic(sent).apply_to(base))
        assert {(report.kept, str(report).split()[0]) for report in done.tensors.values()} == {(1.0, "no")}

    @pytest.mark.parametrize("seed", range(3))
    def test_hopeless_noise_leaves_the_base(self, setting, seed):
        """-40 dB. The energies are known to sqrt(2/n) of the noise's, n = 1328 coefficients times 4 users: .02, so that
        up to about 3 x .02 of the noise may be taken for signal; unprotected, all of it comes in."""
        base, _, _ = setting
        heard = transmit(vectors_like(base), 1e4, seed=seed)
        model = encoder(1)
        protect(model, base, heard, 1e4, seed=0)
        protected = TaskVector.between(base, model.state_dict()).norm()
        unprotected = task_arithmetic(heard).norm()
        assert protected < 0.06 * unprotected
        assert unprotected > 100 * task_arithmetic(vectors_like(base)).norm() / 2

    def test_the_same_seed_gives_the_same_bits(self, setting):
        base, heard, tasks = setting
        results = []
        for seed in (3, 3, 4, torch.Generator().manual_seed(3)):
            model = encoder(1)
            done = protect(model, base, heard, 0.3, tasks, seed=seed, steps=1)
            results.append((done.sensitivity.ratio, state_of(model)))
        assert results[0][0] == results[1][0]
        assert same(encoder(), base)
        assert all(torch.equal(results[0][1][name], results[1][1][name]) for name in base)
        assert len({ratio for ratio, _ in results}) == 3


class TestForms:
    @pytest.mark.parametrize("source", ["itself", "module", "state dict"])
    def test_any_base(self, setting, source):
        _, heard, tasks = setting
        expected, model = encoder(5), encoder(0 if source == "itself" else 5)
        given = {"itself": model, "module": encoder(), "state dict": encoder().state_dict()}[source]
        protect(expected, state_of(encoder()), heard, 0.3, tasks, seed=0, steps=2)
        protect(model, given, heard, 0.3, tasks, seed=0, steps=2)
        assert same(model, expected.state_dict())

    def test_vectors_may_be_mixed_and_come_from_a_generator(self, setting):
        base, heard, _ = setting
        model, peer = encoder(1), encoder(2)
        mixed = (TaskVector(vector) if q % 2 else vector for q, vector in enumerate(heard))
        protect(model, base, mixed, 0.3, seed=0)
        protect(peer, base, heard, 0.3, seed=0)
        assert same(model, peer.state_dict())

    def test_what_is_not_sent_stays_and_what_is_not_a_parameter_too(self):
        model = nn.Sequential(nn.Linear(30, 30), nn.BatchNorm1d(30))
        model(gaussian(9, 30))  # running statistics of its own
        base = state_of(model)
        sent = [
            {
                "0.weight": gaussian(30, 30, seed=q),
                "1.running_mean": torch.full((30,), 9.0),
                "1.num_batches_tracked": torch.tensor(99),
            }
            for q in range(3)
        ]
        done = protect(model, base, sent, 0.5, [(gaussian(6, 30), torch.arange(6))], seed=0, steps=0, search=False)
        assert list(done.tensors) == list(done.update) == ["0.weight"]
        assert not torch.equal(model[0].weight, base["0.weight"])
        assert all(torch.equal(model.state_dict()[name], base[name]) for name in base if name != "0.weight")

    def test_bare_batches_of_a_complete_model_and_inputs_of_two_parts(self):
        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.inner = nn.Linear(24, 4)

            def forward(self, left, right):
                return self.inner(torch.cat([left, right], dim=1))

        model = Two()
        base = state_of(model)
        heard = transmit(vectors_like(base, size=0.5), 0.1, seed=0)
        batches = [((gaussian(8, 12), gaussian(8, 12, seed=1)), torch.arange(8) % 4)]
        done = protect(model, base, heard, 0.1, batches, seed=0, steps=2)
        named = Two()
        again = protect(named, base, heard, 0.1, {"t": batches}, seed=0, steps=2)
        assert done.sensitivity == again.sensitivity is not None
        assert done.realignment.losses == again.realignment.losses
        assert same(model, named.state_dict())

    def test_ties_of_the_model_hold(self):
        model = nn.Sequential(nn.Embedding(6, 50), nn.Linear(50, 6, bias=False))
        model[1].weight = model[0].weight
        base = state_of(model)
        base["1.weight"] = base["0.weight"]
        sent = [dict.fromkeys(("0.weight", "1.weight"), gaussian(6, 50, seed=q)) for q in range(3)]
        heard = transmit(sent, 0.1, seed=0)
        batches = [(torch.arange(6), torch.arange(6))]
        done = protect(model, base, heard, 0.1, batches, seed=0, steps=2, search=False)
        assert model[1].weight is model[0].weight
        assert list(done.tensors) == ["0.weight"]
        assert not torch.equal(model[0].weight, base["0.weight"])

    def test_a_torn_tie_is_refused_unless_frozen(self):
        model = nn.Sequential(nn.Embedding(6, 50), nn.Linear(50, 6, bias=False), nn.Linear(6, 6))
        model[1].weight = model[0].weight
        base = state_of(model)
        heard = vectors_like(base, users=3)
        batches = [(torch.arange(6), torch.arange(6))]
        for samples in (None, batches):
            with pytest.raises(StateMismatchError, match="one tensor in the model"):
                protect(model, base, heard, 0.1, samples, seed=0)
            assert same(model, base)
        protect(model, base, heard, 0.1, batches, seed=0, steps=2, frozen="1.*", sensitivity=1.0, search=False)
        assert torch.equal(model[0].weight, base["0.weight"])
        assert not torch.equal(model[2].weight, base["2.weight"])

    def test_an_iterator_is_realigned_on_what_was_kept_of_it(self, setting):
        base, heard, tasks = setting
        results = []
        for stream in (False, True):
            model = encoder(1)
            given = {name: (head, iter(list(b)) if stream else list(b)) for name, (head, b) in tasks.items()}
            done = protect(model, base, heard, 0.3, given, seed=0, steps=5)
            results.append((done.realignment.losses, done.scale))
        assert results[0] == results[1]

    def test_a_loader_is_gone_through_once_before_it_is_realigned_on(self, setting):
        base, heard, _ = setting
        passes = []

        class Counted(DataLoader):
            def __iter__(self):
                passes.append(1)
                return super().__iter__()

        loader = Counted(TensorDataset(gaussian(9, 24), torch.arange(9)), batch_size=3, shuffle=True)
        done = protect(encoder(), base, heard, 0.3, loader, seed=0, steps=0)
        assert len(passes) == 1
        assert done.realignment.losses == ()
        protect(encoder(), base, heard, 0.3, loader, seed=0, steps=4)  # three batches a pass
        assert len(passes) == 1 + 1 + 2

    def test_estimates_are_let_go_of_before_the_search(self, setting):
        base, heard, tasks = setting
        alive, seen = [], []

        def rule(vectors):
            alive.extend(weakref.ref(vector["0.weight"]) for vector in vectors)
            return task_arithmetic(vectors)

        def loss(logits, targets):
            seen.append(sum(ref() is not None for ref in alive))
            return cross_entropy(logits, targets)

        protect(encoder(), base, heard, 0.3, tasks, seed=0, rule=rule, loss=loss, steps=1)
        assert len(alive) == 4
        assert set(seen) == {0}


def uplink_of(users=4, antennas=8, draws=()):
    up = UplinkScenario(num_users=users, num_antennas=antennas).draw(*draws, seed=3)
    C = strongest_user_covariance(up.H, up.P, 124 * up.noise) + up.noise_covariance
    return up, C


@lru_cache
def receptions():
    up, C = uplink_of()
    blocks, several = uplink_of(draws=(3,))
    found = {
        "sic": sic(up.H, up.P, C, designed_for=up.noise_covariance, order="strongest_first"),
        "lmmse": lmmse(up.H, up.P, C),
        "blocks": sic(blocks.H, blocks.P, several, designed_for=blocks.noise_covariance),
    }
    to_torch = {
        name: Reception(
            *(None if v is None else torch.as_tensor(v) for v in vars(reception).values()),
        )
        for name, reception in found.items()
    }
    return {**found, **{f"{name}, torch": reception for name, reception in to_torch.items()}}


KEPT = [0, 2, 3]


class TestUsersLeftOut:
    def poisoned(self, base, reception, **options):
        heard = transmit(vectors_like(base), reception, seed=0, **options)
        heard[1]["0.bias"][3] = NAN
        return heard

    @pytest.mark.parametrize("name", ["sic", "lmmse", "blocks", "sic, torch", "lmmse, torch", "blocks, torch"])
    def test_a_reception_of_the_rest(self, name):
        reception = receptions()[name]
        rest = Uplink(tuple(range(4)), [{}] * 4, reception, "additive", "rms").only(KEPT)
        grid = np.ix_(KEPT, KEPT)
        for field in ("mse", "sinr", "rate", "gain"):
            given, part = np.asarray(getattr(reception, field)), getattr(rest.reception, field)
            assert type(part) is type(reception.mse)
            np.testing.assert_array_equal(np.asarray(part), given.reshape(-1, 4)[:, KEPT].reshape(part.shape))
        for field in ("error_covariance", "noise_covariance"):
            given, part = np.asarray(getattr(reception, field)), np.asarray(getattr(rest.reception, field))
            for matrix, smaller in zip(given.reshape(-1, 4, 4), part.reshape(-1, 3, 3), strict=True):
                np.testing.assert_array_equal(smaller, matrix[grid])
        if "lmmse" in name:
            assert rest.reception.order is None
            return
        assert type(rest.reception.order) is type(reception.order)
        given, part = np.asarray(reception.order).reshape(-1, 4), np.asarray(rest.reception.order).reshape(-1, 3)
        assert [[KEPT[u] for u in row] for row in part] == [[u for u in row if u != 1] for row in given.tolist()]

    @pytest.mark.parametrize(
        ("reception", "rest"),
        [
            (0.3, 0.3),
            (torch.tensor(0.3), 0.3),
            ([0.1, 0.2, 0.3, 0.4], [0.1, 0.3, 0.4]),
            ((0.1, 0.2, 0.3, 0.4), [0.1, 0.3, 0.4]),
            (np.array([0.1, 0.2, 0.3, 0.4]), [0.1, 0.3, 0.4]),
            ([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]], [[0.1, 0.3, 0.4], [0.5, 0.7, 0.8]]),
            (torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]]), [[0.1, 0.3, 0.4], [0.5, 0.7, 0.8]]),
        ],
    )
    def test_mses_of_the_rest(self, setting, reception, rest):
        base = setting[0]
        heard = self.poisoned(base, reception)
        model = encoder(1)
        done = protect(model, base, heard, reception, seed=0)
        assert done.users == (0, 2, 3)
        assert dict(done.reasons) == {1: "1 entries are not finite"}
        single = torch.float32 if isinstance(reception, torch.Tensor) else torch.float64
        estimates = joint_shrink([heard[q] for q in KEPT], torch.tensor(rest, dtype=single))
        assert same(model, task_arithmetic(estimates).apply_to(base))

    @pytest.mark.parametrize("name", ["sic", "lmmse", "blocks, torch"])
    def test_the_rest_is_fused_with_its_own_noise(self, setting, name):
        """The marginal of a joint normal law: nothing that is drawn for the rest depends on who is left out."""
        base, reception = setting[0], receptions()[name]
        heard = self.poisoned(base, reception, estimator="mmse")
        model = encoder(1)
        done = protect(model, base, heard, reception, seed=0, estimator="mmse")
        assert 1 in done.reasons
        places = list(done.users)
        fields = {
            key: None if value is None else np.asarray(value)[..., places] for key, value in vars(reception).items()
        }
        for key in ("error_covariance", "noise_covariance"):
            fields[key] = fields[key][..., places, :]
        estimates = joint_shrink([heard[q] for q in places], Reception(**fields), estimator="mmse")
        for key, tensor in task_arithmetic(estimates).apply_to(base).items():
            torch.testing.assert_close(model.state_dict()[key], tensor)

    @pytest.mark.parametrize(
        "scale", [[0.04, 0.05, 0.06, 0.05], (0.04, 0.05, 0.06, 0.05), np.array([0.04, 0.05, 0.06, 0.05]), "tensor_rms"]
    )
    def test_scales_of_the_rest(self, setting, scale):
        base = setting[0]
        heard = self.poisoned(base, 0.3)
        model = encoder(1)
        protect(model, base, heard, 0.3, seed=0, scale=scale)
        rest = scale if isinstance(scale, str) else [0.04, 0.06, 0.05]
        estimates = joint_shrink([heard[q] for q in KEPT], 0.3, scale=rest)
        assert same(model, task_arithmetic(estimates).apply_to(base))

    @pytest.mark.parametrize("scale", [0.05, torch.tensor(0.05), np.float64(0.05), np.array(0.05)])
    def test_one_scale_for_all(self, setting, scale):
        base = setting[0]
        model, peer = encoder(1), encoder(2)
        protect(model, base, self.poisoned(base, 0.3), 0.3, seed=0, scale=scale)
        protect(peer, base, self.poisoned(base, 0.3), 0.3, seed=0, scale=float(scale))
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, peer.state_dict()[name])

    def test_a_liar_is_left_out_and_named(self, setting):
        base = setting[0]
        sent = vectors_like(base)
        sent[2] = {name: 100 * tensor for name, tensor in sent[2].items()}
        heard = transmit(sent, 0.1, seed=0)
        model = encoder(1)
        done = protect(model, base, heard, 0.1, seed=0)
        assert done.users == (0, 1, 3)
        assert "user 2 left out: norm is" in repr(done)
        estimates = joint_shrink([heard[q] for q in (0, 1, 3)], 0.1)
        assert same(model, task_arithmetic(estimates).apply_to(base))
        believed = protect(model, base, heard, 0.1, seed=0, screen=False)
        assert believed.users == (0, 1, 2, 3)
        assert believed.update.norm() > 10 * done.update.norm()

    @pytest.mark.parametrize("users", [1, 2])
    def test_of_few_only_those_with_entries_that_are_not_finite(self, setting, users):
        base, heard, _ = setting
        opposed = [heard[0], {name: -50 * tensor for name, tensor in heard[0].items()}][:users]
        assert protect(encoder(), base, opposed, 0.3, seed=0).users == tuple(range(users))
        opposed[0]["0.bias"][0] = math.inf
        if users == 1:
            with pytest.raises(InputError, match=r"nobody is left to fuse \(user 0: 1 entries"):
                protect(encoder(), base, opposed, 0.3, seed=0)
        else:
            assert protect(encoder(), base, opposed, 0.3, seed=0).users == (1,)
        with pytest.raises(NonFiniteError, match="received"):
            protect(encoder(), base, opposed, 0.3, seed=0, screen=False)

    def test_users_are_named_by_their_place_among_all(self, setting):
        base, heard, _ = setting
        heard[0]["0.bias"][0] = NAN
        copied = [*heard, {name: tensor.clone() for name, tensor in heard[3].items()}]
        assert dict(protect(encoder(), base, copied, 1e-6, seed=0).reasons) == {
            0: "1 entries are not finite",
            4: "is the vector of user 3 (cosine 1.00)",
        }

    def test_one_infinite_entry_does_not_bring_the_others_down(self, setting):
        base, heard, _ = setting
        heard[2]["0.bias"][:2] = math.inf
        assert dict(protect(encoder(), base, heard, 0.3, seed=0).reasons) == {2: "2 entries are not finite"}

    def test_a_user_who_is_silent_in_a_block(self, setting):
        """Cannot be screened; the joint posterior mean copes, and leaves 0 where nothing was heard of a user alone."""
        base = setting[0]
        mses = [[0.3, 0.3, 0.3, 0.3], [0.3, 0.3, 1.0, 0.3]]
        heard = transmit(vectors_like(base), mses, seed=0, estimator="mmse")
        heard[0]["0.bias"][0] = NAN
        model = encoder(1)
        with pytest.raises(InputError, match=r"the gain of user 2 is 0 in block 1.*screen=False"):
            protect(model, base, heard, mses, seed=0, estimator="mmse")
        assert same(model, encoder(1).state_dict())
        rest = [row[1:] for row in mses]
        done = protect(model, base, heard[1:], rest, seed=0, estimator="mmse", screen=False)
        assert all(math.isfinite(report.noise) for report in done.tensors.values())
        estimates = joint_shrink(heard[1:], rest, estimator="mmse")
        assert same(model, task_arithmetic(estimates).apply_to(base))
        two = [[row[0], row[2]] for row in mses]
        sent = transmit(vectors_like(base)[:2], two, seed=0, estimator="mmse")
        assert protect(model, base, sent, two, seed=0, estimator="mmse").users == (0, 1)

    def test_a_user_who_is_not_heard(self, setting):
        """The "mmse" estimate of a user with an MSE of 1 is 0."""
        base, _, _ = setting
        mses = [0.3, 1.0, 0.3, 0.3]
        heard = transmit(vectors_like(base), mses, seed=0, estimator="mmse")
        model, peer = encoder(1), encoder(2)
        done = protect(model, base, heard, mses, seed=0, estimator="mmse")
        assert dict(done.reasons) == {1: "was not heard: its gain is 0"}
        protect(peer, base, [heard[q] for q in KEPT], 0.3, seed=0, estimator="mmse")
        assert same(model, peer.state_dict())
        with pytest.raises(InputError, match=r"nobody is left .* user 3: was not heard"):
            protect(model, base, heard, 1.0, seed=0, estimator="mmse")
        silent = protect(model, base, heard, 1.0, seed=0, estimator="mmse", screen=False)
        assert same(model, base)
        assert "no signal  0.000" in repr(silent)


BAD = [
    ({"model": 3}, TypeError, "model: expected a torch.nn.Module, got int"),
    ({"base": {"w": torch.ones(2)}}, StateMismatchError, "base lacks"),
    ({"base": encoder().double().state_dict()}, StateMismatchError, r"base\['0.weight'\] is torch.float64"),
    ({"received": []}, InputError, "received: expected at least one"),
    ({"received": {"w": torch.ones(2)}}, TypeError, "received: expected a sequence.*single dict"),
    ({"received": 3}, TypeError, "received: .*int"),
    ({"received": [{"w": torch.ones(2)}] * 4}, StateMismatchError, "base lacks 'w', which received names"),
    ({"received": [{"0.bias": torch.ones(2)}] * 4}, StateMismatchError, r"received\[0\]\['0.bias'\] has shape"),
    ({"reception": [0.1, 0.2]}, ShapeError, "4 vectors"),
    ({"reception": -1.0}, InputError, "mse"),
    ({"seed": "0"}, TypeError, "seed"),
    ({"estimator": "best"}, InputError, "estimator"),
    ({"scale": "peak"}, InputError, "scale"),
    ({"scale": [1.0, 2.0]}, ShapeError, "scale"),
    ({"inputs": torch.ones(2, 24)}, TypeError, "inputs: expected batches.*Tensor"),
    ({"inputs": []}, InputError, "inputs: expected at least one batch"),
    ({"inputs": [torch.ones(2, 24)], "sensitivity": 2.0}, InputError, "inputs: .*leave out one of the two"),
    ({"sensitivity": -1.0}, InputError, "sensitivity"),
    ({"sensitivity": {"nothing": 1.0}}, InputError, "sensitivity: 'nothing' matches none"),
    ({"screen": "no"}, TypeError, "screen: expected True or False, got str"),
    ({"search": 1}, TypeError, "search: expected True or False, got int"),
    ({"rule": "ties"}, TypeError, "rule: expected a function"),
    ({"steps": -1}, InputError, "steps"),
    ({"steps": 1.5}, TypeError, "steps"),
    ({"frozen": "nothing.*"}, InputError, "frozen: 'nothing.*' matches none"),
    ({"frozen": ["*"]}, InputError, "nothing to train"),
    ({"loss": None}, TypeError, "loss"),
    ({"lr": 0.0}, InputError, "lr"),
    ({"tasks_or_batches": {}}, InputError, "tasks_or_batches: expected at least one task"),
    ({"tasks_or_batches": []}, InputError, "tasks_or_batches: expected at least one batch"),
    ({"tasks_or_batches": iter([])}, InputError, "tasks_or_batches: .*used up"),
    ({"tasks_or_batches": [torch.ones(2, 24)]}, TypeError, "tasks_or_batches: .*bare tensor"),
    (
        {"tasks_or_batches": [(torch.ones(0, 24), torch.zeros(0).long())]},
        InputError,
        "tasks_or_batches: expected at least one sample",
    ),
    ({"tasks_or_batches": dict.fromkeys("ab", iter([(torch.ones(1, 24), torch.zeros(1))]))}, InputError, "share"),
]


class TestState:
    @pytest.mark.parametrize(("change", "error", "pattern"), BAD, ids=[pattern for *_, pattern in BAD])
    def test_a_wrong_argument_leaves_the_model_untouched(self, setting, change, error, pattern):
        base, heard, tasks = setting
        model = encoder(1)
        before = state_of(model)
        arguments = {"received": heard, "reception": 0.3, "tasks_or_batches": tasks, "seed": 0, **change}
        with pytest.raises(error, match=pattern):
            protect(arguments.pop("model", model), arguments.pop("base", base), **arguments)
        assert same(model, before)

    def test_options_are_checked_without_samples_too(self, setting):
        base, heard, _ = setting
        for change, error, pattern in BAD:
            if {"steps", "loss", "lr"} & set(change):
                with pytest.raises(error, match=pattern):
                    protect(encoder(), base, heard, 0.3, seed=0, **change)

    @pytest.mark.parametrize(
        ("rule", "error", "pattern"),
        [
            (lambda vectors: 3, TypeError, "rule: expected it to return a mapping.*int"),
            (lambda vectors: {"w": torch.ones(2)}, StateMismatchError, "rule's result has the unexpected 'w'"),
            (lambda vectors: 1 / 0, ZeroDivisionError, "zero"),
        ],
    )
    def test_a_rule_that_fails_leaves_the_base_model_at_worst(self, setting, rule, error, pattern):
        base, heard, tasks = setting
        model = encoder(1)
        before = state_of(model)
        with pytest.raises(error, match=pattern):
            protect(model, base, heard, 0.3, seed=0, rule=rule)
        assert same(model, before)
        with pytest.raises(error, match=pattern):
            protect(model, base, heard, 0.3, tasks, seed=0, rule=rule)
        assert same(model, base)

    @pytest.mark.parametrize("fails_at", [1, 5, None])
    def test_flags_and_modes_stay_and_an_error_in_the_search_leaves_the_base(self, setting, fails_at):
        base, heard, tasks = setting
        model = nn.Sequential(*encoder(1), nn.Dropout(0.5))
        model.train()
        model[2].eval()
        model[0].bias.requires_grad_(False)
        model[2].weight.grad = torch.ones(32 // 2, 32)
        head = tasks["a"][0]
        calls = []

        def loss(logits, targets):
            calls.append(1)
            if fails_at is not None and len(calls) >= fails_at:
                raise RuntimeError("no loss")
            return cross_entropy(logits, targets)

        if fails_at is None:
            protect(model, base, heard, 0.3, tasks, seed=0, steps=2, loss=loss)
            assert torch.equal(model[0].bias, model[0].bias.detach())
        else:
            with pytest.raises(RuntimeError, match="no loss"):
                protect(model, base, heard, 0.3, tasks, seed=0, steps=2, loss=loss)
            assert same(model, base)
        assert [part.training for part in model] == [True, True, False, True]
        assert (model.training, head.training) == (True, True)
        assert [p.requires_grad for p in model.parameters()] == [True, False, True, True]
        assert torch.equal(model[2].weight.grad, torch.ones(16, 32))
        assert model[0].weight.grad is None
        assert all(p.grad is None and p.requires_grad for p in head.parameters())

    def test_an_error_in_the_realignment_leaves_the_fused_model(self, setting):
        base, heard, tasks = setting
        model = encoder(1)
        with pytest.raises(NonFiniteError, match="in step 0"):
            protect(
                model,
                base,
                heard,
                0.3,
                tasks,
                seed=0,
                sensitivity=1.0,
                search=False,
                loss=lambda logits, targets: NAN * logits.sum(),
            )
        assert same(model, task_arithmetic(joint_shrink(heard, 0.3)).apply_to(base))

    def test_received_vectors_are_not_written_to(self, setting):
        base, heard, tasks = setting
        before, kept = copy.deepcopy(heard), copy.deepcopy(base)
        protect(encoder(1), base, heard, 0.3, tasks, seed=0, steps=2, rule=lambda vectors: vectors[0])
        for vector, copied in zip(heard, before, strict=True):
            assert all(torch.equal(vector[name], copied[name]) for name in copied)
        assert all(torch.equal(base[name], kept[name]) for name in base)

    def test_the_report_cannot_be_changed(self, setting):
        base, heard, _ = setting
        done = protect(encoder(), base, heard, 0.3, seed=0)
        for mapping in (done.reasons, done.tensors):
            with pytest.raises(TypeError):
                mapping["x"] = 1


class TestReport:
    def test_a_long_one_is_cut_and_its_columns_line_up(self):
        model = nn.ModuleDict({f"layer{i}": nn.Linear(8, 8) for i in range(25)})
        base = state_of(model)
        sent = vectors_like(base, size=1.0)
        for vector in sent:
            for name in vector:
                vector[name] *= 0.001 if int(name[5:].split(".")[0]) > 10 else 1
        lines = repr(protect(model, base, transmit(sent, 1.0, seed=0), 1.0, seed=0)).splitlines()
        assert len(lines) == 3 + 5 + 1 + 5 + 1
        assert lines[8] == "    ... 40 in between ..."
        rows = lines[2:8] + lines[9:14]
        assert len({len(row) for row in rows}) == 1
        kept = [float(row.split()[-1]) for row in rows[1:]]
        assert kept == sorted(kept, reverse=True)
        counts = [int(word) for word in lines[1].replace(",", "").split() if word.isdigit()]
        assert sum(counts) == 50
        assert min(counts) > 5

    def test_names_may_be_shorter_than_the_headline(self):
        tensors = {"w": TensorReport(1.0, 2.0, 0.4), "b": TensorReport(0.0, 2.0, 0.0)}
        update = TaskVector({"w": torch.ones(1)})
        rows = repr(Protection((0,), {}, None, tensors, 1.0, update, None)).splitlines()[2:5]
        assert len({len(row) for row in rows}) == 1

    @pytest.mark.parametrize(
        ("signal", "noise", "text"),
        [
            (1.0, 10.0, "-10.0"),
            (1e-300, 1e300, "-6000.0"),
            (0.0, 1.0, "no signal"),
            (1.0, 0.0, "no noise"),
            (1.0, math.inf, "no signal"),
        ],
    )
    def test_a_row(self, signal, noise, text):
        assert str(TensorReport(signal, noise, 0.5)) == f"{text:>9}  0.500"

    def test_signal_and_noise_are_those_of_what_was_sent(self, setting):
        """1328 x 4 numbers: their mean square is known to 2 %, that of signal and noise of 0 dB to about 5."""
        base = setting[0]
        done = protect(encoder(), base, transmit(vectors_like(base), 1.0, seed=0, scale=0.05), 1.0, seed=0, scale=0.05)
        report = done.tensors["0.weight"]
        assert report.signal == pytest.approx(0.05**2, rel=0.2)
        assert report.noise == pytest.approx(0.05**2, rel=1e-9)
        assert report.kept == pytest.approx(math.sqrt(0.5 * 0.5), rel=0.1)  # half of it, all of that shrunk by half


CLASSES, PARTS = 4, 4


@lru_cache
def world(seed):
    """An encoder, its task vectors for four tasks that live in parts of the input of their own, heads, samples."""
    draw = torch.Generator().manual_seed(seed)
    base = encoder(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        heads = [nn.Linear(16, CLASSES).requires_grad_(False) for _ in range(PARTS)]
    vectors, shots, test = [], {}, {}
    for part, head in enumerate(heads):
        inside = (torch.arange(24) // 6 == part).float()
        centres = 2 * torch.randn(CLASSES, 24, generator=draw)

        def sample(each, centres=centres, inside=inside):
            labels = torch.arange(CLASSES).repeat(each)
            return (centres[labels] + 0.7 * torch.randn(len(labels), 24, generator=draw)) * inside, labels

        tuned = copy.deepcopy(base)
        optimizer, (x, y) = torch.optim.SGD(tuned.parameters(), lr=0.2), sample(50)
        for _ in range(60):
            optimizer.zero_grad()
            cross_entropy(head(tuned(x)), y).backward()
            optimizer.step()
        vectors.append(TaskVector.between(base, tuned))
        shots[f"t{part}"], test[f"t{part}"] = (head, [sample(10)]), (head, [sample(100)])
    return base, vectors, shots, test


@torch.no_grad()
def mean_loss(model, tasks):
    return sum(float(cross_entropy(head(model(x)), y)) for head, [(x, y)] in tasks.values()) / len(tasks)


ADDED = partial(task_arithmetic, scale=1.0)  # what tasks in parts of their own ask for
SEEDS = range(3)


@lru_cache
def losses(mse, seed):
    base, vectors, shots, test = world(seed)
    heard = transmit(vectors, mse, seed=seed)
    found = {"base": mean_loss(base, test), "unprotected": mean_loss(ADDED(heard).apply_to(copy.deepcopy(base)), test)}
    for name, options in {
        "blind": {},
        "random inputs": {"inputs": [gaussian(64, 24, seed=seed)]},
        "samples": {"tasks_or_batches": shots, "steps": 30, "lr": 1e-3},
    }.items():
        model = encoder(99)
        protect(model, base, heard, mse, seed=seed, rule=ADDED, **options)
        found[name] = mean_loss(model, test)
    model = copy.deepcopy(base)
    realign(model, shots, steps=30, lr=1e-3)
    found["base realigned"] = mean_loss(model, test)
    return found


class TestWorth:
    @pytest.mark.parametrize("mse", [0.1, 1.0, 10.0, 100.0, 1e4])
    def test_without_samples_it_is_not_worse_than_the_base(self, mse):
        """By more than .1 of 1.4 in a draw: at -40 dB energies are known to 2 % of the noise's, of which a root goes
        into the model."""
        for seed in SEEDS:
            found = losses(mse, seed)
            assert found["blind"] < found["base"] + 0.1
            assert found["random inputs"] < found["base"] + 0.1

    @pytest.mark.parametrize(("mse", "times"), [(10.0, 1.1), (100.0, 10.0), (1e4, 1000.0)])
    def test_without_samples_it_is_better_than_unprotected_where_noise_does_harm(self, mse, times):
        for seed in SEEDS:
            found = losses(mse, seed)
            assert found["unprotected"] > found["base"]
            assert found["unprotected"] > times * max(found["blind"], found["random inputs"])

    @pytest.mark.parametrize(("mse", "times"), [(0.1, 1.5), (1.0, 3.0)])
    def test_what_caution_costs_where_noise_does_no_harm(self, mse, times):
        """The posterior mean gives up signal with the noise, 9 % and half: more than a fusion loses by the noise."""
        found = [losses(mse, seed) for seed in SEEDS]
        blind, inputs, unprotected = (
            sum(row[name] for row in found) for name in ("blind", "random inputs", "unprotected")
        )
        assert unprotected < inputs < blind < times * unprotected
        assert blind < 0.4 * sum(row["base"] for row in found)

    @pytest.mark.parametrize("mse", [0.1, 1.0, 10.0, 100.0])
    def test_with_samples_it_is_better_than_all_others(self, mse):
        found = [losses(mse, seed) for seed in SEEDS]
        mean = {name: sum(row[name] for row in found) / len(found) for name in found[0]}
        assert mean["samples"] == min(mean.values())
        assert mean["samples"] < mean["base realigned"] - 0.02
        assert all(row["samples"] < row["base"] for row in found)
