"""Gram matrices of the inputs that the linear layers of a model get."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import pad, unfold

from ..._call import WithState, check_model, state_of
from ..._sample_gradients import under_all_names
from ..._state import StateLike, all_finite
from ..._tasks import Tasks, as_tasks, device_of, forward, inputs_of, mode
from ...errors import InputError, NonFiniteError

__all__ = ["input_grams"]

Look: TypeAlias = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]


@torch.no_grad()
def input_grams(model: nn.Module, tasks: Tasks, *, state: StateLike | None = None) -> dict[str, Tensor]:
    r"""The mean products of the inputs that every linear layer gets, for `regmean`.

    .. math:: G = \frac{1}{n} \sum_{t=1}^{n} x_t x_t^T

    over all that a layer is given: every token or position of every sample. Labels and heads are not looked at. Found
    for the weights of

    - ``nn.Linear``;
    - ``nn.MultiheadAttention``: the projections of query, key and value, joined (then one Gram matrix if all three see
      the same, else one each) or apart, and the output projection. That one is no layer which is called: its inputs are
      what the attention gives with the identity in its place, at the price of calling the attention twice;
    - ``nn.Conv2d`` without groups and with zeros as padding: of unfolded patches.

    Other layers, and weights that a model multiplies with by itself (``F.linear``, ``x @ self.weight``, GPT-2's
    ``Conv1D``), are not seen: `regmean` averages them.

    Args:
        model: one encoder for all tasks, or a complete model. In evaluation mode meanwhile, and otherwise left as it
            was found.
        tasks: the batches of one task, or ``{name: (head, batches)}``; several tasks count the same each.
        state: parameters and buffers in place of the model's own, such as ``vector.apply_to(base)``.

    Returns:
        Name of a weight -> (n, n) for n inputs, or (3, n, n), in float32 (float64 for models that are), under all names
        of weights that are tied; one weight that several layers share has one matrix of all their inputs. Layers that
        were not called are left out.

    Raises:
        InputError: no batches, or no layer of these kinds was called. NonFiniteError: inputs that are not finite.
        StateMismatchError: `state` does not fit the model.

    Source: Jin et al., "Dataless knowledge fusion by merging weights of language models", 2023, section 3.2 (which sums
    over the inputs; with the mean a task does not count more for having more data).

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 3)
        >>> input_grams(layer, [torch.tensor([[1.0, 0.0], [1.0, 2.0]])])["weight"]
        tensor([[1., 1.],
                [1., 2.]])
    """
    check_model(model)
    named = as_tasks(tasks, "tasks")
    call: Callable[..., Any] = model if state is None else WithState(model, state_of(model, state, "state"))
    means: list[dict[str, Tensor]] = []
    with mode(False, model):
        for name, task in named.items():
            argument = f"tasks[{name!r}]" if name else "tasks"
            with watched(model) as products:
                for inputs in inputs_of(task.batches, argument, device_of(model)):
                    forward(call, inputs)
            means.append(products.means(argument))
    shared = [key for key in means[0] if all(key in each for each in means)]
    found = {key: torch.stack([*torch.broadcast_tensors(*(each[key] for each in means))]).mean(0) for key in shared}
    return under_all_names(model, found)


class Products:
    """Sums of x x^T over the inputs of weights, by the first names of these."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.sums: dict[str, list[Tensor]] = {}
        self.counts: dict[str, list[int]] = {}
        self.latest: tuple[Tensor, int, Tensor] | None = None  # input, its version, product

    def add(self, weight: str, *blocks: Tensor) -> None:
        """Inputs (..., n) of one weight: of all its rows, or for each of several blocks of them."""
        products = [self._product(x) for x in blocks]
        rows = [x.shape[:-1].numel() for x in blocks]
        found, counts = self.sums.get(weight), self.counts.get(weight)
        if found is None or counts is None:
            self.sums[weight], self.counts[weight] = [product.clone() for product in products], rows
            return
        if len(found) < len(rows):
            found = self.sums[weight] = [found[0].clone() for _ in rows]
            counts = self.counts[weight] = counts * len(rows)
        for index in range(len(found)):
            own = index if len(rows) > 1 else 0
            found[index].add_(products[own])
            counts[index] += rows[own]

    def _product(self, x: Tensor) -> Tensor:
        """x^T x, once for layers that are called with the same x one after the other, as query, key and value are."""
        version = -1 if x.is_inference() else x._version
        if self.latest is not None and self.latest[0] is x and self.latest[1] == version >= 0:
            return self.latest[2]
        rows = x.detach().reshape(-1, x.shape[-1])
        rows = rows.to(torch.promote_types(x.dtype, torch.float32))
        product = rows.mT @ rows
        self.latest = (x, version, product)
        return product

    def means(self, argument: str) -> dict[str, Tensor]:
        """Name -> mean of x x^T, (n, n) or (blocks, n, n)."""
        result = {}
        for key, sums in self.sums.items():
            means = [total / max(1, count) for total, count in zip(sums, self.counts[key], strict=True)]
            result[key] = means[0] if len(means) == 1 else torch.stack(means)
            if not all_finite(result[key]):
                raise NonFiniteError(f"the inputs of {key!r} are not finite for {argument}")
        if not result:
            raise InputError("model: no linear layer was called (nn.Linear, nn.MultiheadAttention, nn.Conv2d)")
        return result


@contextmanager
def watched(model: nn.Module) -> Iterator[Products]:
    """While the model is called, the products of its layers' inputs are summed up."""
    products = Products(model)
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it calls no layers
        for module in model.modules():
            look = _look(module, products)
            if look is not None:
                stack.callback(module.register_forward_hook(look, with_kwargs=True).remove)
        yield products


def _look(module: nn.Module, products: Products) -> Look | None:
    """What to do when the module was called."""
    own = {name: products.names[id(p)] for name, p in module.named_parameters(remove_duplicate=False)}
    if isinstance(module, nn.MultiheadAttention):
        return _Attention(own, products)
    if isinstance(module, nn.Linear):
        return lambda _, args, kwargs, output: products.add(own["weight"], _given(args, kwargs))
    if isinstance(module, nn.Conv2d) and module.groups == 1 and module.padding_mode == "zeros":
        return lambda _, args, kwargs, output: products.add(own["weight"], _patches(module, _given(args, kwargs)))
    return None


def _given(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int = 0, name: str = "input") -> Tensor:
    given: Tensor = args[index] if len(args) > index else kwargs[name]
    return given


def _patches(layer: nn.Conv2d, x: Tensor) -> Tensor:
    """(..., positions, entries of a patch)."""
    padding: Any = layer.padding
    if isinstance(padding, str):
        spans = [
            d * (k - 1) if padding == "same" else 0 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
        x = pad(x, [side for span in reversed(spans) for side in (span // 2, span - span // 2)])
        padding = 0
    return unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride).mT


class _Attention:
    """The inputs of the projections of an ``nn.MultiheadAttention``."""

    def __init__(self, own: Mapping[str, str], products: Products) -> None:
        self.own, self.products, self.again = own, products, False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """After a call of the module."""
        if self.again:
            return
        inputs = [_given(args, kwargs, index, name) for index, name in enumerate(("query", "key", "value"))]
        if "in_proj_weight" not in self.own:
            for name, x in zip(("q_proj_weight", "k_proj_weight", "v_proj_weight"), inputs, strict=True):
                self.products.add(self.own[name], x)
        elif inputs[0] is inputs[1] is inputs[2]:
            self.products.add(self.own["in_proj_weight"], inputs[0])
        else:
            self.products.add(self.own["in_proj_weight"], *inputs)
        weight: Tensor = module.out_proj.weight  # type: ignore[union-attr, assignment]
        plain = {"out_proj.weight": torch.eye(len(weight), dtype=weight.dtype, device=weight.device)}
        if "out_proj.bias" in self.own:
            plain["out_proj.bias"] = torch.zeros_like(plain["out_proj.weight"][0])
        self.again = True
        try:
            self.products.add(self.own["out_proj.weight"], functional_call(module, plain, args, kwargs)[0])
        finally:
            self.again = False
