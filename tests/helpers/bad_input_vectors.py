"""Wrong input to task vectors and their sum, and what the error must say: (id, call, exception, pattern)."""

from __future__ import annotations

import numpy as np
import torch

from rmtllmf.errors import InputError, NonFiniteError, ShapeError, StateMismatchError
from rmtllmf.taskvec import TaskVector, heuristic_scale, task_arithmetic

NAN, INF = float("nan"), float("inf")

V = {"w": torch.tensor([1.0, 2.0])}
BASE = {"w": torch.zeros(2), "steps": torch.tensor(1)}

BIG = TaskVector({"w": torch.tensor([3e38])})

CASES = [
    ("vector: arrays", lambda: TaskVector({"w": np.ones(3)}), TypeError, r"\['w'\]: .*ndarray"),
    (
        "vector: between arrays",
        lambda: TaskVector.between(BASE, {"w": np.ones(3)}),
        TypeError,
        r"finetuned\['w'\]: .*ndarray; torch.from_numpy makes one",
    ),
    ("vector: times a lot", lambda: BIG * 10, NonFiniteError, r"the product\['w'\] holds 1 non-finite"),
    ("vector: plus a lot", lambda: BIG + BIG, NonFiniteError, r"the result\['w'\]"),
    ("vector: plus NaN", lambda: TaskVector(V) + {"w": torch.tensor([NAN, 0])}, NonFiniteError, r"the result\['w'\]"),
    ("vector: plus complex", lambda: TaskVector(V) + {"w": torch.ones(2) + 0j}, TypeError, "complex"),
    ("vector: to half", lambda: BIG.to(torch.float16), NonFiniteError, "to: 'w' overflows torch.float16"),
    ("vector: map to NaN", lambda: TaskVector(V).map(lambda n, t: t / 0), NonFiniteError, "function's result"),
    ("vector: map nothing", lambda: TaskVector(V).map(None), TypeError, "function: .*NoneType"),
    ("vector: times a NaN tensor", lambda: TaskVector(V) * torch.tensor(NAN), InputError, "factor: .*nan"),
    ("vector: times a complex tensor", lambda: TaskVector(V) * torch.tensor(1j), TypeError, "factor: .*complex"),
    ("vector: by a zero tensor", lambda: TaskVector(V) / torch.tensor(0.0), ZeroDivisionError, "divisor"),
    ("vector: by a vector", lambda: TaskVector(V) / torch.ones(2), ShapeError, "divisor: .*one number"),
    ("vector: numbered", lambda: TaskVector({0: V["w"]}), TypeError, "tensors: .*names as keys"),
    ("vector: select a number", lambda: TaskVector(V).select(3), TypeError, "keys: .*int"),
    ("vector: dot a number", lambda: TaskVector(V).dot(5), TypeError, "other: .*int"),
    ("vector: apply to a path", lambda: TaskVector(V).apply_to("base.safetensors"), TypeError, "base: .*load the file"),
    (
        "vector: apply overflows",
        lambda: TaskVector({"w": torch.tensor([1e5])}).apply_to({"w": torch.ones(1, dtype=torch.float16)}),
        NonFiniteError,
        r"base\['w'\] plus the task vector overflows torch.float16",
    ),
    ("arithmetic: a model", lambda: task_arithmetic(torch.nn.Linear(1, 1)), TypeError, "vectors: .*Linear"),
    (
        "arithmetic: integers in one",
        lambda: task_arithmetic([V, {"w": torch.tensor([1, 2])}]),
        StateMismatchError,
        r"vectors\[1\]\['w'\] is torch.int64; vectors\[0\] has torch.float32",
    ),
    ("arithmetic: complex", lambda: task_arithmetic([{"w": torch.ones(2) + 0j}]), TypeError, "complex entries"),
    ("arithmetic: complex scale", lambda: task_arithmetic([V], np.complex128(1 + 2j)), TypeError, "scale: .*complex"),
    ("arithmetic: flag", lambda: task_arithmetic([V], np.True_), TypeError, "scale: .*bool"),
    ("arithmetic: huge scale", lambda: task_arithmetic([V], 10**400), InputError, "scale: .*finite"),
    ("vector: empty", lambda: TaskVector({}), InputError, "tensors: expected at least one"),
    ("vector: integers", lambda: TaskVector({"n": torch.tensor([1])}), TypeError, r"tensors\['n'\] is torch.int64"),
    ("vector: no tensor", lambda: TaskVector({"n": 1.0}), TypeError, r"tensors\['n'\]: expected a tensor, got float"),
    ("vector: no mapping", lambda: TaskVector([1.0]), TypeError, "tensors: expected .*got list"),
    ("vector: NaN", lambda: TaskVector({"w": torch.tensor([NAN, 1])}), NonFiniteError, r"tensors\['w'\] holds 1 "),
    ("vector: times NaN", lambda: TaskVector(V) * NAN, InputError, "factor: .*nan"),
    ("vector: times text", lambda: TaskVector(V) * "2", TypeError, "factor: .*str"),
    ("vector: times a vector", lambda: TaskVector(V) * torch.ones(2), ShapeError, r"factor: .*\(2,\)"),
    ("vector: times a mapping", lambda: TaskVector(V) * TaskVector(V), TypeError, "unsupported operand"),
    ("vector: by zero", lambda: TaskVector(V) / 0, ZeroDivisionError, "divisor"),
    ("vector: plus other keys", lambda: TaskVector(V) + {"b": V["w"]}, StateMismatchError, "lacks 'w'.*unexpected 'b'"),
    ("vector: plus other shapes", lambda: TaskVector(V) - {"w": torch.ones(3)}, StateMismatchError, r"\(3,\)"),
    ("vector: plus a number", lambda: TaskVector(V) + 1, TypeError, "unsupported operand"),
    ("vector: dot", lambda: TaskVector(V).dot({"b": V["w"]}), StateMismatchError, "other lacks 'w'"),
    ("vector: to integers", lambda: TaskVector(V).to(torch.int64), TypeError, "to: .*int64"),
    (
        "vector: map to nothing",
        lambda: TaskVector(V).map(lambda n, t: None),
        TypeError,
        "function: .*'w', got NoneType",
    ),
    ("vector: select nothing", lambda: TaskVector(V).select([]), InputError, "keys: expected at least one"),
    ("vector: select unknown", lambda: TaskVector(V).select("attn.*"), InputError, r"keys: 'attn.\*' matches none"),
    ("vector: apply to less", lambda: TaskVector(V).apply_to({"b": V["w"]}), StateMismatchError, "base lacks 'w'"),
    (
        "vector: apply to other shape",
        lambda: TaskVector(V).apply_to({"w": torch.ones(3)}),
        StateMismatchError,
        r"\(2,\)",
    ),
    ("vector: apply to integers", lambda: TaskVector(V).apply_to({"w": torch.tensor([1, 2])}), TypeError, "int64"),
    ("vector: apply with NaN", lambda: TaskVector(V).apply_to(BASE, scale=NAN), InputError, "scale: "),
    ("vector: save elsewhere", lambda: TaskVector(V).save("tau.pt"), InputError, "path: .*safetensors.*'tau.pt'"),
    ("vector: between a pickle", lambda: TaskVector.between("base.pt", BASE), InputError, "base: .*'base.pt'"),
    ("vector: between numbers", lambda: TaskVector.between(1, BASE), TypeError, "base: .*got int"),
    (
        "vector: nothing to tune",
        lambda: TaskVector.between({"n": torch.tensor(1)}, {"n": torch.tensor(2)}),
        InputError,
        "base: holds no floating-point",
    ),
    ("arithmetic: none", lambda: task_arithmetic([]), InputError, "vectors: expected at least one"),
    ("arithmetic: one mapping", lambda: task_arithmetic(V), TypeError, "vectors: .*sequence"),
    ("arithmetic: scale", lambda: task_arithmetic([V], INF), InputError, "scale: "),
    ("arithmetic: missing key", lambda: task_arithmetic([V, {"b": V["w"]}]), StateMismatchError, r"vectors\[1\] lacks"),
    ("heuristic: none", lambda: heuristic_scale(0), InputError, "num_tasks: .*got 0"),
    ("heuristic: half", lambda: heuristic_scale(1.5), TypeError, "num_tasks: .*float"),
]
