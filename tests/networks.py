"""Blocks as networks have them, for tests of conversion: what is fused in them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.foreign import LlamaRMSNorm


class Basic(nn.Module):
    """ResNet's, as torchvision writes it."""

    def __init__(self, c: int, down: bool = False) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.relu = nn.ReLU(inplace=True)
        self.conv2, self.bn2 = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)
        self.downsample = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c)) if down else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Nested(nn.Module):
    """In expressions, and in a method of its own."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.conv, self.norms = nn.Conv2d(c, c, 1), nn.ModuleList()
        self.first, self.second, self.third = nn.BatchNorm2d(c), nn.GroupNorm(2, c), nn.BatchNorm2d(c)
        self.act = nn.SiLU()

    def stem(self, x: Tensor) -> Tensor:
        return F.relu(self.first(self.conv(x)), inplace=True)

    def forward(self, x: Tensor, scale: float = 2.0) -> Tensor:
        h = self.act(self.second(self.stem(x)))
        return torch.nn.functional.gelu(h * scale + self.conv(h), approximate="tanh") + self.act(x + self.third(h))


class Denoising(nn.Module):
    """diffusers' ResnetBlock2D: one activation for several things, and kinds told by a text."""

    def __init__(self, c: int, kind: str = "default") -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(2, c), nn.GroupNorm(2, c)
        self.conv1, self.conv2, self.time = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 1), nn.Linear(5, c)
        self.nonlinearity, self.kind = nn.SiLU(), kind

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        hidden = self.norm1(input_tensor)
        hidden = self.nonlinearity(hidden)
        hidden = self.conv1(hidden)
        if temb is not None:
            temb = self.time(self.nonlinearity(temb))[:, :, None, None]
        if self.kind == "default":
            if temb is not None:
                hidden = hidden + temb
            hidden = self.norm2(hidden)
        elif self.kind == "scale":
            hidden = self.norm2(hidden)
            hidden = hidden * (1 + temb)
        hidden = self.nonlinearity(hidden)
        return input_tensor + self.conv2(hidden)


class PreNorm(nn.Module):
    """A decoder layer of transformers."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.input_norm, self.post_norm = LlamaRMSNorm(c), LlamaRMSNorm(c)
        self.attention, self.mlp = nn.Linear(c, c), nn.Linear(c, c)

    def forward(self, hidden_states: Tensor) -> Tensor:
        residual = hidden_states
        hidden_states = self.input_norm(hidden_states)
        hidden_states = self.attention(hidden_states)
        hidden_states = residual + hidden_states

        residual = hidden_states
        hidden_states = self.post_norm(hidden_states)
        hidden_states = self.mlp(hidden_states)
        hidden_states = residual + hidden_states
        return hidden_states


class PostNorm(nn.Module):
    """BERT's and ViT's."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm, self.after, self.dense = nn.LayerNorm(c), nn.LayerNorm(c), nn.Linear(c, c)

    def forward(self, hidden: Tensor, other: Tensor) -> Tensor:
        hidden = self.norm(self.dense(hidden) + other)
        hidden = self.dense(hidden) + hidden
        y = self.after(hidden)
        return y + hidden


class ByHand(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + y
        h = self.norm(h)
        return h


class Overriding(ByHand):
    """Whose base calls the norm too, in a method that is hidden."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.norm(x)) + y


class Twice(ByHand):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.norm(x)) + F.relu(self.norm(y))


class Outside(ByHand):
    """Whose norm another method calls without its activation."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.norm(x)) + self.normalized(y)

    def normalized(self, y: Tensor) -> Tensor:
        return self.norm(y)


class ByProperty(ByHand):
    @property
    def other(self) -> nn.Module:
        return self.norm

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.norm(x)) + self.other(y)


class ByName(ByHand):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.norm(x)) + getattr(self, "norm")(y)  # noqa: B009


class Walking(ByHand):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x = F.relu(self.norm(x))
        for child in self.children():
            y = child(y)
        return x + y


class Peeked(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(c)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.relu(self.norm(x)) + y


class Peeking(nn.Module):
    """Which calls the norm of a module in it."""

    def __init__(self, c: int) -> None:
        super().__init__()
        self.inner = Peeked(c)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(x, y) + self.inner.norm(y)


def doubling(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def wrapper(self: Any, *inputs: Tensor) -> Tensor:
        return 2 * function(self, *inputs)

    return wrapper


class Wrapped(ByHand):
    """Whose source does not say that it is."""

    def forward(self, x: Tensor, y: Tensor, scale: float = 3.0) -> Tensor:
        return F.relu(self.norm(x)) * scale + y


Wrapped.forward = doubling(Wrapped.forward)  # type: ignore[method-assign]


class Summing(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.bn, self.relu = nn.BatchNorm2d(c), nn.ReLU()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.relu(self.bn(x) + y)


class Stored(ByHand):
    """Which holds a method of its own."""

    def __init__(self, c: int) -> None:
        super().__init__(c)
        self.kept = self.activated

    def activated(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.kept(x) + self.activated(y)


class Renaming(ByHand):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = x + y
        r = h
        r = self.norm(h)
        return r * 2


class Underscore(ByHand):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        a, _ = x, y
        h = x + a
        h = self.norm(h)
        return h + _


class Changing(ByHand):
    """Whose activation is another one in evaluation."""

    @property
    def act(self) -> Any:
        return F.relu if self.training else F.silu

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.act(self.norm(x)) + y


IMAGE = (2, 4, 5, 3)
RELU, POST_RELU, SILU = "activation relu", "post_add, activation relu", "activation silu"
ROWS: list[tuple[int, ...]] = [(2, 6, 5), (2, 6, 5)]
BLOCKS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]], dict[str, str]]] = {
    "resnet": (lambda: Basic(4), [IMAGE], {"bn1": RELU, "bn2": POST_RELU}),
    "resnet, downsampling": (lambda: Basic(4, down=True), [IMAGE], {"bn1": RELU, "bn2": POST_RELU}),
    "expressions": (
        lambda: Nested(4), [IMAGE], {"first": RELU, "second": SILU, "third": "post_add, activation silu"}
    ),
    "denoising": (lambda: Denoising(4), [IMAGE, (2, 5)], {"norm1": SILU, "norm2": SILU}),
    "denoising, scaled": (lambda: Denoising(4, "scale"), [IMAGE, (2, 5)], {"norm1": SILU}),
    "before attention": (lambda: PreNorm(6), [(2, 5, 6)], {"post_norm": "pre_add"}),
    "after attention": (lambda: PostNorm(6), [(2, 5, 6), (2, 5, 6)], {"norm": "pre_add", "after": "pre_add"}),
    "called twice": (lambda: Twice(5), ROWS, {"norm": RELU}),
    "called elsewhere": (lambda: Outside(5), ROWS, {"norm": RELU}),
    "a property": (lambda: ByProperty(5), ROWS, {"norm": RELU}),
    "by name": (lambda: ByName(5), ROWS, {"norm": RELU}),
    "walking": (lambda: Walking(5), ROWS, {"norm": RELU}),
    "called by another": (lambda: Peeking(5), ROWS, {"inner.norm": RELU}),
    "stored": (lambda: Stored(5), ROWS, {"norm": RELU}),
    "the sum under another name": (lambda: Renaming(5), ROWS, {}),
    "an underscore": (lambda: Underscore(5), ROWS, {"norm": "pre_add"}),
    "wrapped": (lambda: Wrapped(5), ROWS, {"norm": RELU}),
    "overriding": (lambda: Overriding(5), [(2, 6, 5), (2, 6, 5)], {"norm": RELU}),
    "sum before, by hand": (lambda: ByHand(5), [(2, 6, 5), (2, 6, 5)], {"norm": "pre_add"}),
}  # fmt: skip
