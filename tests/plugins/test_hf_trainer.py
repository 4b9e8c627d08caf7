"""A tiny GPT-2 in the real Trainer: what is written at every checkpoint, and a realignment with frozen embeddings."""

import copy

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="transformers' Trainer needs it")

from plugins.hf_trainer import FrozenEmbeddings, OverTheAir, load_fused  # noqa: E402
from rmtllmf.taskvec import TaskVector  # noqa: E402

MSE = 0.2
TIED = ("transformer.wte.weight", "lm_head.weight")
EMBEDDINGS = {*TIED, "transformer.wpe.weight"}


def new_model():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8, "vocab_size": 16, "initializer_range": 0.3}
    silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **silent))


def counting(step, count=32):
    """Sequences that count up or down in the lower or the upper half of the vocabulary."""
    low = 0 if step > 0 else 8
    rows = [torch.tensor([low + (start + step * place) % 8 for place in range(8)]) for start in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(model, folder, data, callback, steps=20, **options):
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=steps,
        save_steps=10,
        logging_steps=1,
        per_device_train_batch_size=16,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return transformers.Trainer(model, arguments, train_dataset=data, callbacks=[callback])


@pytest.fixture(scope="module")
def users(tmp_path_factory):
    """The base, and for each of two users the folder of checkpoints and the model as its Trainer left it."""
    base, found = new_model(), []
    for user, step in enumerate((1, -1)):
        folder, model = tmp_path_factory.mktemp(f"user-{user}"), copy.deepcopy(base)
        trainer(model, folder, counting(step), OverTheAir(base, MSE, seed=user)).train()
        found.append((folder, model))
    return base, found


def difference(state, base):
    return {name: state[name] - tensor for name, tensor in base.state_dict().items()}


def test_every_checkpoint_is_heard_with_the_noise_of_the_channel(users):
    base, found = users
    norms = []
    for folder, model in found:
        assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-10", "checkpoint-20"]
        for checkpoint in folder.iterdir():
            stored = load_file(checkpoint / "model.safetensors")
            sent = difference({**stored, "lm_head.weight": stored[TIED[0]]}, base)
            heard = TaskVector.load(checkpoint / "heard.safetensors")
            assert torch.equal(heard[TIED[0]], heard[TIED[1]]), "a tied head is sent once"
            noise = {name: heard[name] - tensor for name, tensor in sent.items() if name != TIED[1]}
            energy = sum(float(sent[name].square().sum()) for name in noise)
            assert sum(float(tensor.square().sum()) for tensor in noise.values()) == pytest.approx(
                MSE * energy, rel=0.1
            )
            norms.append(energy)
        last = load_file(folder / "checkpoint-20" / "model.safetensors")
        for name, parameter in model.named_parameters():
            assert torch.equal(last[name], parameter), "the checkpoint itself is clean"
    assert len(set(norms)) == 4


def test_realignment_in_a_trainer_leaves_the_embeddings_alone(users, tmp_path):
    base, found = users
    heard = [TaskVector.load(folder / "checkpoint-20" / "heard.safetensors") for folder, _ in found]
    model = copy.deepcopy(base)
    load_fused(model, base, heard)
    start = copy.deepcopy(model.state_dict())
    for name, tensor in base.state_dict().items():
        moved = 0 if name in EMBEDDINGS else 0.3 * (heard[0][name] + heard[1][name])
        torch.testing.assert_close(start[name], tensor + moved)
    few = counting(1, 8) + counting(-1, 8)
    station = trainer(model, tmp_path, few, FrozenEmbeddings(), save_strategy="no", weight_decay=0.5)
    station.train()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name]) == (name in EMBEDDINGS), name
        assert torch.equal(tensor, start[name]) == (name in EMBEDDINGS), name
    optimized = {id(parameter) for group in station.optimizer.param_groups for parameter in group["params"]}
    frozen = {id(model.get_parameter(name)) for name in EMBEDDINGS}
    assert len(frozen) == 2
    assert optimized == {id(parameter) for parameter in model.parameters()} - frozen
    losses = [entry["loss"] for entry in station.state.log_history if "loss" in entry]
    assert len(losses) == 20
    assert losses[-1] < 0.6 * losses[0]
