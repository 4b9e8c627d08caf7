"""What goes with fused weights into a folder: which files, and what the configuration says of their dtype."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmtllmf.errors import InputError
from rmtllmf.taskvec import fuse_files

CONFIG = """{
  "architectures": ["LlamaForCausalLM"],
  "dtype": "float32",
    "odd":   [1,2 , 3.50],
  "text_config": {"torch_dtype": "bfloat16", "name": "\\u00e4 \\"dtype\\": \\"float32\\""},
  "torch_dtype" : "float32",
  "vision_config": {"dtype": null}
}"""


def folder(path, seed, files=()):
    path.mkdir()
    state = {"w": torch.randn(3, 2, generator=torch.Generator().manual_seed(seed)), "n": torch.tensor(seed)}
    save_file(state, path / "model.safetensors")
    for name, content in dict(files).items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(content)
    return path


def config_after(tmp_path, content, dtype, name="out"):
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    if not base.exists():
        folder(base, 0)
        folder(tuned, 1)
    (base / "config.json").write_text(content)
    fuse_files(base, [tuned], tmp_path / name, dtype=dtype)
    return (tmp_path / name / "config.json").read_text()


def test_the_configuration_says_the_dtype_that_was_asked_for(tmp_path):
    found = config_after(tmp_path, CONFIG, torch.float16)
    assert found == CONFIG.replace(': "float32"', ': "float16"').replace('"bfloat16"', '"float16"').replace(
        '"torch_dtype" : "float32"', '"torch_dtype" : "float16"'
    ).replace('\\": \\"float16', '\\": \\"float32')
    assert json.loads(found)["text_config"]["name"] == 'ä "dtype": "float32"'
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].dtype == torch.float16


@pytest.mark.parametrize(
    ("content", "dtype"),
    [
        (CONFIG, None),
        ('{"dtype":  "bfloat16"}', torch.bfloat16),
        ('{"dtype":  "auto", "torch_dtype": null}', torch.bfloat16),
        ('{"hidden_size":  3}', torch.bfloat16),
        ("[ 1]", torch.bfloat16),
    ],
)
def test_and_stays_as_it_is_where_it_says_no_other(content, dtype, tmp_path):
    assert config_after(tmp_path, content, dtype) == content


def test_the_dtype_of_something_else_stays(tmp_path):
    content = '{"dtype": "float32", "quantization_config": {"dtype": "float32"}, "rest": {"dtype": "float32"}, "ä": 1}'
    found = config_after(tmp_path, content, torch.bfloat16)
    assert json.loads(found) == json.loads(content) | {"dtype": "bfloat16"}
    assert "ä" in found


def test_a_configuration_that_is_none(tmp_path):
    with pytest.raises(InputError, match=r"config.json' is no JSON"):
        config_after(tmp_path, "{", torch.float16)
    assert not (tmp_path / "out").exists()
    assert config_after(tmp_path, "{", None) == "{"  # copied, and not read


def test_transformers_loads_what_the_configuration_says(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    for name in ("base", "tuned"):
        transformers.BertModel(config).save_pretrained(tmp_path / name)
    fuse_files(tmp_path / "base", [tmp_path / "tuned"], tmp_path / "half", dtype=torch.float16)
    assert transformers.BertModel.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.float16


COPIED = [
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "vocab.txt", "merges.txt",
    "README.md", "qwen.tiktoken", "vocab.bpe", "source.spm", "LICENSE", "NOTICE", "chat_template.jinja",
    "chat_template.json", "chat_templates/tool.jinja", "additional_chat_templates/rag.jinja",
]  # fmt: skip
LEFT = [
    "modeling_own.py", "training_args.bin", "trainer_state.json", "adapter_config.json", "other.safetensors.index.json",
    "pytorch_model.bin.index.json", "chat_templates/run.py", "onnx/model.json", "optimizer.pt", "LICENSE.py",
]  # fmt: skip


def test_which_files_are_copied(tmp_path):
    base = folder(tmp_path / "base", 0, {name: name for name in [*COPIED, *LEFT]})
    fuse_files(base, [folder(tmp_path / "tuned", 1, {"special_tokens_map.json": ""})], tmp_path / "out")
    found = [path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(found) == sorted([*COPIED, "model.safetensors"])
    assert all((tmp_path / "out" / name).read_text() == name for name in COPIED)


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
@pytest.mark.parametrize("link", ["file", "folder"])
def test_templates_are_the_folders_own(link, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret.jinja").write_text("1234")
    base, tuned = folder(tmp_path / "base", 0), folder(tmp_path / "tuned", 1)
    if link == "file":
        (base / "chat_templates").mkdir()
        (base / "chat_templates" / "x.jinja").symlink_to(tmp_path / "elsewhere" / "secret.jinja")
    else:
        (base / "chat_templates").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="leads out of its folder"):
        fuse_files(base, [tuned], tmp_path / "out")


@pytest.mark.skipif(os.name == "nt", reason="links of POSIX")
def test_nothing_is_written_through_a_link_in_the_parts_of_an_earlier_run(tmp_path, monkeypatch):
    base = folder(tmp_path / "base", 0, {"chat_templates/x.jinja": "mine"})
    tuned = folder(tmp_path / "tuned", 1)

    def stop(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("rmtllmf.taskvec._checkpoint_writer.Files.done", stop)
        with pytest.raises(KeyboardInterrupt):
            fuse_files(base, [tuned], tmp_path / "out")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / ".out.part" / "chat_templates").symlink_to(tmp_path / "elsewhere")
    fuse_files(base, [tuned], tmp_path / "out")
    assert not list((tmp_path / "elsewhere").iterdir())
    assert (tmp_path / "out" / "chat_templates" / "x.jinja").read_text() == "mine"
