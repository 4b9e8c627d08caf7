"""Folders that ``save_pretrained`` wrote, whole and in shards, fused on disk and loaded with ``from_pretrained``."""

import copy
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from plugins.hf_checkpoints import embeddings_on_disk, fuse_folders  # noqa: E402
from rmtllmf.channel import transmit  # noqa: E402
from rmtllmf.taskvec import TaskVector, ties  # noqa: E402

EMBEDDINGS = {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The base in shards, one user in other shards, one in one file; the models that were saved."""
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "vocab_size": 24}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    models, folders = [transformers.GPT2LMHeadModel(config).eval()], []
    for _ in range(2):
        models.append(copy.deepcopy(models[0]))
        with torch.no_grad():
            for parameter in models[-1].parameters():
                parameter.add_(0.05 * torch.randn(parameter.shape))
    for model, size in zip(models, ("10KB", "15KB", "1GB"), strict=True):
        folders.append(str(tmp_path_factory.mktemp("model")))
        model.save_pretrained(folders[-1], max_shard_size=size)
    return models, folders


def shards(folder):
    return sorted(path.name for path in folder.glob("*.safetensors"))


def test_the_result_is_loaded_and_is_the_fusion_in_memory(world, tmp_path):
    (base, *users), folders = world
    fused = fuse_folders(transformers.AutoModelForCausalLM, folders[0], folders[1:], str(tmp_path / "out"), scale=0.4)
    assert isinstance(fused, transformers.GPT2LMHeadModel)
    assert fused.lm_head.weight is fused.transformer.wte.weight
    before = base.state_dict()
    for name, tensor in fused.state_dict().items():
        moved = sum(user.state_dict()[name] - before[name] for user in users)
        assert torch.equal(tensor, before[name]) == (name in EMBEDDINGS), name
        torch.testing.assert_close(tensor, before[name] + (0 if name in EMBEDDINGS else 0.4 * moved))
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(fused(tokens).logits, copy.deepcopy(base).eval()(tokens).logits) is False
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards(tmp_path / "out")) == len(set(index["weight_map"].values())) > 2


def test_an_index_is_as_good_as_its_folder_and_options_are_the_rules_own(world, tmp_path):
    (base, *users), folders = world
    named = [f"{folders[1]}/model.safetensors.index.json", f"{folders[2]}/model.safetensors"]
    fused = fuse_folders(transformers.AutoModelForCausalLM, folders[0], named, str(tmp_path / "out"), ties, density=0.3)
    # the entries that are fused only: which ones are trimmed depends on all that are there
    vectors = [TaskVector.between(base, user) for user in users]
    vectors = [vector.select([name for name in vector if name not in EMBEDDINGS]) for vector in vectors]
    expected = ties(vectors, density=0.3).apply_to(base.state_dict())
    assert all(torch.equal(tensor, expected[name]) for name, tensor in fused.state_dict().items())


def test_models_can_pass_the_uplink_on_the_way(world, tmp_path):
    (base, *users), folders = world
    mse = [0.01, 0.2]
    fused = fuse_folders(
        transformers.AutoModelForCausalLM, folders[0], folders[1:], str(tmp_path / "out"), mse=mse, seed=3
    )
    stored = embeddings_on_disk(transformers.AutoModelForCausalLM, folders[0])
    assert set(stored) == EMBEDDINGS - {"lm_head.weight"}
    before = {name: tensor for name, tensor in base.state_dict().items() if name != "lm_head.weight"}
    sent = [{name: user.state_dict()[name] - tensor for name, tensor in before.items()} for user in users]
    heard = transmit(sent, mse, seed=3)
    for name, tensor in before.items():
        moved = 0 if name in EMBEDDINGS else 0.3 * (heard[0][name] + heard[1][name])
        torch.testing.assert_close(fused.state_dict()[name], tensor + moved)
