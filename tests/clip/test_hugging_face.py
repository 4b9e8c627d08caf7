"""Names of transformers to open_clip's and back, against the features that both libraries compute."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip import CLIP, CustomTextCLIP
from open_clip.transformer import QuickGELU, VisionTransformer
from safetensors.torch import load_file, save_file
from torch import nn

from rmtllmf.clip.hugging_face import from_hugging_face, to_hugging_face
from rmtllmf.errors import InputError, StateMismatchError

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "projection_dim": 6,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
    "hidden_act": "quick_gelu",
}


def scrambled(module, seed=0):
    """The same module with entries that all differ, biases and gains too: no swap goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return module.eval()


def tower(activation=QuickGELU, **options):
    size = {"width": 16, "layers": 3, "heads": 2, "mlp_ratio": 1.5, "output_dim": 6, **options}
    return scrambled(VisionTransformer(12, 4, **size, act_layer=activation))


def theirs(kind="CLIPVisionModelWithProjection", seed=0, **options):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(**{**CONFIG, **options})
    if kind == "CLIPModel":
        text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
        vision = config.to_dict()
        config = transformers.CLIPConfig(vision_config=vision, text_config=text, projection_dim=6)
    return scrambled(getattr(transformers, kind)(config), seed)


def made_up(width=4, layers=2, *, positions=5, channels=3, patch=2, hidden=6, dimension=3, dtype=torch.float32, seed=0):
    """A tower in open_clip's names, written out by hand; without a projection if its dimension is None."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "class_embedding": (width,),
        "positional_embedding": (positions, width),
        "conv1.weight": (width, channels, patch, patch),
    }
    norms = ["ln_pre", "ln_post"]
    for layer in range(layers):
        block = f"transformer.resblocks.{layer}"
        norms += [f"{block}.ln_1", f"{block}.ln_2"]
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
            f"{block}.attn.out_proj.weight": (width, width),
            f"{block}.attn.out_proj.bias": (width,),
            f"{block}.mlp.c_fc.weight": (hidden, width),
            f"{block}.mlp.c_fc.bias": (hidden,),
            f"{block}.mlp.c_proj.weight": (width, hidden),
            f"{block}.mlp.c_proj.bias": (width,),
        }
    shapes |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    if dimension is not None:
        shapes["proj"] = (width, dimension)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def same(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


IMAGES = torch.randn(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))


def test_open_clip_computes_the_features_of_transformers():
    model = theirs()
    ours = tower()
    ours.load_state_dict(from_hugging_face(model))
    with torch.no_grad():
        expected = model(IMAGES).image_embeds
        torch.testing.assert_close(ours(IMAGES), expected, rtol=1e-5, atol=1e-5)
        other = tower(nn.GELU)  # the same names and shapes, and another function
        other.load_state_dict(from_hugging_face(model.state_dict()))
        assert (other(IMAGES) - expected).abs().max() > 1e-3


def test_transformers_computes_the_features_of_open_clip():
    ours, model = tower(), theirs(seed=7)
    model.load_state_dict(to_hugging_face(ours))
    with torch.no_grad():
        torch.testing.assert_close(model(IMAGES).image_embeds, ours(IMAGES), rtol=1e-5, atol=1e-5)


def test_a_model_without_a_projection_gives_none_and_takes_none():
    model, ours = theirs("CLIPVisionModel"), tower()
    state = from_hugging_face(model)
    assert ours.state_dict().keys() - state.keys() == {"proj"}
    ours.load_state_dict(state, strict=False)
    with torch.no_grad():
        pooled = model(IMAGES).pooler_output
        torch.testing.assert_close(ours(IMAGES), pooled @ ours.proj, rtol=1e-5, atol=1e-5)
    in_memory = "vision_model." if next(iter(model.state_dict())).startswith("vision_model.") else ""
    back = to_hugging_face(state, prefix=in_memory)
    assert same(back, dict(model.state_dict()))
    theirs("CLIPVisionModel", seed=7).load_state_dict(back)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_from_pretrained_reads_what_is_written(tmp_path, prefix):
    transformers = pytest.importorskip("transformers")
    if not prefix and next(iter(theirs("CLIPVisionModel").state_dict())).startswith("vision_model."):
        pytest.skip("this version of transformers has the prefix")
    state = tower().state_dict()
    del state["proj"]
    save_file(to_hugging_face(state, prefix=prefix), tmp_path / "model.safetensors", metadata={"format": "pt"})
    transformers.CLIPVisionConfig(**CONFIG).save_pretrained(tmp_path)
    model, report = transformers.CLIPVisionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same(from_hugging_face(model), dict(state))


@pytest.mark.parametrize("kind", [CLIP, CustomTextCLIP])
def test_the_tower_of_a_whole_open_clip_model(kind):
    vision = {"image_size": 12, "patch_size": 4, "width": 16, "layers": 2, "head_width": 8}
    model = kind(embed_dim=6, vision_cfg=vision, text_cfg={"width": 8, "heads": 2, "layers": 1})
    with pytest.raises(InputError, match=r"state has .*'logit_scale'.* more beside the image.*drop_text_tower"):
        to_hugging_face(model)
    expected = to_hugging_face(model.visual)
    assert same(to_hugging_face(model, drop_text_tower=True), expected)
    alone = {name: tensor for name, tensor in model.state_dict().items() if name.startswith("visual.")}
    assert same(to_hugging_face(alone), expected)
    alone["visual.proj"] = torch.zeros(5, 6)
    with pytest.raises(StateMismatchError, match=r"state\['visual.proj'\] has shape \(5, 6\); expected \(16, 6\)"):
        to_hugging_face(alone)
    del alone["visual.conv1.weight"]
    with pytest.raises(StateMismatchError, match=r"state lacks 'visual.conv1.weight'; "):
        to_hugging_face(alone)


def test_the_tower_of_a_whole_transformers_model():
    model = theirs("CLIPModel")
    with pytest.raises(InputError, match=r"state has 'logit_scale', 'text_model.*drop_text_tower=True"):
        from_hugging_face(model)
    expected = from_hugging_face(
        {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name.startswith(("vision_model.", "visual_projection."))
        }
    )
    assert same(from_hugging_face(model, drop_text_tower=True), expected)
    ours = tower()
    ours.load_state_dict(expected)
    with torch.no_grad():
        found = model.visual_projection(model.vision_model(IMAGES).pooler_output)
        torch.testing.assert_close(ours(IMAGES), found, rtol=1e-5, atol=1e-5)


sizes = st.integers(1, 5)


@settings(max_examples=40)
@given(
    width=sizes,
    layers=st.integers(1, 12),
    positions=sizes,
    channels=sizes,
    patch=sizes,
    hidden=sizes,
    dimension=st.none() | sizes,
    dtype=st.sampled_from([torch.float64, torch.float32, torch.float16, torch.bfloat16]),
    prefix=st.sampled_from(["vision_model.", ""]),
)
def test_there_and_back_again(width, layers, dtype, prefix, **options):
    ours = made_up(width, layers, dtype=dtype, **options)
    there = to_hugging_face(ours, prefix=prefix)
    assert sum(tensor.numel() for tensor in there.values()) == sum(tensor.numel() for tensor in ours.values())
    assert all(name.startswith(prefix) or name == "visual_projection.weight" for name in there)
    assert same(from_hugging_face(there), ours)
    assert same(to_hugging_face(from_hugging_face(there), prefix=prefix), there)


def test_the_stack_is_query_key_value():
    ours = made_up()
    there = to_hugging_face(ours)
    for kind in ("weight", "bias"):
        stack = ours[f"transformer.resblocks.1.attn.in_proj_{kind}"]
        for index, part in enumerate("qkv"):
            name = f"vision_model.encoder.layers.1.self_attn.{part}_proj.{kind}"
            assert torch.equal(there[name], stack[4 * index : 4 * index + 4])


def test_dtypes_may_differ_between_tensors():
    ours = made_up(dtype=torch.float16)
    ours |= {name: tensor.float() for name, tensor in ours.items() if "ln_" in name}
    assert same(from_hugging_face(to_hugging_face(ours)), ours)


def test_the_results_are_copies_that_can_be_saved(tmp_path):
    ours = made_up()
    before = {name: tensor.clone() for name, tensor in ours.items()}
    there = to_hugging_face({name: nn.Parameter(tensor) for name, tensor in ours.items()})
    back = from_hugging_face(there)
    for state in (there, back):
        save_file(state, tmp_path / "state.safetensors")  # refuses shared and scattered memory
        assert same(load_file(tmp_path / "state.safetensors"), state)
        assert not any(tensor.requires_grad for tensor in state.values())
        for tensor in state.values():
            tensor.zero_()
    assert same(ours, before)


def test_files_are_states_too(tmp_path):
    ours = made_up()
    save_file(ours, tmp_path / "ours.safetensors")
    save_file(to_hugging_face(tmp_path / "ours.safetensors"), tmp_path / "theirs.safetensors")
    assert same(from_hugging_face(tmp_path / "theirs.safetensors"), ours)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_position_ids_of_old_checkpoints_are_left_out(prefix):
    ours = made_up()
    there = to_hugging_face(ours, prefix=prefix)
    name = f"{prefix}embeddings.position_ids"
    for ids in (torch.arange(5), torch.arange(5).expand(1, -1), torch.arange(5.0).half()):
        assert same(from_hugging_face({**there, name: ids}), ours)
    for ids in (torch.arange(4), torch.tensor([[0, 1, 2, 4, 3]]), torch.zeros(1, 5, dtype=torch.int64)):
        with pytest.raises(StateMismatchError, match=rf"state\['{name}'\] does not count from 0 to 4"):
            from_hugging_face({**there, name: ids})


WAYS = {
    "from": (from_hugging_face, to_hugging_face(made_up())),
    "from without a prefix": (from_hugging_face, to_hugging_face(made_up(), prefix="")),
    "to": (to_hugging_face, made_up()),
}
OPTIONAL = ("proj", "visual_projection.weight")


@pytest.mark.parametrize("way", WAYS)
def test_every_missing_or_misshaped_name_is_named(way):
    convert, good = WAYS[way]
    for name, tensor in good.items():
        rest = {key: value for key, value in good.items() if key != name}
        if name in OPTIONAL:
            assert not set(convert(rest)) & set(OPTIONAL)
        else:
            with pytest.raises(StateMismatchError, match=rf"state lacks '{name}'; its keys must be those of a CLIP"):
                convert(rest)
        bent = [tensor[None], tensor[..., 0]]
        if "position" not in name and name != "visual_projection.weight":  # with sizes that nothing else depends on
            bent.append(torch.cat([tensor, tensor[:1]]))
        for bad in bent:
            # a size that others depend on may be found wrong in one of these
            with pytest.raises(StateMismatchError, match=r"state\['.*'\] has shape \(.*\); expected \("):
                convert({**good, name: bad})
        for dtype in (torch.int8, torch.bool, torch.complex64):
            with pytest.raises(TypeError, match=rf"state\['{name}'\] is {dtype}; expected a floating-point"):
                convert({**good, name: tensor.to(dtype)})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name", ["encoder.layers.0.adapter.weight", "transformer.resblocks.0.ls_1.gamma", "proj.bias", "attn_pool.query"]
)
def test_every_unexpected_name_is_named(way, name):
    convert, good = WAYS[way]
    with pytest.raises(StateMismatchError, match=rf"state has the unexpected '{name}'; "):
        convert({**good, name: torch.zeros(1)})


def test_the_message_says_which_shape_was_expected():
    good = made_up()
    with pytest.raises(StateMismatchError, match=r"in_proj_bias'\] has shape \(11,\); expected \(12,\)"):
        to_hugging_face({**good, "transformer.resblocks.1.attn.in_proj_bias": torch.zeros(11)})
    with pytest.raises(StateMismatchError, match=r"'conv1.weight'\] has shape \(4, 3, 2\); expected \(4, 3, 2, Q\)"):
        to_hugging_face({**good, "conv1.weight": torch.zeros(4, 3, 2)})


def test_layers_that_leave_a_gap():
    good = to_hugging_face(made_up(layers=3))
    gap = {name: tensor for name, tensor in good.items() if ".layers.1." not in name}
    with pytest.raises(StateMismatchError, match=r"lacks 'vision_model.encoder.layers.1.* unexpected .*layers.2"):
        from_hugging_face(gap)
    far = {name.replace("layers.2.", "layers.987654321987."): tensor for name, tensor in good.items()}
    with pytest.raises(StateMismatchError, match=r"lacks .*layers.2.* unexpected .*layers.987654321987"):
        from_hugging_face(far)
    with pytest.raises(StateMismatchError, match=r"unexpected .*layers.02\."):
        from_hugging_face({name.replace("layers.2.", "layers.02."): tensor for name, tensor in good.items()})


def test_states_of_the_other_library_or_of_both():
    ours, there = made_up(), to_hugging_face(made_up())
    for convert, state in ((from_hugging_face, ours), (to_hugging_face, there), (from_hugging_face, {})):
        with pytest.raises(StateMismatchError, match="state lacks"):
            convert(state)
    name = "vision_model.post_layernorm.bias"
    mixed = {key.removeprefix("vision_model.") if key == name else key: tensor for key, tensor in there.items()}
    with pytest.raises(StateMismatchError, match=rf"lacks '{name}' and has the unexpected 'post_layernorm.bias'"):
        from_hugging_face(mixed)


def test_query_key_and_value_must_be_alike():
    there = to_hugging_face(made_up())
    name = "vision_model.encoder.layers.1.self_attn.v_proj.weight"
    with pytest.raises(
        StateMismatchError, match=rf"'{name}'\] is torch.float64 on cpu, '.*q_proj.weight' is .*float32"
    ):
        from_hugging_face({**there, name: there[name].double()})
    with pytest.raises(StateMismatchError, match=rf"'{name}'\] is torch.float32 on meta"):
        from_hugging_face({**there, name: there[name].to("meta")})


def test_meta_tensors_are_converted_too():
    ours = {name: tensor.to("meta") for name, tensor in made_up().items()}
    there = to_hugging_face(ours)
    there["vision_model.embeddings.position_ids"] = torch.arange(5, device="meta")
    back = from_hugging_face(there)
    assert {name: tensor.shape for name, tensor in back.items()} == {n: tensor.shape for n, tensor in ours.items()}


@pytest.mark.parametrize("prefix", ["vision_model", "model.", None])
def test_another_prefix(prefix):
    with pytest.raises(InputError, match=r"prefix: expected 'vision_model.' or '', got"):
        to_hugging_face(made_up(), prefix=prefix)


@pytest.mark.parametrize("convert", [from_hugging_face, to_hugging_face])
def test_what_is_no_state(convert):
    for bad in (3, [torch.zeros(1)], {"conv1.weight": 3}, {1: torch.zeros(1)}):
        with pytest.raises(TypeError, match="state"):
            convert(bad)
