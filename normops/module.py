"""What the norms of :mod:`normops.nn` share."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Tensor
from torch.fx import Proxy

from . import activations, checks
from . import functional as F


class Fused(torch.nn.Module):
    """What the norms share: the keyword-only `activation` and `out_dtype`, checked when the module is built."""

    # On the class, so that a module unpickled or converted from torch's has them too.
    activation: str | None = None
    out_dtype: torch.dtype | None = None

    def __init__(
        self, *args: Any, activation: str | None = None, out_dtype: torch.dtype | None = None, **kwargs: Any
    ) -> None:
        activations.check(activation)
        checks.dtype(out_dtype)
        super().__init__(*args, **kwargs)
        self.activation, self.out_dtype = activation, out_dtype

    def __init_subclass__(cls) -> None:
        """Give a norm that takes torch's arguments and the extras their signature, for skip_init to look at."""
        super().__init_subclass__()
        init: Any = next(vars(c)["__init__"] for c in cls.__mro__ if c is not Fused and "__init__" in vars(c))
        own = list(inspect.signature(init).parameters.values())[1:]
        if init.__module__.startswith("torch.nn") and all(p.kind is not p.VAR_KEYWORD for p in own):
            extras = inspect.signature(Fused.__init__).parameters.values()
            own += [p for p in extras if p.kind is p.KEYWORD_ONLY]
        cls.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]

    if TYPE_CHECKING:

        @overload
        def __call__(self, input: Tensor, *, pre_add: None = ..., post_add: Tensor | None = ...) -> Tensor: ...
        @overload
        def __call__(self, input: Tensor, *, pre_add: Tensor, post_add: Tensor | None = ...) -> F.Pair: ...
        def __call__(self, *args: Any, **kwargs: Any) -> Any: ...

    def extra_repr(self) -> str:
        return self._repr(super().extra_repr())

    def _repr(self, base: str) -> str:
        extras = {"activation": self.activation, "out_dtype": self.out_dtype}
        return ", ".join([base, *(f"{name}={value}" for name, value in extras.items() if value is not None)])

    def _extras(self, pre_add: Tensor | None, post_add: Tensor | None) -> dict[str, Any]:
        return {
            "activation": self.activation, "pre_add": pre_add, "post_add": post_add, "out_dtype": self.out_dtype
        }  # fmt: skip

    def _leaf(self, input: Proxy, pre_add: Any, post_add: Any) -> Any:
        """One node in a graph of torch.fx, which takes only the modules of torch.nn for leaves of its own accord."""
        adds = {name: t for name, t in (("pre_add", pre_add), ("post_add", post_add)) if t is not None}
        tracer: Any = input.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), adds)


class Parameters(torch.nn.Module):
    """weight (ones) and bias (zeros) of a shape; None for those that are not wanted."""

    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self, shape: tuple[int, ...] | None, bias: bool, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        for name, wanted in (("weight", shape is not None), ("bias", shape is not None and bias)):
            empty = torch.empty(shape or (), device=device, dtype=dtype) if wanted else None
            self.register_parameter(name, None if empty is None else torch.nn.Parameter(empty))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)
        if self.bias is not None:
            torch.nn.init.zeros_(self.bias)
