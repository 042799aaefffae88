"""Schedules other than the one that stands, as they are written on a command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from normops.schedule import Limits

NAMES = [field.name for field in fields(Limits)]


def limits_of(texts: Sequence[str] | None) -> dict[str, Any]:
    """["engine=split,tile=8192", ...] -> fields of normops.schedule.Limits, for ``schedule.forced``.

    Raises ValueError for what is not NAME=VALUE, an unknown name, and a size that is no whole number.
    """
    found: dict[str, Any] = {}
    for part in (part.strip() for text in texts or () for part in text.split(",") if part.strip()):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"force must be NAME=VALUE, got {part!r}")
        if name not in NAMES:
            near = get_close_matches(name, NAMES)
            raise ValueError(f"force must name one of {', '.join(near or NAMES)}; got {name!r}")
        try:
            found[name] = value if name == "engine" else int(value)
        except ValueError:
            raise ValueError(f"{name} must be a whole number, got {value!r}") from None
    return found
