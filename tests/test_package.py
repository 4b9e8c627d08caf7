"""What is declared and shipped: metadata, dependencies, and the contents of wheel and source distribution."""

import re
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

import rmtllmf

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
RUNTIME = {
    "numpy",
    "open_clip_torch",
    "safetensors",
    "scipy",
    "torch",
    "torchvision",
    "tqdm",
    "typing-extensions",
}
EXTRAS = {"plot", "sionna", "examples", "test", "plugins", "peers", "docs", "dev"}


def requirements():
    yield from PROJECT["dependencies"]
    for extra in PROJECT["optional-dependencies"].values():
        yield from extra


@pytest.mark.parametrize("requirement", sorted(set(requirements())))
def test_requirements_have_a_lower_bound_and_nothing_else(requirement):
    if requirement.startswith("rmtllmf["):
        assert requirement[8:-1] in EXTRAS
    else:
        assert re.fullmatch(r"[A-Za-z0-9_-]+>=[0-9.]+(; .*)?", requirement)  # but where it is for


def test_runtime_dependencies():
    assert {re.split(">=", requirement)[0] for requirement in PROJECT["dependencies"]} == RUNTIME
    assert PROJECT["requires-python"] == ">=3.11"


def test_extras():
    assert set(PROJECT["optional-dependencies"]) == EXTRAS


def test_version_is_the_same_everywhere():
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", rmtllmf.__version__)
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.search(r"^version: (.*)$", citation, re.MULTILINE).group(1) == rmtllmf.__version__
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in changelog or f"## [{rmtllmf.__version__}]" in changelog


def test_the_licence_is_apache():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert PROJECT["license"] == "Apache-2.0"
    assert "license: Apache-2.0" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A function that builds with the build backend itself, without a network: skipped where it is not installed."""
    pytest.importorskip("hatchling", reason="needs the build backend hatchling in this environment")
    from hatchling.builders.sdist import SdistBuilder
    from hatchling.builders.wheel import WheelBuilder

    def run(kind):
        builder = {"wheel": WheelBuilder, "sdist": SdistBuilder}[kind](str(ROOT))
        return next(builder.build(directory=str(tmp_path_factory.mktemp(kind)), versions=["standard"]))

    return run


def test_the_wheel_holds_the_library_and_nothing_else(build):
    names = zipfile.ZipFile(build("wheel")).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rmtllmf"}
    source = {path.relative_to(ROOT).as_posix() for path in (ROOT / "rmtllmf").rglob("*.py")}
    shipped = {name for name in names if ".dist-info/" not in name}
    assert shipped == source | {"rmtllmf/py.typed"}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_source_distribution_holds_what_a_packager_needs(build):
    with tarfile.open(build("sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "rmtllmf/py.typed",
        "tests/conftest.py",
        "docs/conf.py",
        "examples/quickstart.py",
    }
    assert needed <= names
    assert not [name for name in names if "__pycache__" in name or ".cache/" in name or "_build/" in name]
