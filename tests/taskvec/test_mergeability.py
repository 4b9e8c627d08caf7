"""Transforms that only merging notices are found, and training is not taken for one."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transformer import VisionTransformer
from torch import nn

from rmtllmf.errors import InputError, NonFiniteError, RmtllmfWarning, StateMismatchError, UnmergeableWarning
from rmtllmf.taskvec import Mergeability, mergeability


def source(seed=0):
    return torch.Generator().manual_seed(seed)


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UnmergeableWarning)
        return mergeability(*args, **options)


def tower(width=32, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return VisionTransformer(16, 4, width, 2, 4, 2.0, output_dim=16).eval()


def noisy(state, size, seed=1):
    draw = source(seed)
    return {
        key: value + size * value.std(unbiased=False) * torch.randn(value.shape, generator=draw)
        if value.is_floating_point()
        else value
        for key, value in state.items()
    }


def scales(size, spread, seed):
    """PaRaMS': random, for every dimension of every head."""
    return torch.exp(spread * torch.randn(size, generator=source(seed)))


def invertible(heads, size, spread, seed):
    """Any invertible matrix for every head, as one block-diagonal one."""
    return torch.block_diag(*(torch.eye(size) + spread * torch.randn(heads, size, size, generator=source(seed))))


def disguised(state, kind, spread=1.0, heads=4):
    """The state of a `tower` that does the same."""
    state = {key: value.clone() for key, value in state.items()}
    for block in range(2):
        prefix = f"transformer.resblocks.{block}."
        weight, bias = state[prefix + "attn.in_proj_weight"], state[prefix + "attn.in_proj_bias"]
        out = state[prefix + "attn.out_proj.weight"]
        width = len(out)
        if kind == "permuted":
            order = torch.randperm(2 * width, generator=source(block))
            for key in ("mlp.c_fc.weight", "mlp.c_fc.bias"):
                state[prefix + key] = state[prefix + key][order]
            state[prefix + "mlp.c_proj.weight"] = state[prefix + "mlp.c_proj.weight"][:, order]
            continue
        for index, rows in enumerate(torch.arange(3 * width).chunk(3)[::2]):
            if kind == "scaled":
                T = torch.diag(scales(width, spread, 7 * block + index))
            else:
                T = invertible(heads, width // heads, spread, 7 * block + index)
            inverse = torch.linalg.inv(T)
            weight[rows], bias[rows] = T @ weight[rows], T @ bias[rows]
            if index == 0:
                keys = torch.arange(width, 2 * width)
                weight[keys], bias[keys] = inverse.mT @ weight[keys], inverse.mT @ bias[keys]
            else:
                out.copy_(out @ inverse)
    return state


@pytest.mark.parametrize(
    ("kind", "spread", "found"),
    [
        ("scaled", 1.0, {"query and key", "value and output"}),
        ("scaled", 0.3, {"query and key", "value and output"}),
        ("invertible", 0.2, {"query and key", "value and output"}),
        ("permuted", 0.0, {"MLP"}),
    ],
)
def test_a_tower_in_disguise(kind, spread, found):
    base, images = tower(), torch.randn(2, 3, 16, 16, generator=source())
    tuned = noisy(base.state_dict(), 0.05)
    state = disguised(tuned, kind, spread)
    outputs = [torch.func.functional_call(base, s, (images,)) for s in (tuned, state)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)  # it does the same
    assert mergeability(base, tuned).mergeable
    with pytest.warns(UnmergeableWarning, match=rf"finetuned: {2 * len(found)} of 6 layers"):
        report = mergeability(base, state)
    assert not report.mergeable
    assert len(report.transformed) == 2 * len(found)
    assert {layer.kind for layer in report.transformed} == found
    for layer in report.layers:
        if layer.mergeable:
            assert layer.cancellation > 0.85
        else:
            assert layer.cancellation < 0.35
            assert layer.product_change < 0.2 < layer.change
        assert (layer.moved > 0.9) == (layer.kind == "MLP" and not layer.mergeable)


def test_the_margin_of_training():
    """Far from the threshold of 0.5, from a trained and from a random start, with any optimizer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        kinds = torch.randn(10, 3, 16, 16)
        targets = torch.arange(20) % 10
        images = torch.randn(20, 3, 16, 16) + 0.5 * kinds[targets]

        def trained(base, optimizer, steps=15, **options):
            model, head = copy.deepcopy(base), nn.Linear(16, 10)
            chosen = optimizer([*model.parameters(), *head.parameters()], **options)
            for _ in range(steps):
                loss = nn.functional.cross_entropy(head(model(images)), targets)
                chosen.zero_grad()
                loss.backward()
                chosen.step()
            return model

        base = tower()
        start = trained(base, torch.optim.AdamW, lr=1e-3)
        least, most = [], []
        for begin in (base, start):
            for optimizer, options in (
                (torch.optim.AdamW, {"lr": 4e-3, "weight_decay": 3.0}),
                (torch.optim.SGD, {"lr": 0.3}),
            ):
                report = mergeability(begin, trained(begin, optimizer, **options))
                assert report.mergeable
                least.append(min(layer.cancellation for layer in report.layers))
                most.append(max(layer.change for layer in report.layers))
    assert min(least) > 0.9
    assert max(most) > 0.2


@settings(deadline=None, max_examples=15)
@given(
    size=st.floats(1e-6, 10.0),
    rank=st.sampled_from([1, 4, None]),
    which=st.sets(st.sampled_from("qkvo"), min_size=1),
    seed=st.integers(0, 99),
)
def test_noise_of_any_size_and_rank_is_no_transform(size, rank, which, seed):
    draw = source(seed)
    base = {f"attn.{name}.weight": torch.randn(32, 48, generator=draw) for name in "qkv"}
    base["attn.o.weight"] = torch.randn(48, 32, generator=draw)
    tuned = dict(base)
    for name in which:
        m, n = base[f"attn.{name}.weight"].shape
        r = rank or min(m, n)
        noise = torch.randn(m, r, generator=draw) @ torch.randn(r, n, generator=draw)
        tuned[f"attn.{name}.weight"] = tuned[f"attn.{name}.weight"] + size * noise
    assert mergeability(base, tuned).mergeable


def test_what_is_measured():
    draw = source()
    A, B, dA, dB = (torch.randn(3, 2, generator=draw, dtype=torch.float64) for _ in range(4))
    report = quiet({"fc1.weight": B, "fc2.weight": A.mT}, {"fc1.weight": B + dB, "fc2.weight": (A + dA).mT})
    (layer,) = report.layers
    parts = [dA.T @ B, A.T @ dB, dA.T @ dB]
    total = sum(parts)
    assert layer.names == ("fc2.weight", "fc1.weight")
    assert layer.change == pytest.approx(
        float((dA.norm() ** 2 + dB.norm() ** 2) / (A.norm() ** 2 + B.norm() ** 2)) ** 0.5
    )
    assert layer.product_change == pytest.approx(float(total.norm() / (A.T @ B).norm()))
    assert layer.cancellation == pytest.approx(float(total.norm()) / sum(float(p.norm()) ** 2 for p in parts) ** 0.5)


def test_nothing_changed():
    base = tower()
    report = mergeability(base, base)
    assert report.mergeable
    assert {(layer.change, layer.product_change, layer.cancellation) for layer in report.layers} == {(0.0, 0.0, 1.0)}
    assert mergeability(base, disguised(base.state_dict(), "scaled", 1e-3)).mergeable  # too little to do harm
    zero = {key: torch.zeros_like(value) for key, value in base.state_dict().items()}
    assert mergeability(zero, zero).mergeable


def test_a_few_units_in_other_places():
    base = tower().state_dict()
    state = {key: value.clone() for key, value in base.items()}
    order = torch.arange(64)
    order[:4] = torch.tensor([1, 2, 3, 0])
    prefix = "transformer.resblocks.0.mlp."
    state[prefix + "c_fc.weight"] = base[prefix + "c_fc.weight"][order]
    state[prefix + "c_proj.weight"] = base[prefix + "c_proj.weight"][:, order]
    (layer,) = quiet(base, state).transformed
    assert layer.moved == 4 / 64


def hugging_face(name):
    import transformers

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    models = {
        "ViT": lambda: transformers.ViTModel(transformers.ViTConfig(**small, image_size=16, patch_size=8)),
        "CLIP": lambda: transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(**small, image_size=16, patch_size=8)
        ),
        "BERT": lambda: transformers.BertModel(transformers.BertConfig(**small, vocab_size=9)),
        "GPT-2": lambda: transformers.GPT2Model(transformers.GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=9)),
        "T5": lambda: transformers.T5EncoderModel(
            transformers.T5Config(d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=9)
        ),
        "Llama": lambda: transformers.LlamaModel(
            transformers.LlamaConfig(**small, num_key_value_heads=2, vocab_size=9)
        ),
        "GPT-NeoX": lambda: transformers.GPTNeoXModel(transformers.GPTNeoXConfig(**small, vocab_size=9)),
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return models[name]().state_dict()


def timm(name):
    import timm as library

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return library.create_model(name, img_size=16, patch_size=8, embed_dim=32, depth=1, num_heads=4).state_dict()


def torchs():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.TransformerDecoderLayer(32, 4, 64).state_dict()


@pytest.mark.parametrize(
    ("state", "kinds", "head_size"),
    [
        (lambda: hugging_face("ViT"), 3, None),
        (lambda: hugging_face("CLIP"), 3, None),
        (lambda: hugging_face("BERT"), 3, None),
        (lambda: hugging_face("GPT-2"), 3, None),
        (lambda: hugging_face("T5"), 3, None),
        (lambda: hugging_face("Llama"), 3, 8),
        (lambda: hugging_face("Llama"), 1, None),
        (lambda: hugging_face("GPT-NeoX"), 3, 8),
        (lambda: hugging_face("GPT-NeoX"), 1, None),
        (lambda: timm("vit_tiny_patch16_224"), 3, None),
        (lambda: {f"visual.trunk.{k}": v for k, v in timm("vit_tiny_patch16_224").items()}, 3, None),
        (torchs, 5, None),
    ],
)
def test_names_of_all_makes(state, kinds, head_size):
    base = state()
    tuned = noisy(base, 0.05)
    report = mergeability(base, tuned, head_size=head_size)
    assert report.mergeable
    assert len(report.layers) == kinds
    assert bool(report.unchecked) == (kinds == 1)
    for layer in report.layers:  # both matrices, whatever their layout, are where the pair says
        first, second = layer.names[0], layer.names[-1]
        if first != second and tuned[first].shape[0] == tuned[second].shape[0]:
            scaled = tuned | {first: 3 * tuned[first], second: tuned[second] / 3}
            assert layer.names in [other.names for other in quiet(base, scaled, head_size=head_size).transformed]


def test_shared_heads_of_keys():
    draw, size = source(), 8
    base = {"attn.q_proj.weight": torch.randn(4 * size, 32, generator=draw)}
    base |= {f"attn.{name}_proj.weight": torch.randn(2 * size, 32, generator=draw) for name in "kv"}
    base["attn.o_proj.weight"] = torch.randn(32, 4 * size, generator=draw)
    T = [torch.eye(size) + 0.5 * torch.randn(size, size, generator=draw) for _ in range(2)]
    state = noisy(base, 0.05)
    state["attn.k_proj.weight"] = torch.block_diag(*T) @ state["attn.k_proj.weight"]
    back = torch.block_diag(*(torch.linalg.inv(T[head // 2]).mT for head in range(4)))
    state["attn.q_proj.weight"] = back @ state["attn.q_proj.weight"]
    assert [layer.kind for layer in quiet(base, state, head_size=size).transformed] == ["query and key"]
    assert quiet(base, state).layers == ()
    assert set(mergeability(base, state).unchecked) == set(base)


def test_files_modules_and_half_precision(tmp_path):
    from safetensors.torch import save_file

    base = tower()
    state = disguised(base.state_dict(), "scaled")
    save_file(state, tmp_path / "finetuned.safetensors")
    report = quiet(base, tmp_path / "finetuned.safetensors")
    assert isinstance(report, Mergeability)
    assert report == quiet(base.state_dict(), state)
    half = [{key: value.to(torch.bfloat16) for key, value in s.items()} for s in (base.state_dict(), state)]
    assert [layer.mergeable for layer in quiet(*half).layers] == [layer.mergeable for layer in report.layers]


def test_it_is_a_warning_of_the_library():
    assert issubclass(UnmergeableWarning, RmtllmfWarning)


@pytest.mark.parametrize(
    ("base", "tuned", "options", "error", "message"),
    [
        ({"w": torch.ones(2)}, {"w": torch.ones(2)}, {}, InputError, "base: no attention block and no MLP"),
        ({"fc1.weight": torch.ones(2, 2)}, {}, {}, StateMismatchError, "finetuned lacks 'fc1.weight'"),
        ({"q": torch.ones(2)}, {"q": torch.ones(2)}, {"head_size": 0}, InputError, "head_size"),
    ],
)
def test_bad_input(base, tuned, options, error, message):
    with pytest.raises(error, match=message):
        mergeability(base, tuned, **options)


def test_not_finite():
    base = {"fc1.weight": torch.ones(2, 2), "fc2.weight": torch.ones(2, 2)}
    with pytest.raises(NonFiniteError, match=r"finetuned\['fc2.weight'\] holds 1 non-finite"):
        mergeability(base, base | {"fc2.weight": torch.tensor([[1.0, torch.nan], [1.0, 1.0]])})
