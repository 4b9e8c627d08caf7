"""LiNeS: the depth of names in models as they are, and the scaling."""

import open_clip
import pytest
import timm
import torch
import torch.distributed as dist
import torchvision
import transformers
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import TaskVector, lines
from rmtllmf.taskvec.rules._depths import relative_depths

SMALL = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
T5 = {"d_model": 8, "d_ff": 8, "num_heads": 2, "d_kv": 4, "vocab_size": 20, "decoder_start_token_id": 0}
GPT2 = {"n_embd": 8, "n_head": 2, "vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {  # name -> model, number of layers of each tower
    "open_clip": (lambda: open_clip.create_model("ViT-B-32", device="meta"), 12),
    "timm ViT": (lambda: timm.create_model("vit_tiny_patch16_224"), 12),
    "timm EVA": (lambda: timm.create_model("eva02_tiny_patch14_224"), 12),
    "timm Swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224"), 12),
    "timm ConvNeXt": (lambda: timm.create_model("convnext_atto"), 12),
    "timm ResNet": (lambda: timm.create_model("resnet18"), 8),
    "timm EfficientNet": (lambda: timm.create_model("efficientnet_b0"), 16),
    "torchvision ViT": (lambda: torchvision.models.vit_b_32(), 12),
    "HF ViT": (lambda: transformers.ViTModel(transformers.ViTConfig(**SMALL)), 12),
    "HF BERT": (lambda: transformers.BertModel(transformers.BertConfig(vocab_size=20, **SMALL)), 12),
    "HF Llama": (
        lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, num_hidden_layers=5, **SMALL)),
        5,
    ),
    "HF GPT-2": (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)), 12),
    "HF T5": (lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5)), 6),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_as_they_are(name):
    build, layers = MODELS[name]
    with torch.device("meta"):
        state = {k: t for k, t in build().state_dict().items() if t.is_floating_point() and ".running_" not in f".{k}"}
    depths = relative_depths(state)
    assert set(depths) == set(state)
    inside = {key: depth for key, depth in depths.items() if depth is not None}
    assert sorted(set(inside.values())) == [layer / (layers - 1) for layer in range(layers)]
    for key in set(depths) - set(inside):
        assert not any(part.isdigit() for part in key.split(".")[1:-1]) or "stem" in key, key


def test_towers_and_stages():
    names = ["a.blocks.0.w", "a.blocks.1.w", "b.blocks.0.w", "b.blocks.4.w", "pos_embed"]
    assert relative_depths(names) == {names[0]: 0, names[1]: 1, names[2]: 0, names[3]: 1, "pos_embed": None}
    stages = ["layers.0.blocks.0.w", "layers.0.blocks.1.w", "layers.1.downsample.w", "layers.1.blocks.0.w"]
    assert relative_depths(stages) == dict(zip(stages, (0, 0.5, 1, 1), strict=True))
    assert relative_depths(["blocks.3.w", "blocks.12.w"]) == {"blocks.3.w": 3 / 12, "blocks.12.w": 1}
    assert (
        relative_depths(["model.layers.2.mlp.experts.7.w", "model.layers.4.w"])["model.layers.2.mlp.experts.7.w"] == 0.5
    )


def update(dtype=torch.float32):
    source = torch.Generator().manual_seed(0)
    shapes = {f"visual.transformer.resblocks.{block}.mlp.c_fc.weight": (4, 3) for block in range(4)}
    shapes |= {"visual.conv1.weight": (2, 2), "visual.ln_post.bias": (3,), "logit_scale": (), "head.weight": (0, 3)}
    return {key: torch.randn(shape, generator=source).to(dtype) for key, shape in shapes.items()}


@pytest.mark.parametrize(("beta", "alpha"), [(1.0, None), (0.3, None), (0.5, 0.125), (0.0, 2.0), (-1.0, 1.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_formula(beta, alpha, dtype):
    tau = update(dtype)
    scaled = lines(tau, beta=beta, alpha=alpha)
    assert isinstance(scaled, TaskVector)
    assert list(scaled) == list(tau)
    first = 1 - beta if alpha is None else alpha
    for key, tensor in tau.items():
        layer = int(key.split(".")[3]) if "resblocks" in key else 0
        expected = (tensor.double() * (first + beta * layer / 3)).to(dtype)
        torch.testing.assert_close(scaled[key], expected)
    last = "visual.transformer.resblocks.3.mlp.c_fc.weight"
    if alpha is None:
        torch.testing.assert_close(scaled[last], tau[last])


def test_given_depths():
    tau = update() | {"strange": torch.ones(2)}
    with pytest.raises(InputError, match=r"depth of 'strange' cannot be told.*depth={'strange': 0.0}"):
        lines(tau)
    scaled = lines(tau, beta=0.5, depth={"strange": 0.5, "visual.ln_post.*": 1.0, "visual.*": 0.0})
    assert torch.equal(scaled["strange"], torch.full((2,), 0.75))
    assert torch.equal(scaled["visual.ln_post.bias"], tau["visual.ln_post.bias"])
    key = "visual.transformer.resblocks.3.mlp.c_fc.weight"
    assert torch.equal(scaled[key], 0.5 * tau[key])
    with pytest.raises(InputError, match="'nothing' matches none"):
        lines(update(), depth={"nothing": 0.5})
    with pytest.raises(InputError, match=r"depth\['\*'\]: expected .* between 0 and 1, got 7"):
        lines(update(), depth={"*": 7})


def test_names_without_layers_are_an_error():
    with pytest.raises(TypeError, match=r"depth: expected a mapping of name -> relative depth, got list"):
        lines({"blocks.0.w": torch.ones(1), "blocks.1.w": torch.ones(1)}, depth=[0.0, 1.0])
    with pytest.raises(InputError, match="no name has a block number"):
        lines({"pos_embed": torch.ones(2), "head.weight": torch.ones(2)})
    with pytest.raises(InputError, match=r"'blocks.0.w' cannot be told"):  # first or last?
        lines({"blocks.0.w": torch.ones(2)})
    with pytest.raises(InputError, match="no floating-point entries"):
        lines({"steps": torch.tensor(3)})
    assert set(lines(update() | {"steps": torch.tensor(3)})) == set(update())


def test_inputs_stay_and_out_is_written_to_also_in_place():
    tau, kept = update(), update()
    expected = lines(tau, beta=0.5)
    out = {key: torch.full_like(tensor, 7.0) for key, tensor in tau.items()}
    scaled = lines(tau, beta=0.5, out=out)
    for key in tau:
        assert torch.equal(tau[key], kept[key])
        assert torch.equal(out[key], expected[key])
        assert scaled[key].data_ptr() == out[key].data_ptr()
    lines(tau, beta=0.5, out=tau)
    assert all(torch.equal(tau[key], expected[key]) for key in tau)
    with pytest.raises(StateMismatchError, match="out"):
        lines(tau, out={key: tensor.double() for key, tensor in out.items()})
    memory = torch.zeros(24)
    shifted = {"blocks.0.w": memory[:12], "blocks.1.w": memory[12:]}
    with pytest.raises(InputError, match="shares memory"):
        lines(shifted, out={"blocks.0.w": memory[12:], "blocks.1.w": memory[:12]})


def test_tied_names_stay_tied():
    tau = update()
    tau["token_embedding.weight"] = tau["head.weight"] = torch.ones(2, 3)
    scaled = lines(tau, beta=0.5)
    assert scaled["head.weight"] is scaled["token_embedding.weight"]
    lines(tau, beta=0.5, out=tau)
    assert torch.equal(tau["head.weight"], torch.full((2, 3), 0.5))  # once, not twice
    apart = {key: torch.empty_like(tensor) for key, tensor in tau.items()}
    lines(tau, beta=0.5, out=apart)
    assert torch.equal(apart["head.weight"], apart["token_embedding.weight"])
    with pytest.raises(InputError, match="are one tensor, but would be scaled by"):
        lines(tau, beta=0.5, depth={"head.weight": 1.0})


@pytest.fixture
def mesh():
    """One process that calls itself a group: enough for DTensors of one part."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_tensors_spread_over_processes(mesh):
    tau = {key: tensor for key, tensor in update().items() if tensor.ndim}
    there = {key: distribute_tensor(tensor, mesh, [Shard(0)]) for key, tensor in tau.items()}
    expected = lines(tau, beta=0.5)
    out = {key: distribute_tensor(torch.zeros_like(tensor), mesh, [Shard(0)]) for key, tensor in tau.items()}
    for found in (lines(there, beta=0.5), lines(there, beta=0.5, out=out), out):
        for key in tau:
            assert found[key].placements == (Shard(0),)
            assert torch.equal(found[key].full_tensor(), expected[key])
    with pytest.raises(StateMismatchError, match="spread over the processes"):
        lines(there, out={key: torch.zeros_like(tensor) for key, tensor in tau.items()})
    lines(there, beta=0.5, out=there)
    assert all(torch.equal(there[key].full_tensor(), expected[key]) for key in tau)


def test_gradients_flow():
    tau = {f"blocks.{block}.w": torch.ones(2, requires_grad=True) for block in range(3)}
    sum(tensor.sum() for tensor in lines(tau, beta=0.5, alpha=0.25).values()).backward()
    assert [tensor.grad.tolist() for tensor in tau.values()] == [[0.25] * 2, [0.5] * 2, [0.75] * 2]
    out = {key: torch.zeros(2) for key in tau}
    assert not any(tensor.requires_grad for tensor in lines(tau, out=out).values())


def test_wrong_numbers():
    tau = update()
    tau["logit_scale"] = torch.tensor(float("nan"))
    with pytest.raises(NonFiniteError, match="logit_scale"):
        lines(tau)
    for options in ({"beta": float("nan")}, {"alpha": float("inf")}):
        with pytest.raises(InputError, match=next(iter(options))):
            lines(update(), **options)
