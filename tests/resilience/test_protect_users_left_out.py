"""Who is left out by `protect`, and that the rest is fused with its own noise."""

import math
from functools import lru_cache

import numpy as np
import pytest
import torch

from helpers.small_encoder import encoder, same, vectors_like
from rmtllmf.channel import Reception, UplinkScenario, lmmse, sic, strongest_user_covariance, transmit
from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.resilience import joint_shrink, protect
from rmtllmf.resilience._screening import Uplink
from rmtllmf.taskvec import task_arithmetic

NAN = float("nan")


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
