"""Realignment in an Accelerate loop: against the same steps written out in plain torch."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

accelerate = pytest.importorskip("accelerate")

from plugins.hf_accelerate import load_fused, realign  # noqa: E402
from rmtllmf.channel import transmit  # noqa: E402
from rmtllmf.taskvec import TaskVector  # noqa: E402

FROZEN = {"token_embedding.weight", "positional_embedding"}


class Tiny(nn.Module):
    """Token and position embeddings, one block, a head."""

    def __init__(self):
        super().__init__()
        self.token_embedding = nn.Embedding(12, 16)
        self.positional_embedding = nn.Parameter(0.1 * torch.randn(6, 16))
        self.block = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens):
        return self.head(self.block(self.token_embedding(tokens) + self.positional_embedding).mean(1))


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps one state for the whole process."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


@pytest.fixture
def fusion():
    """A model, its state before anyone trained, two task vectors with noise, and a few samples of both tasks."""
    torch.manual_seed(0)
    model = Tiny()
    base = copy.deepcopy(model.state_dict())
    sent = [{name: 0.05 * torch.randn_like(tensor) for name, tensor in base.items()} for _ in range(2)]
    tokens = torch.randint(12, (32, 6))
    loader = DataLoader(TensorDataset(tokens, tokens[:, 0] // 4), batch_size=8)
    return model, base, [TaskVector(vector) for vector in transmit(sent, 0.1, seed=0)], loader


@pytest.mark.parametrize("accumulated", [1, 2])
def test_steps_are_those_of_a_loop_written_by_hand(fusion, accumulated):
    model, base, heard, loader = fusion
    load_fused(model, base, heard)
    for name, tensor in model.state_dict().items():
        moved = 0 if name in FROZEN else 0.3 * (heard[0][name] + heard[1][name])
        torch.testing.assert_close(tensor, base[name] + moved)
        assert torch.equal(tensor, base[name]) == (name in FROZEN)

    expected = copy.deepcopy(model)
    parameters = [parameter for name, parameter in expected.named_parameters() if name not in FROZEN]
    optimizer, written = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0), []
    for _ in range(10):
        for index, (tokens, targets) in enumerate(loader, start=1):
            loss = cross_entropy(expected(tokens), targets)
            (loss / accumulated).backward()
            written.append(float(loss.detach()))
            if index % accumulated == 0:
                optimizer.step()
                optimizer.zero_grad()

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulated)
    losses = realign(accelerator, model, loader, epochs=10, lr=1e-2)
    assert losses == pytest.approx(written)
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, expected.state_dict()[name])
        assert torch.equal(tensor, base[name]) == (name in FROZEN), name


@pytest.mark.parametrize("head", ["LlamaForCausalLM", "LlamaForSequenceClassification"])
def test_models_and_batches_of_hugging_face(head):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=20,
        num_labels=2,
        pad_token_id=0,
    )
    model = getattr(transformers, head)(config)
    base = copy.deepcopy(model.state_dict())
    sent = [{name: 0.02 * torch.randn_like(tensor) for name, tensor in base.items()} for _ in range(2)]
    heard = [TaskVector(vector) for vector in transmit(sent, 0.1, seed=0)]
    ids = torch.randint(1, 20, (16, 6))
    labels = ids if head == "LlamaForCausalLM" else ids[:, -1] % 2
    rows = [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]
    loader = DataLoader(rows, batch_size=8, collate_fn=transformers.default_data_collator)

    load_fused(model, base, heard)
    start = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        first = float(model(**next(iter(loader))).loss)
    losses = realign(accelerate.Accelerator(cpu=True), model, loader, epochs=15, lr=1e-2)
    assert losses[0] == pytest.approx(first)
    assert sum(losses[-2:]) < 0.7 * sum(losses[:2])
    state = model.state_dict()
    assert torch.equal(state["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert not torch.equal(state["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])
