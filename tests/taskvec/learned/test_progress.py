"""Progress bars stand on standard error where they are asked for, and only there."""

import pytest
import torch

from helpers.learned_world import Encoder, tasks_of, vectors_of
from rmtllmf.taskvec import (
    adamerging_coefficients,
    concrete_mask,
    defense_aware_mask,
    expert_merging_coefficients,
    frank_wolfe_coefficients,
    pareto_front,
)

RULES = {
    "AdaMerging": (adamerging_coefficients, {"steps": 1}),
    "expert merging": (expert_merging_coefficients, {"steps": 1}),
    "Frank-Wolfe": (frank_wolfe_coefficients, {"steps": 1}),
    "Concrete mask": (concrete_mask, {"steps": 1, "seed": 0}),
    "defence-aware mask": (defense_aware_mask, {"steps": 1, "seed": 0}),
    "Pareto front": (pareto_front, {"evaluations": 12, "seed": 0}),
}


@pytest.mark.parametrize("progress", [True, False])
@pytest.mark.parametrize("name", RULES)
def test_bars(name, progress, capsys):
    rule, options = RULES[name]
    model = Encoder().eval()
    tasks = tasks_of()
    rule(vectors_of(model, count=len(tasks)), model, tasks, progress=progress, **options)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert (name in printed.err) is progress
    assert progress or not printed.err
    assert torch.is_grad_enabled()
