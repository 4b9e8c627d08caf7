"""An adapter_config.json by somebody who means harm."""

import json
import re
import time

import pytest
import torch

from helpers.mutations import MANY
from helpers.readers import _make_adapter
from rmtllmf import _untrusted
from rmtllmf.errors import InputError, NonFiniteError, ShapeError
from rmtllmf.taskvec import TaskVector, _adapter_patterns, adapter_vector, low_rank, task_arithmetic
from rmtllmf.taskvec._adapter_file import FACTOR
from rmtllmf.taskvec._adapter_patterns import Patterns, ways


@pytest.fixture
def folder(tmp_path):
    _make_adapter(tmp_path)
    return tmp_path / "adapter"


def write(folder, **values):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


TEXTS = {
    "nothing": (b"", "is no JSON"),
    "no UTF-8": (b"\xff\xfe", "is no JSON"),
    "lists without end": (b"[" * MANY, "is no JSON.*recursion"),
    "mappings without end": (b'{"peft_type":' * MANY, "is no JSON.*recursion"),
    "not a number": (b'{"peft_type": "LORA", "r": NaN, "lora_alpha": 1}', "NaN is no number"),
    "an option twice": (b'{"peft_type": "IA3", "peft_type": "LORA", "r": 1}', "a name comes twice"),
    "an endless integer": (b'{"peft_type": "LORA", "r": ' + b"1" * 5000 + b"}", "is no JSON"),
    "a list": (b"[1]", "peft_type is None"),
    "a kind without end": (json.dumps({"peft_type": "x" * MANY}).encode(), "peft_type is 'xxx"),
    "half a character": (b'{"peft_type": "\\ud800"}', "is no JSON"),
}


@pytest.mark.parametrize(("content", "message"), TEXTS.values(), ids=TEXTS)
def test_what_is_no_configuration(content, message, folder):
    (folder / "adapter_config.json").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        adapter_vector(folder)
    assert str(folder) in str(error.value)
    assert len(str(error.value)) < 1000


def test_a_configuration_without_end_is_not_read(folder, monkeypatch):
    monkeypatch.setattr(_untrusted, "LONGEST_JSON", 1000)
    write(folder, lora_dropout="x" * 1000)
    with pytest.raises(InputError, match=r"adapter_config.json' is longer than 1000 bytes"):
        adapter_vector(folder)


VALUES = {
    "a rank beyond all": ({"r": 10**12}, ShapeError, "expected the rank 1000000000000"),
    "a negative rank": ({"r": -1}, InputError, r"the rank \(r\) of 'fc' is -1"),
    "a rank that is true": ({"r": True}, InputError, r"the rank \(r\) of 'fc' is True"),
    "an alpha beyond all floats": ({"lora_alpha": 10**400}, InputError, "the lora_alpha of 'fc' is 1000"),
    "an alpha beyond float32": ({"lora_alpha": 1e300}, InputError, r"the lora_alpha of 'fc' is 1e\+300"),
    "an alpha in a list": ({"lora_alpha": [1]}, InputError, r"the lora_alpha of 'fc' is \[1\]"),
    "an alpha of no end": ({"lora_alpha": "9" * MANY}, InputError, "the lora_alpha of 'fc' is '999"),
    "patterns that are a list": (
        {"rank_pattern": [["x"] * MANY]},
        InputError,
        "rank_pattern in adapter_config.json is",
    ),
    "no pattern": ({"rank_pattern": {"(": 1}}, InputError, r"holds '\(', no pattern"),
    "a pattern too deep": ({"rank_pattern": {"(" * 5000 + ")" * 5000: 1}}, InputError, "holds .*, no pattern"),
    "a count too large": ({"alpha_pattern": {"f{99999999999999999999}": 1}}, InputError, "no pattern"),
    "a start of no end": ({"init_lora_weights": ["x" * MANY]}, InputError, r"init_lora_weights=\['xxx"),
}


@pytest.mark.parametrize(("values", "error", "message"), VALUES.values(), ids=VALUES)
def test_options_that_make_no_sense(values, error, message, folder):
    write(folder, **values)
    with pytest.raises(error, match=message) as caught:
        adapter_vector(folder)
    assert len(str(caught.value)) < 1000


def test_an_alpha_that_overflows_is_found_where_the_product_is_made(folder):
    write(folder, lora_alpha=3e38)
    vector = adapter_vector(folder)
    with pytest.raises(NonFiniteError, match=r"'fc\.weight'"):
        task_arithmetic([vector, vector])
    with pytest.raises(NonFiniteError, match=r"'fc\.weight'"):
        TaskVector(vector)


FOREVER = ("(a+)+$", "(a*)*b", "(a|a)*b", "(?:a|aa)+$", "(.*)*x", "((a+))+", "(a?){40}b", ".*.*.*.*.*.*.*.*x")


@pytest.mark.parametrize("pattern", [*FOREVER, "(a|a)" * 40 + "b", "a?" * 40 + "a{40}"])
@pytest.mark.parametrize("option", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_whose_search_never_ends(pattern, option, tmp_path):
    name = "a" * 60
    low_rank({f"{name}.weight": torch.ones(2, 2)}, 1).save_adapter(tmp_path / "x")
    write(tmp_path / "x", **{option: {pattern: 1}})
    start = time.monotonic()
    with pytest.raises(InputError, match=f"{option} in adapter_config.json holds .* could take forever"):
        adapter_vector(tmp_path / "x")
    assert time.monotonic() - start < 20


USUAL = {
    "q_proj": 4,
    r"^model\.layers\.0\.self_attn\.k_proj": 8,
    r"layers\.(0|1|2|3|10|11)\.self_attn\.(v|o)_proj": 12,
    r".*down_proj": 16,
    r"model\.layers\.\d+\.mlp\.[a-z]+_proj": 20,
    r"layers.[0-9]+.mlp.(gate|up)_proj?": 24,
}
NAMES = [
    f"model.layers.{index}.{part}"
    for index in range(12)
    for part in (
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "mlp.down_proj",
        "mlp.up_proj",
        "mlp.other",
    )
]


def test_patterns_mean_what_they_mean_to_peft():
    found = Patterns(USUAL, NAMES, "x")
    for name in [*NAMES, "q_proj", "xq_proj", "head\n", "x.q_proj\n"]:
        expected = next((value for key, value in USUAL.items() if re.match(rf"(.*\.)?({key})$", name)), None)
        assert found.value(name, None) == expected
    assert {found.value(name, 0) for name in NAMES} == {0, *USUAL.values()} - {24}
    peft = pytest.importorskip("peft.utils.other")
    for name in NAMES:
        key = peft.get_pattern_key(USUAL, name)
        assert found.value(name, None) == USUAL.get(key)


@pytest.mark.parametrize(
    ("pattern", "most"),
    [
        ("abc", 1),
        (r"a\*\+\?b", 1),
        ("[*+?(]", 1),
        ("a*", 11),
        ("a*b+", 121),
        ("a?", 2),
        ("a|b", 2),
        ("(a|b|c)(d|e)", 6),
    ],
)
def test_ways_through_a_pattern(pattern, most):
    assert ways(pattern, 10) == most


@pytest.mark.parametrize("pattern", FOREVER[:-1])
def test_ways_without_end(pattern):
    assert ways(pattern, 10) == float("inf")


def test_many_searches_end_too(folder, monkeypatch):
    monkeypatch.setattr(_adapter_patterns, "LONGEST", 0.0)
    write(folder, rank_pattern={"other": 1})
    with pytest.raises(InputError, match=r"rank_pattern .* takes more than 0 seconds"):
        adapter_vector(folder)


def test_names_in_the_file_are_taken_apart_in_no_time():
    names = ("x" + ".lora_A" * 580 + "\n\n", "x" + ".lora_A.weight" * 290 + "Z\n\n", "." * 4000)
    start = time.monotonic()
    for _ in range(30):
        for name in names:
            FACTOR.fullmatch(name)
    assert time.monotonic() - start < 1  # a few milliseconds, and several seconds where all beginnings are tried
