"""What is taken for a model on disk, by everything that takes one; and what errors say about the rest."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.readers import _make_adapter, sharded
from rmtllmf.errors import InputError, StateMismatchError
from rmtllmf.metrics import snr_db
from rmtllmf.resilience import embedding_keys, restore
from rmtllmf.taskvec import TaskVector, adapter_vector, aligned, emr, fuse, fuse_files, task_arithmetic


def model(seed):
    source = torch.Generator().manual_seed(seed)
    return {
        "fc.weight": torch.randn(3, 2, generator=source),
        "fc.bias": torch.randn(3, generator=source),
        "half": torch.randn(4, generator=source),
        "steps": torch.tensor(seed),
    }


@pytest.fixture
def pair(tmp_path):
    for seed, name in enumerate(("base", "tuned")):
        save_file(model(seed), tmp_path / f"{name}.safetensors")
    return tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"


def everything_that_reads(base, tuned, out):
    """A call for every place of a model, with `base` and `tuned` there."""
    return {
        "between": lambda: TaskVector.between(base, tuned),
        "fuse": lambda: fuse(base, [tuned]),
        "fuse_files": lambda: fuse_files(base, [tuned], out),
        "restore": lambda: restore(base, tuned, "half"),
    }


def errors_of(base, tuned, out, kind):
    found = {}
    for name, call in everything_that_reads(base, tuned, out).items():
        with pytest.raises(kind) as error:
            call()
        found[name] = str(error.value)
    return found


# files of the library's own that are no model


@pytest.mark.parametrize("place", ["base", "tuned"])
def test_a_saved_task_vector_is_no_model(place, pair, tmp_path):
    vector = TaskVector.between(*pair)
    saved = tmp_path / "vector.safetensors"
    vector.save(saved)
    for path in pair:  # so that names and shapes are those of the vector, and nothing else tells
        save_file({key: load_file(path)[key] for key in vector}, path)
    given = {"base": pair[0], "tuned": pair[1]} | {place: saved}
    for name, text in errors_of(given["base"], given["tuned"], tmp_path / "o.safetensors", InputError).items():
        argument = {"base": "state" if name == "restore" else "base", "tuned": "(finetuned|base)"}[place]
        pattern = rf"{argument}(\[0\])?: '{saved}' is no model: it holds a task vector, .*TaskVector\.load"
        assert re.match(pattern, text), text
    assert not (tmp_path / "o.safetensors").exists()


def test_what_takes_vectors_still_reads_them(pair, tmp_path):
    vector = TaskVector.between(*pair)
    vector.save(tmp_path / "vector.safetensors")
    assert snr_db(tmp_path / "vector.safetensors", 1.1 * vector) == pytest.approx(20.0, abs=1e-3)
    loaded = TaskVector.load(tmp_path / "vector.safetensors")
    assert torch.equal(fuse(pair[0], [loaded], scale=1.0)["half"], fuse(pair[0], [pair[1]], scale=1.0)["half"])
    with pytest.raises(InputError, match=r"between\(base, path\)"):
        TaskVector.load(pair[1])


def test_several_vectors_in_a_file_are_no_model(pair, tmp_path):
    emr([TaskVector.between(*pair)] * 2).save(tmp_path / "tasks.safetensors")
    for text in errors_of(pair[0], tmp_path / "tasks.safetensors", tmp_path / "o.safetensors", InputError).values():
        assert "written by MaskedVectors.save; read it with MaskedVectors.load" in text


# folders


def test_every_place_of_a_model_takes_a_file_an_index_or_a_folder(tmp_path):
    for seed in (0, 1):
        sharded(tmp_path / str(seed), model(seed))
        (tmp_path / f"single{seed}").mkdir()
        save_file(model(seed), tmp_path / f"single{seed}" / "model.safetensors")
    vector = TaskVector.between(model(0), model(1))
    fused = fuse(model(0), [model(1)])
    forms = [
        [tmp_path / str(seed) for seed in (0, 1)],
        [str(tmp_path / str(seed) / "model.safetensors.index.json") for seed in (0, 1)],
        [tmp_path / f"single{seed}" for seed in (0, 1)],
        [tmp_path / f"single{seed}" / "model.safetensors" for seed in (0, 1)],
    ]
    for base, tuned in forms:
        found = TaskVector.between(base, tuned)
        assert set(found) == set(vector)
        assert all(torch.equal(found[key], vector[key]) for key in vector)
        found = fuse(base, [tuned])
        assert all(torch.equal(found[key], fused[key]) for key in fused)
        assert torch.equal(restore(base, tuned, "half")["half"], model(1)["half"])
        assert embedding_keys(base) == embedding_keys(model(0))


def test_the_base_of_an_adapter_may_be_a_folder(tmp_path):
    _make_adapter(tmp_path)
    base = {"fc.weight": torch.zeros(3, 2), "fc.bias": torch.zeros(3)}
    sharded(tmp_path / "base", base)
    expected = adapter_vector(tmp_path / "adapter", base=base)
    found = adapter_vector(tmp_path / "adapter", base=tmp_path / "base")
    assert torch.equal(found["fc.weight"], expected["fc.weight"])


def test_a_single_file_goes_before_shards_as_in_transformers(tmp_path):
    sharded(tmp_path / "both", model(1))
    save_file(model(2), tmp_path / "both" / "model.safetensors")
    save_file({"other": torch.ones(1)}, tmp_path / "both" / "consolidated.safetensors")
    fuse_files(tmp_path / "both", [tmp_path / "both"], tmp_path / "fused")
    found = load_file(tmp_path / "fused" / "model.safetensors")
    assert torch.equal(found["half"], model(2)["half"])
    assert sorted(path.name for path in (tmp_path / "fused").glob("*.safetensors*")) == ["model.safetensors"]


def test_transformers_takes_the_single_file_too(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    sharded_model, single = (transformers.BertModel(config) for _ in range(2))
    sharded_model.save_pretrained(tmp_path / "both", max_shard_size="2KB")
    single.save_pretrained(tmp_path / "single")
    shutil.copy(tmp_path / "single" / "model.safetensors", tmp_path / "both")
    theirs = transformers.BertModel.from_pretrained(tmp_path / "both").state_dict()
    ours = fuse(tmp_path / "both", [tmp_path / "both"])
    assert all(torch.equal(theirs[key], ours[key]) for key in ours)


def test_links_out_of_a_folder_are_refused_everywhere(tmp_path, pair):
    if sys.platform == "win32":
        pytest.skip("links of POSIX")
    (tmp_path / "links").mkdir()
    os.symlink(pair[1], tmp_path / "links" / "model.safetensors")
    for text in errors_of(pair[0], tmp_path / "links", tmp_path / "o.safetensors", InputError).values():
        assert "is a link that leads out of its folder" in text
        assert "hard-link" in text
        assert "pass the path that it leads to" in text
    (tmp_path / "links" / "model.safetensors").unlink()
    os.link(pair[1], tmp_path / "links" / "model.safetensors")
    assert len(TaskVector.between(pair[0], tmp_path / "links")) == 3


# what errors say


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_short_is_called_truncated(share, pair, tmp_path):
    content = pair[1].read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(content[: int(len(content) * share)])
    for text in errors_of(pair[0], tmp_path / "cut.safetensors", tmp_path / "o.safetensors", InputError).values():
        assert "cut.safetensors' is truncated: it ends" in text
        assert "download it again" in text


def test_a_pointer_of_git_lfs_is_called_that(pair, tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"
    (tmp_path / "lfs.safetensors").write_bytes(pointer)
    for text in errors_of(pair[0], tmp_path / "lfs.safetensors", tmp_path / "o.safetensors", InputError).values():
        assert "is a Git LFS pointer" in text
        assert "git lfs pull" in text


@pytest.mark.parametrize("file", ["", "adapter_model.safetensors"])
def test_an_adapter_is_no_model(file, pair, tmp_path):
    _make_adapter(tmp_path)
    adapter = tmp_path / "adapter" / file
    for text in errors_of(pair[0], adapter, tmp_path / "o.safetensors", InputError).values():
        assert f"is an adapter, and no model: read it with adapter_vector('{tmp_path / 'adapter'}')" in text
    fuse(pair[0], [adapter_vector(adapter)])
    # beside a model it does not matter
    shutil.copy(pair[1], tmp_path / "adapter" / "model.safetensors")
    assert TaskVector.between(pair[0], tmp_path / "adapter")


def test_pickled_weights_are_named_with_what_converts_them(pair, tmp_path):
    (tmp_path / "old").mkdir()
    for name in ("pytorch_model.bin", "config.json"):
        (tmp_path / "old" / name).write_bytes(b"{}")
    for where in (tmp_path / "old", tmp_path / "old" / "pytorch_model.bin"):
        for text in errors_of(pair[0], where, tmp_path / "o.safetensors", InputError).values():
            assert "pytorch_model.bin" in text
            assert "save_pretrained, or torch.load(..., weights_only=True), then safetensors" in text
            assert "config.json" not in text


@pytest.mark.parametrize("name", ["gone", "gone.safetensors", "meta-llama/Llama-3-8B"])
def test_what_is_not_there_is_not_downloaded(name, pair, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in errors_of(pair[0], name, tmp_path / "o.safetensors", FileNotFoundError).values():
        assert f"there is no file or folder '{name}'" in text
        assert "Nothing is downloaded" in text


def test_an_empty_folder(pair, tmp_path):
    (tmp_path / "empty").mkdir()
    for text in errors_of(pair[0], tmp_path / "empty", tmp_path / "o.safetensors", InputError).values():
        assert text.endswith("found none")
    for name in ("a", "b"):
        shutil.copy(pair[1], tmp_path / "empty" / f"{name}.safetensors")
    for text in errors_of(pair[0], tmp_path / "empty", tmp_path / "o.safetensors", InputError).values():
        assert text.endswith("found ['a.safetensors', 'b.safetensors']; shards need their index")


def test_an_index_from_elsewhere_leads_nowhere(pair, tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": str(pair[1])}}))
    for text in errors_of(pair[0], tmp_path / "f", tmp_path / "o.safetensors", InputError).values():
        assert "expected the plain name of a file beside it" in text


def test_vectors_of_different_layers_are_sent_to_aligned():
    vectors = [{"q": torch.ones(2)}, {"v": torch.ones(2)}]
    with pytest.raises(StateMismatchError, match=r"lacks 'q'.*aligned\(vectors\).*as adapters do"):
        task_arithmetic(vectors)
    with pytest.raises(StateMismatchError, match=r"lacks 'q'.*aligned\(vectors\)"):
        fuse({"q": torch.ones(2), "v": torch.ones(2)}, [TaskVector(vector) for vector in vectors])


# adapters in fuse


def test_an_adapter_on_another_base(tmp_path):
    _make_adapter(tmp_path)
    vector = adapter_vector(tmp_path / "adapter")
    with pytest.raises(StateMismatchError, match=r"adapter '.*' names 'fc.weight', which base lacks"):
        fuse({"other.weight": torch.zeros(3, 2)}, [vector])
    with pytest.raises(StateMismatchError, match=r"\['fc.weight'\] has shape \(3, 2\); base has \(4, 2\)"):
        fuse({"fc.weight": torch.zeros(4, 2)}, [vector])
    whole = torch.zeros(3, 2, dtype=torch.long)
    for given in (vector, TaskVector(vector)):
        with pytest.raises(StateMismatchError, match=r"is torch.float32; base has torch.int64, which is never changed"):
            fuse({"fc.weight": whole}, [given])


def test_what_aligned_gives_says_what_it_is(tmp_path):
    _make_adapter(tmp_path)
    adapter, other = aligned([adapter_vector(tmp_path / "adapter"), {"other.weight": torch.ones(2, 2)}])
    folder = re.escape(str(tmp_path / "adapter"))
    own = f"<task vector of adapter '{folder}': 1 tensors, made when they are read>"
    assert re.fullmatch(f"<{own}, aligned: 2 tensors, of which 1 is zero>", repr(adapter))
    assert repr(other) == "<vectors[1], aligned: 2 tensors, of which 1 is zero>"
    assert repr(aligned([{"w": torch.ones(2)}])[0]) == "<vectors[0], aligned: 1 tensor>"
