"""The words that ticketed launches count in: one zeroed tensor for each device and stream, 0 again after every launch.

Launches on one stream follow one another, so they may share it; see docs/ticketed.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

_words: dict[tuple[torch.device, int], Tensor] = {}


def _key(device: torch.device) -> tuple[torch.device, int]:
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return device, stream


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if device.index == torch.cuda.current_device():  # spares most calls the guard, which costs as much as the rest
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def words(count: int, device: torch.device) -> Tensor:
    """At least `count` 32-bit words that hold 0 when the next launch on the current stream begins."""
    if _capturing(device):
        # A graph may be replayed on any stream, beside others: its launch gets words of its own, zeroed in the graph.
        return torch.zeros(count, dtype=torch.int32, device=device)
    key = _key(device)
    found = _words.get(key)
    if found is None or found.numel() < count:
        found = _words[key] = torch.zeros(max(1024, 2 * count), dtype=torch.int32, device=device)
    return found


def forget(device: torch.device) -> None:
    """Drop the words of the current stream: a launch failed half-way and may have left them dirty."""
    _words.pop(_key(device), None)
