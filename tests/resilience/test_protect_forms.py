"""What `protect` takes: models, vectors, batches and loaders of every form, and ties."""

import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from helpers.draws import gaussian
from helpers.small_encoder import encoder, same, state_of, vectors_like
from rmtllmf.channel import transmit
from rmtllmf.errors import StateMismatchError
from rmtllmf.resilience import protect
from rmtllmf.taskvec import TaskVector, task_arithmetic


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
