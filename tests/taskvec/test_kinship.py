"""The wrong base: told from a few pieces of the matrices, in silence about everything that descends from the base."""

import copy
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from rmtllmf.errors import RmtllmfWarning
from rmtllmf.metrics import cosine_similarity
from rmtllmf.taskvec import TaskVector, fuse, fuse_files, ties
from rmtllmf.taskvec._checkpoint import Checkpoint

STRANGE = "the matrices have nothing in common with the base's"


def new_state(seed, *, layers=10, size=40, dtype=torch.float32):
    source = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(layers):
        state[f"{layer}.weight"] = torch.randn(size, size, generator=source).to(dtype)
        state[f"{layer}.gain"] = torch.ones(size, dtype=dtype)  # alike in all models
    return state


def tuned(state, seed, share=0.1):
    source = torch.Generator().manual_seed(seed)
    return {k: (t.float() + share * torch.randn(t.shape, generator=source)).to(t.dtype) for k, t in state.items()}


def saved(path, state):
    save_file(state, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_models_of_another_base_are_named(dtype, tmp_path):
    base, other = new_state(0, dtype=dtype), new_state(1, dtype=dtype)
    models = [tuned(other, 2), tuned(base, 3), tuned(other, 4)]
    says = rf"^finetuned\[0\], finetuned\[2\]: {STRANGE}"
    with pytest.warns(RmtllmfWarning, match=says) as caught:
        fuse(base, models)
    assert [warning.filename for warning in caught] == [__file__]
    paths = [saved(tmp_path / f"{i}.safetensors", model) for i, model in enumerate(models)]
    with pytest.warns(RmtllmfWarning, match=says) as caught:
        fuse_files(saved(tmp_path / "base.safetensors", base), paths, tmp_path / "out.safetensors", ties)
    assert [warning.filename for warning in caught] == [__file__]


def test_a_task_vector_in_the_place_of_a_model(tmp_path):
    base = new_state(0)
    vector = TaskVector.between(base, tuned(base, 1))
    base_path = saved(tmp_path / "base.safetensors", base)
    with pytest.warns(RmtllmfWarning, match="or a task vector in the place of a model"):
        fuse_files(base_path, [saved(tmp_path / "tau.safetensors", dict(vector))], tmp_path / "out.safetensors")
    with pytest.warns(RmtllmfWarning, match="or a task vector in the place of a model"):
        fuse(base, [dict(vector)])
    fuse(base, [vector])  # as a TaskVector it is one


def test_what_descends_from_the_base_is_fused_in_silence():
    base = new_state(0)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    half = {k: t[order] if int(k[0]) % 2 and t.ndim == 2 else t for k, t in base.items()}
    sparse = {k: t * (torch.rand(t.shape, generator=torch.Generator().manual_seed(1)) < 0.1) for k, t in base.items()}
    for model in (
        base,
        tuned(base, 1, share=3.0),  # moved by three times the base's norm
        {k: 100 * t for k, t in base.items()},
        half,  # a new head, permuted layers
        sparse,
    ):
        fuse(base, [model])


def test_training_from_an_untrained_start_with_a_large_step_size_is_no_stranger():
    torch.manual_seed(0)
    layers = [part for _ in range(7) for part in (nn.Linear(40, 40), nn.LayerNorm(40), nn.GELU())]
    model = nn.Sequential(nn.Linear(40, 40), *layers, nn.Linear(40, 40))
    base = copy.deepcopy(model.state_dict())
    x = torch.randn(200, 40)
    y = (x @ torch.randn(40, 10)).argmax(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        optimizer.step()
    change = TaskVector.between(base, model).norm() / TaskVector(base).norm()
    assert change > 0.5  # so that a threshold on the change would not do
    fuse(base, [model])


@pytest.mark.parametrize("options", [{"layers": 7}, {"size": 31}])
def test_of_few_or_small_matrices_nothing_is_said(options):
    fuse(new_state(0, **options), [new_state(1, **options)])


def test_zeros_are_not_looked_at():
    base, other = new_state(0), new_state(1)
    for layer in range(3):  # ten matrices, of which seven are left
        base[f"{layer}.weight"].zero_()
    fuse(base, [other])
    base[f"{0}.weight"] += 1
    with pytest.warns(RmtllmfWarning, match=STRANGE):
        fuse(base, [other])


def test_a_few_pieces_are_read_whatever_the_size(tmp_path, monkeypatch):
    read = []
    original = Checkpoint.read

    def counted(self, key, start, stop, buffer):
        read.append(stop - start)
        return original(self, key, start, stop, buffer)

    base = new_state(0, layers=40, size=128)
    paths = [saved(tmp_path / f"{i}.safetensors", tuned(base, i)) for i in range(2)]
    base_path = saved(tmp_path / "base.safetensors", base)
    monkeypatch.setattr(Checkpoint, "read", counted)
    monkeypatch.setattr(sys.modules["rmtllmf.taskvec.fuse_files"], "run", None)  # ends behind the check
    with pytest.raises(TypeError, match="NoneType"):
        fuse_files(base_path, paths, tmp_path / "out.safetensors")
    assert set(read) == {4096}
    assert len(read) <= 3 * 16


def test_the_two_looks_of_the_guide_tell_a_wrong_base():
    base, other = new_state(0), new_state(1)
    models = [tuned(base, seed) for seed in (2, 3)]
    right = [TaskVector.between(base, model) for model in models]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a difference is a difference
        wrong = [TaskVector.between(other, model) for model in models]
    size = TaskVector(base).norm()
    assert all(vector.norm() < 0.2 * size for vector in right)
    assert all(vector.norm() > size for vector in wrong)
    assert float(cosine_similarity(right)[0, 1]) < 0.1
    assert float(cosine_similarity(wrong)[0, 1]) > 0.9
    strangers = [TaskVector.between(other, model) for model in (base, new_state(5))]
    assert 0.3 < float(cosine_similarity(strangers)[0, 1]) < 0.7
