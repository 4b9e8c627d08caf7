"""Task vectors from files and to files: as a whole or not at all, and nothing else is read as one."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from rmtllmf.errors import InputError, NonFiniteError
from rmtllmf.taskvec import TaskVector


def test_from_safetensors_files(pair, tmp_path):
    base, tuned = pair
    for name, model in (("base", base), ("tuned", tuned)):
        state = {key: value.clone() for key, value in model.state_dict().items()}
        save_file(state, tmp_path / f"{name}.safetensors")
    from_files = TaskVector.between(tmp_path / "base.safetensors", str(tmp_path / "tuned.safetensors"))
    direct = TaskVector.between(base, tuned)
    assert all(torch.equal(from_files[key], direct[key]) for key in direct)


def test_save_and_load(pair, tmp_path):
    """Tied, non-contiguous, expanded, empty and 0-d tensors, views of one buffer, and half precision."""
    buffer = torch.arange(24.0)
    tau = TaskVector(
        {
            **TaskVector.between(*pair),
            "transposed": torch.arange(12.0).view(3, 4).T,
            "expanded": torch.tensor([1.0, 2.0]).expand(3, 2),
            "head view": buffer[:8],
            "overlapping view": buffer[4:12],
            "empty": torch.empty(0, 3),
            "scalar": torch.tensor(3.5),
            "half": torch.tensor([1.5], dtype=torch.bfloat16),
            "stepped": torch.arange(10.0)[::3],
        }
    )
    path = tmp_path / "tau.safetensors"
    tau.save(path)
    back = TaskVector.load(path)
    assert set(back) == set(tau)
    for key in tau:
        assert torch.equal(back[key], tau[key]), key
        assert back[key].dtype == tau[key].dtype
        assert back[key].shape == tau[key].shape
    assert back["embed.weight"].data_ptr() == back["head.weight"].data_ptr()
    assert "head.weight" not in load_file(path)  # stored once
    assert [p.name for p in tmp_path.iterdir()] == ["tau.safetensors"]


def test_saving_is_atomic(tmp_path, monkeypatch):
    path = tmp_path / "tau.safetensors"
    old = TaskVector({"w": torch.ones(3)})
    old.save(path)

    def full_disk(target, tensors, metadata):
        with open(target, "wb") as file:
            file.write(b"half a header")
        raise OSError("no space left on device")

    monkeypatch.setattr("rmtllmf.taskvec._files.write", full_disk)
    with pytest.raises(OSError, match="no space"):
        TaskVector({"w": torch.zeros(3)}).save(path)
    assert torch.equal(TaskVector.load(path)["w"], torch.ones(3))
    assert [p.name for p in tmp_path.iterdir()] == ["tau.safetensors"]


def test_load_refuses_what_is_no_task_vector(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(2)}, path)
    with pytest.raises(InputError, match="no task vector"):
        TaskVector.load(path)
    with pytest.raises(FileNotFoundError):
        TaskVector.load(tmp_path / "absent.safetensors")
    header = {"rmtllmf": "task_vector", "version": "1"}
    save_file({"w": torch.tensor([float("nan")])}, path, {**header, "tied": "{}"})
    with pytest.raises(NonFiniteError, match="'w'"):
        TaskVector.load(path)
    for tied in ('{"v": "nobody"}', "{", "[1]", '{"v": ["w"]}'):
        save_file({"w": torch.ones(2)}, path, {**header, "tied": tied})
        with pytest.raises(InputError, match="damaged"):
            TaskVector.load(path)
    save_file({"w": torch.ones(2)}, path, {**header, "version": "99"})
    with pytest.raises(InputError, match="version '99'"):
        TaskVector.load(path)
    path.write_bytes(b"not a header")
    with pytest.raises(InputError, match="no safetensors file"):
        TaskVector.load(path)
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match="no regular file"):
        TaskVector.load(tmp_path / "folder.safetensors")
