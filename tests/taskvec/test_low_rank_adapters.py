"""Low-rank factors saved as adapters, which PEFT loads and merges."""

import copy
import json
import os

import pytest
import torch
from torch import nn

from helpers.adapted_models import PEFT_SPEAKS
from helpers.draws import rounded
from rmtllmf.errors import InputError, StateMismatchError
from rmtllmf.taskvec import TaskVector, adapter_vector, aligned, low_rank, task_arithmetic

pytestmark = PEFT_SPEAKS


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.fc = nn.Linear(6, 5)
        self.inner = nn.ModuleDict({"fc": nn.Linear(5, 3), "fc_x": nn.Linear(3, 2)})
        self.conv = nn.Conv2d(3, 4, 3)
        self.point = nn.Conv2d(4, 5, 1)

    def forward(self, tokens):
        return self.inner["fc_x"](self.inner["fc"](self.fc(self.embed(tokens))))


def base_model():
    torch.manual_seed(0)
    return Tiny()


def update_of(base, seed=0):
    keys = [key for key in base.state_dict() if key.endswith("weight")]
    return TaskVector({key: rounded(*base.state_dict()[key].shape, seed=seed + i) for i, key in enumerate(keys)})


def loaded(base, folder):
    peft = pytest.importorskip("peft", reason="the adapter is for PEFT")
    return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


def check_merged(base, folder, update):
    """PEFT loads the folder, complains about nothing, and its merged model is base + update."""
    merged = loaded(base, folder).merge_and_unload().state_dict()
    for key, before in base.state_dict().items():
        expected = before + update[key] if key in update else before
        torch.testing.assert_close(merged[key], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.filterwarnings("error::UserWarning")  # keys that are missing or were not expected
@pytest.mark.parametrize("rank", [1, 4, 100])
@pytest.mark.parametrize("told", ["by the model", "by name"])
def test_peft_loads_and_merges_what_is_saved(tmp_path, rank, told):
    """Ranks differ: a matrix gets its full rank where it has no more."""
    base = base_model()
    factors = low_rank(update_of(base), rank)
    given = {"model": base} if told == "by the model" else {"embeddings": "embed.weight"}
    factors.save_adapter(tmp_path / "new" / "fused", "some/base", **given)
    assert sorted(os.listdir(tmp_path / "new")) == ["fused"], "nothing temporary is left"
    assert sorted(os.listdir(tmp_path / "new" / "fused")) == ["adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((tmp_path / "new" / "fused" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "some/base"
    check_merged(base, tmp_path / "new" / "fused", factors.dense())
    read = adapter_vector(tmp_path / "new" / "fused")
    assert set(read) == set(factors.A)
    for key in read:
        torch.testing.assert_close(read[key], factors.dense()[key], rtol=1e-5, atol=2e-6)


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=17, n_positions=6)
    )


@pytest.mark.parametrize("given", [{"fan_in_fan_out": True}, {"model": True}])
def test_layers_that_store_in_out(tmp_path, given):
    base = gpt2()
    keys = [f"transformer.h.0.attn.{name}.weight" for name in ("c_attn", "c_proj")]
    update = TaskVector({key: rounded(*base.state_dict()[key].shape, seed=i) for i, key in enumerate(keys)})
    factors = low_rank(update, 3)
    with pytest.raises(InputError, match=r"fan_in_fan_out: 'transformer.h.0.attn.c_attn.weight'.*model="):
        factors.save_adapter(tmp_path / "fused")
    assert os.listdir(tmp_path) == []
    factors.save_adapter(tmp_path / "fused", **({"model": base} if "model" in given else given))
    check_merged(base, tmp_path / "fused", factors.dense())


def test_fused_adapters_become_an_adapter_in_one_line(tmp_path):
    base = base_model()
    paths = []
    for seed, keys in enumerate((["fc.weight"], ["fc.weight", "inner.fc.weight"], ["conv.weight"])):
        paths.append(tmp_path / str(seed))
        low_rank(update_of(base, seed).select(keys), 1).save_adapter(paths[-1])
    low_rank(task_arithmetic(aligned([adapter_vector(p) for p in paths])), rank=16).save_adapter(tmp_path / "fused")
    fused = task_arithmetic(aligned([adapter_vector(p) for p in paths]))
    assert fused.norm() > 0
    check_merged(base, tmp_path / "fused", fused)


def test_nothing_is_lost_in_silence(tmp_path):
    fc, bias, table = rounded(5, 6, seed=1), rounded(5, seed=2), rounded(4, 4, seed=3)
    cases = {
        "a bias": ({"fc.weight": fc, "fc.bias": bias}, "'fc.bias'"),
        "a matrix that is no layer's": ({"fc.weight": fc, "attn.in_proj_weight": table}, "'attn.in_proj_weight'"),
        "ties": ({"fc.weight": fc, "a.weight": table, "b.weight": table}, "'a.weight', 'b.weight'"),
    }
    for name, (update, lost) in cases.items():
        factors = low_rank(update, 2)
        with pytest.raises(InputError, match=f"rest: an adapter cannot hold {lost}.*'drop'.*dense"):
            factors.save_adapter(tmp_path / name)
        assert not (tmp_path / name).exists()
        factors.save_adapter(tmp_path / name, rest="drop")
        assert set(adapter_vector(tmp_path / name)) == {"fc.weight"}
        zeros = {key: value if key == "fc.weight" else torch.zeros_like(value) for key, value in update.items()}
        low_rank(zeros, 2).save_adapter(tmp_path / f"{name} of zeros")
    with pytest.raises(InputError, match="nothing to write"):
        low_rank({"fc.bias": bias}, 2).save_adapter(tmp_path / "x", rest="drop")
    with pytest.raises(InputError, match="rest: expected 'error' or 'drop', got 'keep'"):
        factors.save_adapter(tmp_path / "x", rest="keep")
    with pytest.raises(InputError, match=r"embeddings: 'embed_tokens.weight' may be.*model="):
        low_rank({"embed_tokens.weight": fc}, 2).save_adapter(tmp_path / "x")
    with pytest.raises(InputError, match="embeddings: 'z' matches none"):
        factors.save_adapter(tmp_path / "x", embeddings="z")
    low_rank({"embed_tokens.weight": fc}, 2).save_adapter(tmp_path / "linear", embeddings=())
    grouped = nn.ModuleDict({"conv": nn.Conv2d(4, 4, 3, groups=2)})
    kernels = low_rank({"conv.weight": rounded(4, 2, 3, 3, seed=1)}, 2)
    with pytest.raises(InputError, match=r"cannot hold 'conv.weight'"):
        kernels.save_adapter(tmp_path / "x", model=grouped)
    assert not (tmp_path / "x").exists()


def test_a_model_that_does_not_fit(tmp_path):
    with pytest.raises(StateMismatchError, match=r"model lacks 'other.weight'"):
        low_rank({"other.weight": torch.ones(2, 2)}, 1).save_adapter(tmp_path / "x", model=base_model())
    with pytest.raises(StateMismatchError, match=r"model\['fc.weight'\] has shape \(5, 6\); the update has \(2, 2\)"):
        low_rank({"fc.weight": torch.ones(2, 2)}, 1).save_adapter(tmp_path / "x", model=base_model())


def test_what_is_there_is_kept_unless_told(tmp_path, monkeypatch):
    first, second = (low_rank({"fc.weight": rounded(5, 6, seed=seed)}, 2) for seed in (1, 2))
    folder = tmp_path / "fused"
    first.save_adapter(folder)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        second.save_adapter(folder)

    def broken(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("rmtllmf.taskvec._adapter_save.write", broken)
        for target in (folder, tmp_path / "other"):
            with pytest.raises(OSError, match="no space left"):
                second.save_adapter(target, overwrite=True)
    with monkeypatch.context() as patch:
        rename = os.rename
        patch.setattr("rmtllmf.taskvec._adapter_save._exchanged", lambda one, other: False)
        patch.setattr(os, "rename", lambda a, b: broken() if str(a).endswith(".part") else rename(a, b))
        with pytest.raises(OSError, match="no space left"):
            second.save_adapter(folder, overwrite=True)
    assert os.listdir(tmp_path) == ["fused"]
    torch.testing.assert_close(adapter_vector(folder)["fc.weight"], first.dense()["fc.weight"])
    second.save_adapter(folder, overwrite=True)
    assert os.listdir(tmp_path) == ["fused"]
    torch.testing.assert_close(adapter_vector(folder)["fc.weight"], second.dense()["fc.weight"])
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds more than an adapter: 'notes.txt'"):
        first.save_adapter(folder, overwrite=True)
    with pytest.raises(FileExistsError):
        first.save_adapter(folder / "notes.txt", overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
