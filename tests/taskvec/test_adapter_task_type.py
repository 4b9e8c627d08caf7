"""The task type in the configuration of a saved adapter: what PEFT's automatic classes go by."""

import json

import pytest
import torch

from rmtllmf.errors import InputError
from rmtllmf.taskvec import TaskVector, adapter_vector, low_rank, weighted_average

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

pytestmark = [
    # what PEFT and transformers say about their own configurations
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

CONFIG = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 20,
}


def said_in(folder):
    return json.loads((folder / "adapter_config.json").read_text())["task_type"]


def test_fused_adapters_load_by_name_of_their_task(tmp_path):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    base.save_pretrained(tmp_path / "base")
    for name in "ab":
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "base")
        peft.get_peft_model(model, config).save_pretrained(tmp_path / name)
    update = weighted_average([adapter_vector(tmp_path / name) for name in "ab"])
    kind = said_in(tmp_path / "a")
    low_rank(update, 4).save_adapter(tmp_path / "both", str(tmp_path / "base"), model=base, task_type=kind)
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "both")
    ids = torch.arange(6)[None]
    expected = TaskVector(update).apply_to(base)(ids).logits
    torch.testing.assert_close(loaded(ids).logits, expected)

    low_rank(update, 4).save_adapter(tmp_path / "silent", str(tmp_path / "base"), model=base)
    assert said_in(tmp_path / "silent") is None
    with pytest.raises(ValueError, match="Cannot infer the auto class"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "silent")


@pytest.mark.parametrize("kind", ["CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"])
def test_names_and_the_enumeration_of_peft_are_written_as_names(tmp_path, kind):
    factors = low_rank({"fc.weight": torch.ones(4, 4)}, 1)
    factors.save_adapter(tmp_path / "name", task_type=kind)
    factors.save_adapter(tmp_path / "member", task_type=peft.TaskType(kind))
    assert said_in(tmp_path / "name") == said_in(tmp_path / "member") == kind


@pytest.mark.parametrize("kind", ["causal", "SEQ_CLS", peft.TaskType.TOKEN_CLS, 3])
def test_others_are_refused_before_anything_is_written(tmp_path, kind):
    with pytest.raises(
        InputError, match=r"task_type: expected one of 'CAUSAL_LM', .*SEQ_CLS.*PeftModel\.from_pretrained"
    ):
        low_rank({"fc.weight": torch.ones(4, 4)}, 1).save_adapter(tmp_path / "new", task_type=kind)
    assert not list(tmp_path.iterdir())


def test_with_a_head_peft_would_look_for_it_in_the_adapter(tmp_path):
    """Why those are refused, and that what is said to do instead works."""
    torch.manual_seed(0)
    base = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**CONFIG, pad_token_id=0))
    update = {"model.layers.0.self_attn.q_proj.weight": torch.randn(16, 16)}
    low_rank(update, 16).save_adapter(tmp_path, overwrite=True, model=base)
    ids = torch.arange(6)[None]
    found = peft.PeftModel.from_pretrained(base, tmp_path)(ids).logits
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "SEQ_CLS"}))
    again = transformers.LlamaForSequenceClassification(transformers.LlamaConfig(**CONFIG, pad_token_id=0))
    with pytest.raises(KeyError, match="score"):
        peft.PeftModel.from_pretrained(again, tmp_path)
    assert bool(found.isfinite().all())
