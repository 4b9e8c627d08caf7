"""Who may import whom, checked on the syntax tree: no code runs, and imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

PRIVATE = (
    "errors",
    "_arrays",
    "_display",
    "_state",
    "_random",
    "_tasks",
    "_call",
    "_loss",
    "_classifier",
    "_threads",
    "_sharded",
    "_coefficients",
    "_sample_gradients",
    "_safetensors",
    "_model_files",
    "_untrusted",
)
"""Shared foundations: they import each other and nothing else of the library."""

MAY_IMPORT = {
    **dict.fromkeys(PRIVATE, frozenset(PRIVATE)),
    "channel": frozenset(PRIVATE),
    "taskvec": frozenset(PRIVATE),
    "metrics": frozenset(PRIVATE),
    "resilience": frozenset({*PRIVATE, "channel", "taskvec", "metrics"}),
    "clip": frozenset({*PRIVATE, "channel", "taskvec", "metrics", "resilience"}),
    "plot": frozenset({*PRIVATE, "channel", "taskvec", "metrics", "resilience"}),
    "__init__": frozenset({*PRIVATE, "channel", "taskvec", "metrics", "resilience", "clip", "plot"}),
}
"""Part of the library (a sub-package, or a file at the top) -> the other parts that it may import."""

ONLY_IN = {"open_clip": "clip", "torchvision": "clip", "matplotlib": "plot", "sionna": "channel/sionna"}
"""Third-party package -> the only place that may import it: a part, or a single file inside one."""

FORBIDDEN = (
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "shelve",
    "marshal",
    "examples",
    "testbed",
    "tests",
)


def imported_modules(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of every import in `tree`, a module inside `package`.

    ``from a import b`` counts as ``a.b``, because `b` may be a module; ``import_module("a")`` and ``__import__("a")``
    with a literal count as well.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *(node.module.split(".") if node.module else [])]
            for alias in node.names:
                yield node.lineno, ".".join([*base, alias.name])
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            target = node.args[0].value
            if name in ("import_module", "__import__") and isinstance(target, str):
                dots = len(target) - len(target.lstrip("."))
                above = package[: len(package) - dots + 1] if dots else []
                yield node.lineno, ".".join([*above, target.lstrip(".")])


def unsafe_loads(tree: ast.AST) -> Iterator[int]:
    """Lines that call ``torch.load`` (or a ``load`` imported from torch) without a literal ``weights_only=True``."""
    bare = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
        if alias.name == "load"
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        safe = any(
            word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True
            for word in node.keywords
        )
        if (name == "torch.load" or name in bare) and not safe:
            yield node.lineno


def violations(root: Path, package: str = "rmtllmf") -> list[str]:
    """Every broken rule in the files below ``root / package``, as ``file:line: what``."""
    found = []
    for path in sorted((root / package).rglob("*.py")):
        inside = path.relative_to(root / package)
        part = inside.parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        where = f"{package}/{inside.as_posix()}"
        if part not in MAY_IMPORT:
            found.append(f"{where}: is no known part of the library; give it a place in MAY_IMPORT")
            continue
        for line, name in imported_modules(tree, [package, *inside.parts[:-1]]):
            top, *rest = name.split(".")
            if top in FORBIDDEN:
                found.append(f"{where}:{line}: nothing in the library may import {top}")
            if top in ONLY_IN and not inside.with_suffix("").is_relative_to(ONLY_IN[top]):
                found.append(f"{where}:{line}: only {ONLY_IN[top]} may import {top}")
            # a name of the top package itself, such as __version__, is no part
            if top == package and rest and rest[0] in MAY_IMPORT and rest[0] not in {*MAY_IMPORT[part], part}:
                found.append(f"{where}:{line}: {part} may not import {rest[0]}")
        found += [f"{where}:{line}: torch.load without weights_only=True" for line in unsafe_loads(tree)]
    return found
