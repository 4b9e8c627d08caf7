"""Accuracy weighs samples, not batches, and leaves the model as it was; normalised accuracy is the mean of ratios."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.metrics import accuracy, normalized_accuracy


@given(
    st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=5), min_size=1, max_size=5).filter(
        lambda batches: any(batches)
    )
)
def test_every_sample_counts_the_same(batches):
    """Inputs are one-hot predictions, so that the right share is known by counting."""
    data = [
        (torch.eye(4)[[p for p, _ in batch]].reshape(-1, 4), torch.tensor([t for _, t in batch], dtype=torch.int64))
        for batch in batches
    ]
    pairs = [pair for batch in batches for pair in batch]
    assert accuracy(nn.Identity(), data) == sum(p == t for p, t in pairs) / len(pairs)


class Moody(nn.Module):
    """Predicts class 1 in evaluation mode and class 0 in training mode."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Dropout(0.5)

    def forward(self, x):
        assert not torch.is_grad_enabled()
        return torch.eye(2)[[int(not self.training)] * len(x)]


def test_evaluation_mode_and_back():
    model, head = Moody(), nn.Sequential(nn.Dropout(1.0), nn.Identity())
    model.inner.eval()
    batches = [(torch.zeros(3, 1), torch.ones(3, dtype=torch.int64))]
    assert accuracy(model, batches, head=head) == 1
    assert (model.training, model.inner.training, head.training, head[0].training) == (True, False, True, True)
    with pytest.raises(TypeError):
        accuracy(model, [(torch.zeros(3, 1), torch.zeros(3))], head=head)
    assert (model.training, model.inner.training, head.training) == (True, False, True)


def test_a_head_and_a_loader():
    x = torch.tensor([[1.0], [-1.0], [2.0], [-2.0], [3.0]])
    loader = DataLoader(TensorDataset(x, torch.tensor([0, 1, 0, 0, 0])), batch_size=2)
    head = nn.Linear(1, 2, bias=False)
    head.weight.data = torch.tensor([[1.0], [-1.0]])
    assert accuracy(nn.Identity(), loader, head=head) == 0.8


def test_named_inputs_and_an_output_with_logits():
    class Output:
        def __init__(self, logits):
            self.logits = logits

    class Named(nn.Module):
        def forward(self, *, left, right):
            return Output(left + right)

    batch = ({"left": torch.eye(2), "right": torch.zeros(2, 2)}, torch.tensor([0, 0]))
    assert accuracy(Named(), [batch]) == 0.5


def test_nan_is_no_prediction_but_infinity_is():
    with pytest.raises(NonFiniteError, match="NaN"):
        accuracy(nn.Identity(), [(torch.tensor([[float("nan"), 0.0]]), torch.tensor([0]))])
    assert accuracy(nn.Identity(), [(torch.tensor([[float("inf"), 0.0]]), torch.tensor([0]))]) == 1


def test_the_mean_of_the_ratios_and_not_the_ratio_of_the_means():
    assert normalized_accuracy([0.5, 0.9], [1.0, 0.9]) == 0.75
    assert normalized_accuracy({"a": 0.9, "b": 0.5}, {"b": 1.0, "a": 0.9}) == 0.75
    assert normalized_accuracy((0.6,), (0.5,)) == 1.2
    assert normalized_accuracy([0.0], [0.1]) == 0


def test_the_published_figures_of_the_base_model():
    """theory.md 6: CLIP ViT-B/16 keeps 60.7 % of the fine-tuned accuracy."""
    zero_shot = [65.5, 64.7, 66.4, 54.1, 52.0, 43.5, 51.7, 45.0]
    tuned = [78.9, 85.9, 96.6, 99.0, 97.6, 99.0, 99.7, 82.3]
    assert normalized_accuracy(zero_shot, tuned) == pytest.approx(0.607, abs=5e-4)


def test_labels_that_the_logits_cannot_have_are_refused():
    """A wrong head, an ignore index, or a single column would only look like a bad model."""
    model, x = nn.Linear(2, 3), torch.ones(4, 2)
    for labels in ([0, 1, 2, 3], [0, 1, 2, -100]):
        with pytest.raises(InputError, match="is this the right head"):
            accuracy(model, [(x, torch.tensor(labels))])
    with pytest.raises(ShapeError, match="at least two classes"):
        accuracy(nn.Linear(2, 1), [(x, torch.zeros(4, dtype=torch.long))])
