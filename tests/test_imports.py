"""What an import costs, what it needs, and who may import whom."""

import ast
import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.import_rules import MAY_IMPORT, violations

ROOT = Path(__file__).resolve().parents[1]
FOUR = "rmtllmf, rmtllmf.channel, rmtllmf.taskvec, rmtllmf.resilience, rmtllmf.metrics"
PARTS = ("channel", "taskvec", "resilience", "metrics", "clip", "plot", "errors")
HEAVY = ("open_clip", "torchvision", "timm", "transformers", "matplotlib", "scipy", "sionna")


def in_fresh_python(code, *, path=()):
    """Run `code` in a new interpreter that sees this checkout, after the folders in `path`."""
    search = [*map(str, path), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def modules_after(statements):
    """The names in `sys.modules` after `statements` in a new interpreter."""
    done = in_fresh_python(f"{statements}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))")
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def loaded():
    return modules_after(f"import {FOUR}")


def test_the_top_package_alone_does_not_even_load_torch():
    loaded = modules_after("import rmtllmf\nrmtllmf.__version__\ndir(rmtllmf)")
    assert {name for name in loaded if name.partition(".")[0] in {"torch", "numpy", *HEAVY}} == set()


def test_sub_packages_are_found_lazily():
    done = in_fresh_python("import rmtllmf\nprint(rmtllmf.taskvec.heuristic_scale(1), *dir(rmtllmf))")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1.0", "__version__", *sorted(PARTS)]


def test_an_unknown_attribute_names_the_known_ones():
    import rmtllmf

    with pytest.raises(AttributeError, match=r"'chanel'.*channel"):
        rmtllmf.chanel  # noqa: B018


@pytest.mark.parametrize("package", HEAVY)
def test_the_four_packages_load_nothing_heavy(loaded, package):
    assert {name for name in loaded if name.partition(".")[0] == package} == set()


def test_clip_and_plot_load_theirs_on_first_use():
    loaded = modules_after("import rmtllmf.clip, rmtllmf.plot")
    assert {name for name in loaded if name.partition(".")[0] in HEAVY} == set()


def test_the_four_packages_cost_little_over_torch(loaded):
    """Nothing but this library and, at most, more of NumPy, safetensors and typing_extensions on top of torch."""
    extra = loaded - modules_after("import torch, numpy")
    standard = sys.stdlib_module_names | {"_distutils_hack"}
    known = {"rmtllmf", "numpy", "safetensors", "typing_extensions"}
    assert {name.partition(".")[0] for name in extra} - standard <= known
    # a torch sub-package that is slow to load (torch._dynamo, torch.onnx, ...) would show up as hundreds of modules
    assert len({name for name in extra if name.partition(".")[0] != "rmtllmf"}) < 30


@pytest.fixture
def broken_torchvision(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text('raise RuntimeError("operator torchvision::nms does not exist")\n')
    return tmp_path


def test_the_four_packages_work_when_torchvision_is_broken(broken_torchvision):
    done = in_fresh_python(f"import {FOUR}\nprint(rmtllmf.taskvec.heuristic_scale(8))", path=[broken_torchvision])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0.3"


def test_clip_says_what_to_do_when_torchvision_is_broken(broken_torchvision):
    """On first use, with the reason and a way out."""
    done = in_fresh_python("import rmtllmf.clip\nrmtllmf.clip.load('ViT-B-32')", path=[broken_torchvision])
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    for part in ("torchvision", "operator torchvision::nms does not exist", "pip install"):
        assert part in last


def test_import_rules():
    assert violations(ROOT) == []


PLANTED = {
    "sub-package at the top": ("channel/x.py", "import rmtllmf.taskvec", "channel may not import taskvec"),
    "relative": ("taskvec/x.py", "from ..metrics import snr_db", "taskvec may not import metrics"),
    "relative, module as a name": (
        "metrics/x.py",
        "from .. import channel",
        "metrics may not import channel",
    ),
    "relative, deeper": ("metrics/a/x.py", "from ...taskvec.y import z", "metrics may not import taskvec"),
    "inside a function": (
        "channel/x.py",
        "def f():\n    from rmtllmf import resilience",
        "channel may not import resilience",
    ),
    "by a string": (
        "taskvec/x.py",
        "from importlib import import_module\nimport_module('rmtllmf.channel')",
        "taskvec may not import channel",
    ),
    "by a relative string": (
        "taskvec/x.py",
        "import importlib\nimportlib.import_module('..channel', __package__)",
        "taskvec may not import channel",
    ),
    "foundation upwards": ("_state.py", "from .taskvec import TaskVector", "_state may not import taskvec"),
    "resilience upwards": ("resilience/x.py", "from ..clip import x", "resilience may not import clip"),
    "clip and plot": ("plot.py", "from .clip import x", "plot may not import clip"),
    "open_clip": ("resilience/x.py", "def f():\n    import open_clip", "only clip may import open_clip"),
    "torchvision": ("plot.py", "from torchvision.transforms import v2", "only clip may import torchvision"),
    "matplotlib": ("metrics/x.py", "import matplotlib.pyplot as plt", "only plot may import matplotlib"),
    "sionna": ("clip.py", "import sionna.phy", "only channel/sionna may import sionna"),
    "sionna in the same part": (
        "channel/x.py",
        "from importlib import import_module\nimport_module('sionna.phy')",
        "only channel/sionna may import sionna",
    ),
    "sionna in a file of the same name": (
        "metrics/sionna.py",
        "from sionna import phy",
        "only channel/sionna may import sionna",
    ),
    "pickle": ("taskvec/x.py", "from pickle import loads", "nothing in the library may import pickle"),
    "examples": ("clip.py", "import testbed", "nothing in the library may import testbed"),
    "torch.load": ("clip.py", "import torch\ntorch.load('x')", "torch.load without weights_only=True"),
    "torch.load, not literally true": (
        "clip.py",
        "import torch\ntorch.load('x', weights_only=False)",
        "torch.load without weights_only=True",
    ),
    "load from torch": (
        "clip.py",
        "from torch import load as l\nl('x')",
        "torch.load without weights_only=True",
    ),
    "unknown file": ("utils.py", "", "no known part"),
}


@pytest.mark.parametrize(("file", "code", "message"), PLANTED.values(), ids=PLANTED)
def test_the_checker_finds_a_planted_violation(tmp_path, file, code, message):
    path = tmp_path / "rmtllmf" / file
    path.parent.mkdir(parents=True)
    path.write_text(code)
    (found,) = violations(tmp_path)
    assert message in found


def test_the_checker_allows_what_is_allowed(tmp_path):
    for file, code in {
        "channel/x.py": "from .._arrays import a\nfrom ..errors import InputError\nfrom . import y\nimport torch",
        "channel/sionna.py": "def f():\n    import sionna.phy",
        "resilience/x.py": "from ..taskvec import TaskVector\nfrom rmtllmf import __version__, metrics",
        "clip.py": "import open_clip, torchvision, torch\ntorch.load('x', weights_only=True)",
        "plot.py": "def f():\n    import matplotlib.pyplot as plt\nfrom .metrics import snr_db",
    }.items():
        path = tmp_path / "rmtllmf" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    assert violations(tmp_path) == []


def test_every_part_is_there():
    parts = {path.name.removesuffix(".py") for path in (ROOT / "rmtllmf").iterdir() if path.suffix in ("", ".py")}
    assert set(PARTS) <= parts - {"__pycache__"} <= set(MAY_IMPORT)


@pytest.mark.parametrize("part", PARTS)
def test_public_names_exist_and_show_an_example(part):
    module = importlib.import_module(f"rmtllmf.{part}")
    assert module.__doc__
    assert module.__all__ == sorted(set(module.__all__)), "__all__ is sorted and holds each name once"
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert value.__doc__, f"rmtllmf.{part}.{name} has no docstring"
            assert ">>> " in value.__doc__, f"rmtllmf.{part}.{name} has no example in its docstring"
            assert value.__module__.startswith("rmtllmf."), f"{name} is not of this library"


@pytest.mark.parametrize("part", PARTS)
def test_public_functions_are_annotated(part):
    module = importlib.import_module(f"rmtllmf.{part}")
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value):
            missing = set(inspect.signature(value).parameters) - set(value.__annotations__)
            assert not missing, f"rmtllmf.{part}.{name}: {missing} without annotation"
            assert "return" in value.__annotations__


def test_private_files_say_what_they_are_for():
    for path in (ROOT / "rmtllmf").rglob("*.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"
