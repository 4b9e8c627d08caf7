"""Our own files, by somebody who knows how they are made: what they say of themselves does not count."""

import json
import time

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers.masked_file import GOOD, MASKED
from helpers.mutations import MANY
from helpers.readers import changes, layer
from paper import _checkpoints
from paper.results import ProtocolError, Results, ResultsError
from rmtllmf._safetensors import write
from rmtllmf.errors import InputError, NonFiniteError, StateMismatchError
from rmtllmf.taskvec import MaskedVectors, TaskVector, load_routed, smile, train_router, twin_merging

VECTOR = {"rmtllmf": "task_vector", "version": "1"}


@pytest.mark.parametrize(
    "tied",
    [
        "",
        "{",
        "[" * MANY,
        '{"a":' * MANY,
        "null",
        "3",
        "[]",
        '[["v", "w"]]',
        '{"v": "nobody"}',
        '{"v": ["w"]}',
        '{"v": {}}',
        '{"v": null}',
        '{"w": "w"}',
        '{"u": "v", "v": "w"}',
        '{"v": "w", "v": "x"}',
        '{"\\ud800": "w"}',
        '{"v": NaN}',
    ],
    ids=lambda text: text[:20],
)
def test_ties_that_make_no_sense(tied, tmp_path):
    path = tmp_path / "v.safetensors"
    save_file({"w": torch.ones(2), "x": torch.ones(2)}, path, {**VECTOR, "tied": tied})
    with pytest.raises(InputError, match=r"v.safetensors' is damaged: its ties") as error:
        TaskVector.load(path)
    assert len(str(error.value)) < 1000


def test_ties_that_do(tmp_path):
    path = tmp_path / "v.safetensors"
    save_file({"w": torch.ones(2)}, path, {**VECTOR, "tied": '{"v": "w"}'})
    vector = TaskVector.load(path)
    assert vector["v"] is vector["w"]


def test_what_is_no_vector(tmp_path):
    path = tmp_path / "v.safetensors"
    for tensor in (torch.tensor([1]), torch.tensor([True])):
        save_file({"w": tensor}, path, VECTOR)
        with pytest.raises(InputError, match=r"is damaged: 'w' is torch\..*; expected floating-point entries"):
            TaskVector.load(path)
    write(path, {}, VECTOR)  # safetensors itself writes rubbish for nothing up to 0.4.3
    with pytest.raises(InputError, match="is damaged: expected at least one tensor"):
        TaskVector.load(path)
    save_file({"w": torch.ones(1)}, path, {**VECTOR, "version": "1" * MANY})
    with pytest.raises(InputError, match="is of version '111") as error:
        TaskVector.load(path)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"rescalers": torch.empty(0, dtype=torch.float64)}, InputError, "holds no finite rescalers"),
        ({"rescalers": torch.ones(2, dtype=torch.float64)}, InputError, "the mask of task 1 for 'w'"),
        ({"rescalers": torch.ones((), dtype=torch.float64)}, InputError, "holds no finite rescalers"),
        ({"mask.0.w": torch.ones(2, 1, dtype=torch.uint8)}, InputError, "the mask of task 0 for 'w'"),
        ({"mask.0.w": torch.ones(0, dtype=torch.uint8)}, InputError, "the mask of task 0 for 'w'"),
        ({"mask.1.w": torch.ones(2, dtype=torch.uint8)}, InputError, r"'mask\.1\.w' is of none of its 1 tasks"),
        ({"mask.00.w": torch.ones(2, dtype=torch.uint8)}, InputError, r"'mask\.00\.w' is of none"),
        ({"mask.-1.w": torch.ones(2, dtype=torch.uint8)}, InputError, r"'mask\.-1\.w' is of none"),
        ({"stranger": torch.ones(2)}, InputError, "'stranger' is of none of its 1 tasks"),
        ({"vector.w": torch.ones(9, dtype=torch.int32)}, InputError, r"'w' is torch\.int32; expected floating"),
        ({"vector.w": None, "mask.0.w": None}, InputError, "expected at least one tensor"),
        ({"vector.w": torch.full((9,), torch.nan)}, NonFiniteError, r"m\.safetensors'\['w'\] holds 9"),
    ],
)
def test_masks_that_contradict_themselves(change, error, message, tmp_path):
    path = tmp_path / "m.safetensors"
    save_file({key: value for key, value in {**GOOD, **change}.items() if value is not None}, path, MASKED)
    with pytest.raises(error, match=message):
        MaskedVectors.load(path)


def test_many_tasks_are_read_in_the_time_that_it_takes_to_read_them(tmp_path):
    """Not in that of each task times that of all."""
    count = 20_000
    masks = {f"mask.{task}.w": torch.ones(1, dtype=torch.uint8) for task in range(count)}
    path = tmp_path / "m.safetensors"
    save_file({"vector.w": torch.ones(8), "rescalers": torch.ones(count, dtype=torch.float64), **masks}, path, MASKED)
    start = time.process_time()
    assert len(MaskedVectors.load(path)) == count
    assert time.process_time() - start < 6  # one, and more than ten where every task looks through all names


def test_a_factor_that_overflows(tmp_path):
    for dtype, factor in ((torch.float32, 1e300), (torch.float16, 1e6), (torch.float8_e4m3fn, 1e3)):
        path = tmp_path / "m.safetensors"
        save_file(
            {**GOOD, "vector.w": torch.ones(9).to(dtype), "rescalers": torch.tensor([factor], dtype=torch.float64)},
            path,
            MASKED,
        )
        with pytest.raises(NonFiniteError, match=r"task 0\['w'\]"):
            MaskedVectors.load(path).task_vector(0)


def smile_state():
    return smile(layer(), changes(), rank=1, gate_rank=1).state_dict()


def twin_state():
    twin = twin_merging(layer(), changes(), rank=1)
    train_router(twin, {"a": [torch.zeros(4, 2)], "b": [torch.ones(4, 2)]}, epochs=1, hidden=4, seed=0)
    return twin.state_dict()


ROUTED = {
    "no left": (smile_state, {"0.left": None}, StateMismatchError, r"source lacks '0\.left'"),
    "no right": (smile_state, {"0.right": None}, StateMismatchError, "holds no experts"),
    "no routing": (smile_state, {"0.routing": None}, StateMismatchError, "source"),
    "numbers": (smile_state, {"0.left": torch.ones(2, 3, 1).long()}, StateMismatchError, r"'0\.left'\] is torch.int64"),
    "not finite": (smile_state, {"0.left": torch.full((2, 3, 1), torch.nan)}, NonFiniteError, r"0\.left"),
    "a weight not finite": (smile_state, {"0.weight": torch.full((3, 2), torch.inf)}, NonFiniteError, r"0\.weight"),
    "a weight of numbers": (smile_state, {"0.weight": torch.ones(3, 2).int()}, StateMismatchError, r"0\.weight.*int32"),
    "one expert more": (smile_state, {"0.right": torch.ones(3, 1, 2)}, StateMismatchError, "do not fit each other"),
    "no experts": (
        smile_state,
        {"0.right": torch.ones(0, 1, 2), "0.left": torch.ones(0, 3, 1)},
        StateMismatchError,
        "fit",
    ),
    "a flat one": (smile_state, {"0.right": torch.ones(4)}, StateMismatchError, "do not fit each other"),
    "another layer": (smile_state, {"0.right": torch.ones(2, 1, 5)}, StateMismatchError, "do not fit each other"),
    "more left": (smile_state, {"0.left": torch.ones(2, 3, 2)}, StateMismatchError, "do not fit each other"),
    "another shift": (smile_state, {"0.shift": torch.ones(2, 4)}, StateMismatchError, "do not fit each other"),
    "top k": (smile_state, {"0.routing": torch.tensor([1, 3])}, StateMismatchError, r"routing'\] is \[1, 3\].*1 to 2"),
    "top k of no end": (smile_state, {"0.routing": torch.tensor([1, 10**18])}, StateMismatchError, "routing"),
    "no gate": (smile_state, {"0.routing": torch.tensor([0, 1])}, StateMismatchError, "routing"),
    "a negative gate": (smile_state, {"0.routing": torch.tensor([-1, 1])}, StateMismatchError, "routing"),
    "routing in halves": (smile_state, {"0.routing": torch.tensor([1.0, 1.0])}, StateMismatchError, "routing"),
    "three numbers": (smile_state, {"0.routing": torch.tensor([1, 1, 1])}, StateMismatchError, r"of shape \(3,\)"),
    "twin, no left": (twin_state, {"model.0.left": None}, StateMismatchError, r"source lacks '0\.left'"),
    "twin, ranks": (twin_state, {"model.0.right": torch.ones(2, 2, 2)}, StateMismatchError, "do not fit each other"),
    "twin, not finite": (
        twin_state,
        {"router.4.bias": torch.full((4,), torch.nan)},
        NonFiniteError,
        r"router\.4\.bias",
    ),
    "a router of no end": (
        twin_state,
        {"router.0.weight": torch.ones(10**7, 0), "router.8.weight": torch.ones(2, 4)},
        StateMismatchError,
        "make no router between 2 experts",
    ),
    "a router for more": (twin_state, {"router.8.weight": torch.ones(3, 4)}, StateMismatchError, "make no router"),
    "a router without depth": (twin_state, {"router.0.weight": torch.ones(4)}, StateMismatchError, "make no router"),
    "half a router": (twin_state, {"router.4.weight": None}, StateMismatchError, "source has the unexpected"),
}


@pytest.mark.parametrize(("make", "change", "error", "message"), ROUTED.values(), ids=ROUTED)
def test_routed_models_that_contradict_themselves(make, change, error, message, tmp_path):
    path = tmp_path / "r.safetensors"
    state = {key: tensor.clone() for key, tensor in {**make(), **change}.items() if tensor is not None}
    for source in (state, path):
        if source is path:
            save_file(state, path)
        with pytest.raises(error, match=message):
            load_routed(layer(), source)


def test_layers_must_have_the_same_experts():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    vectors = [{f"{index}.weight": seed * torch.eye(2) for index in (0, 1)} for seed in (1, 2)]
    state = dict(smile(model, vectors, rank=1, gate_rank=1).state_dict())
    three = smile(model, [*vectors, vectors[0]], rank=1, gate_rank=1).state_dict()
    state |= {key: tensor for key, tensor in three.items() if key.startswith("1.")}
    with pytest.raises(StateMismatchError, match=r"its layers have \[2, 3\] experts"):
        load_routed(model, state)


@pytest.mark.parametrize(
    ("note", "message"),
    [
        ("[" * MANY, "is damaged"),
        ("{", "is damaged"),
        ("null", "was not written by this function"),
        ('{"version": 1}', "is damaged"),
        ('{"version": 1, "run": [["lr", 0.1]], "steps": 1}', "is damaged"),
        ('{"version": 1, "run": {"lr": 0.1}, "steps": "1"}', "is damaged"),
        ('{"version": 1, "run": {"lr": 0.1}, "steps": -1}', "is damaged"),
        ('{"version": 1, "run": {"lr": 0.2}, "steps": 1}', "is of another run: lr was 0.2, now 0.1"),
    ],
)
def test_checkpoints_of_a_run(note, message, tmp_path):
    save_file({"model.w": torch.ones(2)}, tmp_path / _checkpoints.NAME, {"finetune": note})
    with pytest.raises(InputError, match=message):
        _checkpoints.read(tmp_path, {"lr": 0.1})


@pytest.mark.parametrize("found", [{}, {"model.weight": torch.ones(1, 1)}, {"model.weight": torch.ones(())}])
def test_a_checkpoint_of_another_shape_is_not_spread_over_the_model(found):
    with pytest.raises(InputError, match=r"checkpoint: 'model.weight' has the shape .*; expected \(2, 2\)"):
        _checkpoints.put(nn.Linear(2, 2, bias=False), found)


@pytest.mark.parametrize("depth", [100, 450, 700, 5000])
def test_results_whose_protocol_has_no_ground(depth, tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"format": 1, "protocol": ' + '{"a":' * depth + "1" + "}" * depth + "}\n")
    with pytest.raises((ProtocolError, ResultsError)):
        Results(path, {"seed": 1}, key=str)
    assert json.loads(json.dumps(path.read_text())) == path.read_text()
