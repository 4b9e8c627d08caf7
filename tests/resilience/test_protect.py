"""`protect` is its steps by hand."""

from functools import partial

import pytest
import torch

from helpers.draws import gaussian
from helpers.small_encoder import encoder, same, state_of, vectors_like
from rmtllmf.channel import transmit
from rmtllmf.resilience import joint_shrink, measured_sensitivity, protect, realign, search_scale
from rmtllmf.resilience.protect import _REFINEMENTS, _SCALES
from rmtllmf.taskvec import TaskVector, task_arithmetic, ties


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
