"""`resilient_fusion` is fuse, restore, realign: against the three steps by hand."""

import copy
from functools import partial

import pytest
import torch
from open_clip.transformer import VisionTransformer
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from helpers.draws import gaussian
from rmtllmf.errors import InputError, StateMismatchError
from rmtllmf.resilience import embedding_keys, realign, resilient_fusion
from rmtllmf.taskvec import TaskVector, task_arithmetic


def vit(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(image_size=8, patch_size=4, width=16, layers=1, heads=2, mlp_ratio=2, output_dim=8)


@pytest.fixture
def setting():
    base = vit().state_dict()
    received = [
        TaskVector({name: 0.05 * gaussian(*tensor.shape, seed=7 * q + len(name)) for name, tensor in base.items()})
        for q in range(3)
    ]
    head = nn.Linear(8, 2)
    tasks = {"t": (head, [(gaussian(6, 3, 8, 8, seed=k), torch.arange(6) % 2) for k in range(2)])}
    return base, received, tasks


def test_it_is_fuse_restore_realign(setting):
    base, received, tasks = setting
    model, peer = vit(1), vit(2)
    done = resilient_fusion(model, base, received, tasks, steps=4, lr=0.01)

    keys = {"class_embedding", "positional_embedding", "conv1.weight"}
    by_hand = {name: base[name] + 0.3 * sum(vector[name] for vector in received) for name in base}
    by_hand.update({name: base[name] for name in keys})
    peer.load_state_dict(by_hand)
    expected = realign(peer, tasks, steps=4, lr=0.01, frozen=keys)
    assert done.losses == pytest.approx(expected.losses, rel=1e-5)
    assert set(done.trained) == set(base) - keys
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, peer.state_dict()[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(tensor, base[name]) == (name in keys), name


def test_without_protection_it_is_the_rule_alone(setting):
    base, received, tasks = setting
    model = vit(1)
    done = resilient_fusion(model, base, received, tasks, frozen=(), steps=0, rule=partial(task_arithmetic, scale=0.5))
    assert done.losses == ()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, base[name] + 0.5 * sum(vector[name] for vector in received))


def test_any_base_gives_the_same_the_model_itself_included(setting, tmp_path):
    base, received, tasks = setting
    save_file(base, tmp_path / "base.safetensors")
    results = []
    for source in ("itself", "module", "state dict", "path"):
        model = vit(0 if source == "itself" else 5)
        given = {"itself": model, "module": vit(), "state dict": base, "path": tmp_path / "base.safetensors"}[source]
        resilient_fusion(model, given, [dict(vector) for vector in received], tasks, steps=2)
        results.append(model.state_dict())
    for name in base:
        assert all(torch.equal(results[0][name], other[name]) for other in results[1:])
    assert all(torch.equal(base[name], tensor) for name, tensor in vit().state_dict().items())


class Language(nn.Module):
    """A tied head, whose two names the channel bends differently."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(6, 4)
        self.mlp = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 6, bias=False)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens):
        return self.lm_head(self.mlp(self.embed_tokens(tokens)))


@pytest.mark.parametrize("frozen", [None, "embed_tokens.weight", "lm_head.*"])
def test_a_tied_head_is_restored_with_its_embedding(frozen):
    model = Language()
    base = copy.deepcopy(model.state_dict())
    received = [{name: gaussian(*tensor.shape, seed=len(name)) for name, tensor in base.items()}]
    batches = [(torch.arange(6), torch.arange(6))]
    done = resilient_fusion(model, base, received, batches, frozen=frozen, steps=3, lr=0.01)
    assert done.trained == ("mlp.weight", "mlp.bias")
    assert model.lm_head.weight is model.embed_tokens.weight
    assert torch.equal(model.embed_tokens.weight, base["embed_tokens.weight"])
    assert not torch.equal(model.mlp.weight, base["mlp.weight"])


def test_a_model_without_embeddings_asks_what_to_protect(setting):
    *_, tasks = setting
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8))
    received = [{name: torch.zeros_like(tensor) for name, tensor in model.state_dict().items()}]
    assert embedding_keys(model) == ()
    with pytest.raises(InputError, match=r"pass frozen=\(\)"):
        resilient_fusion(model, model, received, tasks)
    assert resilient_fusion(model, model, received, tasks, frozen=(), steps=1).trained == ("1.weight", "1.bias")


@pytest.mark.parametrize(
    ("change", "error", "pattern"),
    [
        ({"steps": -1}, InputError, "steps"),
        ({"frozen": "nothing.*"}, InputError, "frozen"),
        ({"trainable": "class_embedding"}, InputError, "nothing to train"),
        ({"lr": -1.0}, InputError, "lr"),
        ({"base": {"w": torch.ones(2)}}, StateMismatchError, "base lacks"),
        ({"received": [{"w": torch.ones(2)}]}, StateMismatchError, "base lacks 'w'"),
        ({"received": []}, InputError, "received"),
        ({"rule": lambda vectors: 3}, TypeError, "rule"),
        ({"tasks_or_batches": {}}, InputError, "tasks_or_batches"),
    ],
)
def test_a_wrong_argument_leaves_the_model_untouched(setting, change, error, pattern):
    base, received, tasks = setting
    model = vit(1)
    before = copy.deepcopy(model.state_dict())
    arguments = {"model": model, "base": base, "received": received, "tasks_or_batches": tasks, **change}
    with pytest.raises(error, match=pattern):
        resilient_fusion(**arguments)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_options_reach_the_realignment(setting):
    base, received, tasks = setting
    seen = []

    def loss(logits, targets):
        seen.append(len(targets))
        return cross_entropy(logits, targets)

    done = resilient_fusion(
        vit(1),
        base,
        received,
        tasks,
        frozen="*embedding",
        trainable="ln_post.*",
        steps=2,
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    assert done.trained == ("ln_post.weight", "ln_post.bias")
    assert seen == [6, 6]


def test_rules_get_task_vectors_and_what_they_leave_out_stays_as_in_the_base():
    model = nn.Linear(2, 2)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heard = [{**{name: torch.ones_like(tensor) for name, tensor in base.items()}, "steps": torch.tensor(1)}] * 2
    for vectors in (heard, (vector for vector in heard)):
        resilient_fusion(model, base, vectors, {}, rule=lambda v: 0.5 * sum(v), frozen=(), steps=0)
        torch.testing.assert_close(model.weight, base["weight"] + 1)
    resilient_fusion(model, base, heard, {}, rule=partial(task_arithmetic, scale=0.5, skip="bias"), frozen=(), steps=0)
    torch.testing.assert_close(model.weight, base["weight"] + 1)
    assert torch.equal(model.bias, base["bias"])
    with pytest.raises(StateMismatchError, match="rule's result has the unexpected 'other'"):
        resilient_fusion(model, base, heard, {}, rule=lambda v: {"other": torch.ones(1)}, frozen=(), steps=0)


def test_a_tie_that_base_and_vectors_have_lost_is_not_fused_to_its_last_name():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torn = {"0.weight": torch.full((2, 2), 5.0), "1.weight": torch.full((2, 2), -7.0)}
    with pytest.raises(StateMismatchError, match="one tensor in the model"):
        resilient_fusion(model, base, [torn], {}, frozen=(), steps=0)
    torch.testing.assert_close(model[0].weight.detach(), base["0.weight"])
    resilient_fusion(model, base, [{name: torch.ones(2, 2) for name in torn}], {}, frozen=(), steps=0)
    torch.testing.assert_close(model[0].weight.detach(), base["0.weight"] + 1)
    assert model[1].weight is model[0].weight


def test_a_wrong_optimizer_is_found_before_the_model_is_touched():
    model = nn.Linear(2, 2)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    heard = [{name: torch.ones_like(tensor) for name, tensor in base.items()}]
    with pytest.raises(TypeError, match="optimizer"):
        resilient_fusion(
            model, base, heard, [(torch.ones(1, 2), torch.tensor([0]))], frozen=(), optimizer=lambda p: None
        )
    assert torch.equal(model.weight, base["weight"])
