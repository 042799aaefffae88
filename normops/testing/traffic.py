"""What a call reads and writes, counted by Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor

from ..calls import INTERPRETED
from .accesses import Access, Method, around, around_launches, lanes

OTHER = "other"


def _extent(t: Tensor) -> tuple[int, int]:
    """First address of a tensor's storage, and the one past its end."""
    storage = t.untyped_storage()
    return storage.data_ptr(), storage.data_ptr() + storage.nbytes()


class _Accesses:
    """Addresses of single elements and their sizes; recorded as they come, looked up only when asked for."""

    def __init__(self) -> None:
        self._records: list[tuple[np.ndarray, int]] = []

    def add(self, addresses: np.ndarray, size: int) -> None:
        if addresses.size:
            self._records.append((addresses, size))

    def between(self, start: int, end: int) -> int:
        return sum(size * int(((a >= start) & (a < end)).sum()) for a, size in self._records)

    def total(self) -> int:
        return sum(size * a.size for a, size in self._records)

    def apart(self, start: int, end: int) -> int:
        """Most bytes from start to before end that are met for the first time from one access of an element on, up to
        the next one of the same element."""
        met = np.full(end - start, -1, dtype=np.int64)  # how many bytes had been met when this one was accessed last
        seen = most = 0
        for addresses, size in self._records:
            here = np.unique(addresses[(addresses >= start) & (addresses < end)]) - start
            before = met[here]
            most = max(most, int((seen - before[before >= 0]).max(initial=0)))
            met[here] = seen
            seen += size * int((before < 0).sum())
        return most


class Traffic:
    """Bytes that kernels moved inside a :func:`traffic` block; may be read inside the block and after it.

    >>> import torch, normops
    >>> from normops.testing import Traffic, traffic
    >>> with traffic() as moved:
    ...     y = normops.functional.rms_norm(torch.randn(2, 64), (64,))
    >>> isinstance(moved, Traffic), moved.launches, moved.atomics, moved.bytes_of(y)
    (True, 1, 0, (0, 512))
    """

    launches: int
    """Kernels launched."""
    atomics: int
    """Elements that atomic operations touched; their bytes are among the loads and stores too."""

    def __init__(self, watched: dict[str, Tensor]) -> None:
        self.launches = 0
        self.atomics = 0
        self._watched = watched
        self._loads = _Accesses()
        self._stores = _Accesses()
        # Everything passed to a kernel stays alive, so that no address means two tensors.
        self._alive: list[Any] = []

    def _by_name(self, accesses: _Accesses) -> dict[str, int]:
        found = {name: accesses.between(*_extent(t)) for name, t in self._watched.items()}
        return {**found, OTHER: accesses.total() - sum(found.values())}

    @property
    def loads(self) -> dict[str, int]:
        """Bytes read from each watched tensor, and from everything else under "other"."""
        return self._by_name(self._loads)

    @property
    def stores(self) -> dict[str, int]:
        """Bytes written to each watched tensor, and to everything else under "other"."""
        return self._by_name(self._stores)

    def bytes_of(self, t: Tensor) -> tuple[int, int]:
        """(read from, written to) a tensor's storage: for tensors that were allocated inside the block."""
        return self.bytes_in(*_extent(t))

    def reuse_distance(self, t: Tensor) -> int:
        """The most bytes of a tensor's storage that a kernel reads for the first time from one read of an element to
        the next, the element's own among them: what a cache must hold for the next read to be found there.  0: nothing
        is read twice.  Programs run one after the other here; on a GPU, many at once."""
        return self._loads.apart(*_extent(t))

    def bytes_in(self, start: int, end: int) -> tuple[int, int]:
        """(read from, written to) the addresses from start to before end: for one of several views of a storage."""
        return self._loads.between(start, end), self._stores.between(start, end)


def _check(tensors: dict[str, Tensor]) -> None:
    if not INTERPRETED:
        raise RuntimeError("traffic() counts in Triton's interpreter: set TRITON_INTERPRET=1 before importing normops")
    if OTHER in tensors:
        raise ValueError('the name "other" stands for everything that is not watched')
    owners: dict[int, str] = {}
    for name, t in tensors.items():
        if t.device.type != "cpu":
            raise ValueError(f"{name} must be on the CPU, for the interpreter works on copies; got {t.device}")
        owner = owners.setdefault(t.untyped_storage().data_ptr(), name)
        if owner != name:
            raise ValueError(f"{owner} and {name} share one storage: watch one of them")


@contextmanager
def traffic(**tensors: Tensor) -> Iterator[Traffic]:
    """Count the bytes that kernels load and store, per watched tensor, while the block runs.

    Only Triton kernels count (not torch's own copies), only lanes that are not masked out, and every access of an
    element counts: there are no caches.  A tensor is its whole storage, so views of one tensor are one.

    Raises RuntimeError outside Triton's interpreter (``TRITON_INTERPRET=1``), ValueError for tensors that cannot be
    told apart.

    >>> import torch, normops
    >>> from normops.testing import traffic
    >>> x = torch.randn(2, 64)
    >>> with traffic(x=x) as moved:
    ...     y = normops.functional.rms_norm(x, (64,))
    >>> moved.loads["x"] == x.nbytes, moved.stores["x"]
    (True, 0)
    """
    _check(tensors)
    found = Traffic(dict(tensors))

    def launching(original: Method) -> Method:
        def launch(*args: Any, **kwargs: Any) -> Any:
            found.launches += 1
            found._alive.append((args, kwargs))
            return original(*args, **kwargs)

        return launch

    def counting(access: Access, original: Method) -> Method:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            addresses, size = lanes(access, args)
            found.atomics += addresses.size if access.atomic else 0
            if access.reads and not access.inner:
                found._loads.add(addresses, size)
            if access.writes and not access.inner:
                found._stores.add(addresses, size)
            return original(self, *args, **kwargs)

        return method

    with around_launches(launching), around(counting):
        yield found
