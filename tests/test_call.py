"""Models called with other parameters than their own."""

import pytest
import torch
from torch import nn

from rmtllmf._call import WithState, state_of
from rmtllmf.errors import ShapeError
from rmtllmf.metrics import accuracy


class Remembering(nn.Linear):
    """With something beside tensors in its state dict."""

    def get_extra_state(self):
        return {"calls": 3}

    def set_extra_state(self, state):
        self.calls = state["calls"]


def test_what_modules_put_into_their_state_dict_beside_tensors_is_no_parameter():
    model = Remembering(2, 2)
    call = WithState(model, state_of(model, {"weight": torch.eye(2), "bias": torch.zeros(2)}, "base"))
    assert torch.equal(call(torch.eye(2)), torch.eye(2))
    assert set(state_of(model, model, "base")) == {"weight", "bias"}


def test_a_language_model_needs_a_head_that_picks_a_token():
    embedding = nn.Embedding(5, 4)  # (B, T) -> (B, T, K)
    batches = [(torch.tensor([[0, 1, 2]]), torch.tensor([int(embedding.weight[2].argmax())]))]
    with pytest.raises(ShapeError, match=r"got \(1, 3, 4\); of a language model pick a token, head=lambda output"):
        accuracy(embedding, batches)
    assert accuracy(embedding, batches, head=lambda output: output[:, -1]) == 1
