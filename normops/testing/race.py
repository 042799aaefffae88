"""The programs of one grid at the same time, on a CPU: several processes run them over shared memory."""

from __future__ import annotations

import math
import mmap
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import numpy as np
from triton.runtime import interpreter

from ..compiled import INTERPRETED
from .accesses import tensors_in
from .prepared import prepare_once
from .processes import Executor, Jitter, Memory, Programs, jittered

ORDERS = ("shuffled", "launch")
_START = 60.0
"""Seconds that processes have to start, at least: it is not the kernel's time."""
_LISTED = 12
"""Programs that a message names."""


class Race(NamedTuple):
    """What ran.

    >>> from normops.testing import Race
    >>> done = Race(launches=2, programs=6, share=(5, 7), together=2)
    >>> sum(done.share) == done.launches * done.programs
    True
    """

    launches: int
    programs: int
    """Programs of one launch."""
    share: tuple[int, ...]
    """Programs that each process ran, over all launches."""
    together: int
    """Programs that had begun and not ended at one time, at most."""


class _Board:
    """Which program comes next, who ran which, and which have ended: of one launch, seen by all processes."""

    def __init__(self, programs: int, lock: Any) -> None:
        self.programs = programs
        self._lock = lock
        words = np.frombuffer(mmap.mmap(-1, 8 * (2 + 3 * programs)), dtype=np.int64)
        self._counts = words[:2]  # programs taken; most at one time
        self.order, self.owner, self.ended = words[2:].reshape(3, programs)
        self.reset(np.arange(programs))

    def reset(self, order: np.ndarray) -> None:
        self._counts[0] = 0
        self.order[:], self.owner[:], self.ended[:] = order, -1, 0

    def take(self, process: int) -> int | None:
        with self._lock:
            taken = int(self._counts[0])
            if taken == self.programs:
                return None
            program = int(self.order[taken])
            self.owner[program] = process
            self._counts[0] = taken + 1
            self._counts[1] = max(self.together, taken + 1 - int(self.ended.sum()))
        return program

    @property
    def together(self) -> int:
        return int(self._counts[1])

    def running(self, process: int) -> int | None:
        found = np.flatnonzero((self.owner == process) & (self.ended == 0))
        return int(found[0]) if found.size else None


class _Team:
    """The processes of a race, and the launches that they run."""

    def __init__(
        self, kernel: Any, grid: tuple[int, ...], args: Sequence[Any], kwargs: Mapping[str, Any], memory: Memory,
        processes: int, seed: int, order: str, jitter: float, timeout: float,
    ) -> None:  # fmt: skip
        context = multiprocessing.get_context("fork")
        self._kernel, self._grid, self._args, self._kwargs, self._memory = kernel, grid, args, kwargs, memory
        self._seed, self._order, self._jitter, self._timeout = seed, order, jitter, timeout
        self._function = kernel.rewrite()
        self._lock = context.Lock()
        self.board = _Board(math.prod(grid), context.Lock())
        self._pipes = [context.Pipe() for _ in range(processes)]
        self._processes = [context.Process(target=self._work, args=(i,), daemon=True) for i in range(processes)]

    def start(self) -> None:
        for process in self._processes:
            process.start()
        for _, theirs in self._pipes:
            theirs.close()
        self._hear_all(0, max(self._timeout, _START))

    def end(self) -> None:
        for process in self._processes:
            if process.pid is not None:
                process.kill()
                process.join()
                process.close()
        for ours, theirs in self._pipes:
            ours.close()
            theirs.close()

    # In the processes

    def _work(self, me: int) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller ends its processes
        link = self._pipes[me][1]
        for i, (ours, theirs) in enumerate(self._pipes):  # or nobody would see the caller's ends close
            ours.close()
            if i != me:
                theirs.close()
        signal.signal(signal.SIGUSR1, lambda _, frame: self._tell(link, frame))
        jitter = Jitter(self._jitter, f"{self._seed} {me}")
        try:
            self._memory.adopt()
            prepare_once()
            programs = Programs(self._function, lambda program: self._serve(me, link, jitter, program))
            with jittered(jitter, self._lock):
                Executor(programs, self._kernel.arg_names, (1,))(*self._args, **self._kwargs)
        except BaseException:
            with suppress(BrokenPipeError):
                link.send(traceback.format_exc())

    def _serve(self, me: int, link: Connection, jitter: Jitter, program: Callable[[], Any]) -> None:
        builder = interpreter.interpreter_builder
        dims = (*self._grid, 1, 1)[:3]
        builder.set_grid_dim(*dims)
        link.send(None)
        while self._told(link):
            while (taken := self.board.take(me)) is not None:
                builder.set_grid_idx(*self._place(taken, dims))
                jitter()
                program()
                self.board.ended[taken] = 1
            link.send(None)

    @staticmethod
    def _told(link: Connection) -> bool:
        """Wait for the next launch; false where the caller is gone."""
        try:
            return bool(link.recv())
        except EOFError:
            return False

    def _tell(self, link: Connection, frame: Any) -> None:
        """Send where the program is, and end."""
        file = self._kernel.fn.__code__.co_filename
        while frame is not None and frame.f_code.co_filename != file:
            frame = frame.f_back
        link.send(frame.f_lineno if frame is not None else None)
        os._exit(1)

    # In the caller

    def launch(self, number: int) -> None:
        board = self.board
        order = np.arange(board.programs)
        if self._order == "shuffled":
            np.random.default_rng((self._seed, number)).shuffle(order)
        board.reset(order)
        for ours, _ in self._pipes:
            with suppress(BrokenPipeError):  # a process that has died is found below
                ours.send(True)
        self._hear_all(number, self._timeout)

    def _hear_all(self, number: int, timeout: float) -> None:
        board = self.board
        at_work = {ours: i for i, (ours, _) in enumerate(self._pipes)}
        ended, deadline = 0, time.monotonic() + timeout
        while at_work:
            for link in [link for link in at_work if link in wait([*at_work], min(0.1, timeout))]:
                self._hear(link, at_work.pop(link), number)
            if int(board.ended.sum()) > ended:
                ended, deadline = int(board.ended.sum()), time.monotonic() + timeout
            elif at_work and time.monotonic() > deadline:
                raise TimeoutError(self._stuck(number, timeout))

    def _hear(self, link: Connection, process: int, number: int) -> None:
        """What a process says at the end of a launch: nothing, or a traceback."""
        program = self.board.running(process)
        where = "no program" if program is None else f"program {self._name(program)}"
        who = f"{self._kernel.__name__}: {where} of launch {number}"
        try:
            failure = link.recv()
        except (EOFError, ConnectionResetError):
            self._processes[process].join(1)
            raise RuntimeError(f"{who} ended its process, exit code {self._processes[process].exitcode}") from None
        if failure is not None:
            raise RuntimeError(f"{who} raised\n{failure}")

    def _stuck(self, number: int, timeout: float) -> str:
        """What a message says where no program ends any more; ends the processes."""
        board, running = self.board, []
        for i, process in enumerate(self._processes):
            program, link = board.running(i), self._pipes[i][0]
            if program is not None and process.pid is not None:
                os.kill(process.pid, signal.SIGUSR1)
                line = link.recv() if link.poll(2) else None
                running.append(self._name(program) + (f" at line {line}" if isinstance(line, int) else ""))
        waiting = [self._name(int(p)) for p in board.order if board.owner[p] < 0]
        return (
            f"{self._kernel.__name__}: no program ended for {timeout:g} s in launch {number}; "
            f"{int(board.ended.sum())} of {board.programs} had ended; "
            f"running: {', '.join(running) or 'none'}; not begun: {_listed(waiting)}"
        )

    def _name(self, program: int) -> str:
        place = self._place(program, (*self._grid, 1, 1)[:3])[: len(self._grid)]
        return str(place[0]) if len(place) == 1 else str(place)

    @staticmethod
    def _place(program: int, dims: tuple[int, ...]) -> tuple[int, int, int]:
        """Program ids; the first axis runs fastest, as on a GPU."""
        return program % dims[0], program // dims[0] % dims[1], program // dims[0] // dims[1]


def _listed(names: list[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more if names else "none"


def _check(kernel: Any, processes: int, repeats: int, order: str, jitter: float, timeout: float) -> None:
    if not INTERPRETED:
        raise RuntimeError("race() runs in Triton's interpreter: set TRITON_INTERPRET=1 before importing normops")
    if "fork" not in multiprocessing.get_all_start_methods():
        raise RuntimeError("race() needs processes that start by fork, which this platform lacks")
    if not isinstance(kernel, interpreter.InterpretedFunction):
        raise ValueError(f"kernel must be a @triton.jit function, without decorators around it; got {kernel!r}")
    for name, value in (("processes", processes), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1; got {value}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}; got {order!r}")
    if not 0 <= jitter <= 1:
        raise ValueError(f"jitter must be a probability, from 0 to 1; got {jitter}")
    if not timeout > 0:
        raise ValueError(f"timeout must be more than 0 seconds; got {timeout}")


def race(
    kernel: Any,
    grid: int | tuple[int, ...],
    args: Sequence[Any],
    kwargs: Mapping[str, Any] | None = None,
    *,
    processes: int = 4,
    repeats: int = 1,
    order: str = "shuffled",
    seed: int = 0,
    jitter: float = 0.1,
    timeout: float = 60.0,
    between: Callable[[int], None] | None = None,
) -> Race:
    """Do what ``kernel[grid](*args, **kwargs)`` does, in Triton's interpreter, with programs that run at the same time.

    Each program runs once, in one of ``processes`` processes, which holds it until it ends: they are what the slots of
    a GPU are, and where all wait, nothing goes on.  The next program goes to the process that is free first.  A GPU
    promises no order of programs, so it is a new permutation in every launch; ``order="launch"`` takes them by program
    id, the first axis fastest.

    The processes are forks of the caller: nothing is pickled, and an argument may be what a kernel takes, in tuples
    too.  Tensors lie in shared memory while programs run; views of one storage stay so.  What programs wrote is in the
    caller's tensors afterwards, also after an error in a program.

    ``repeats`` launches follow each other on the same memory and in the same processes, as on one stream.  Between two
    of them, ``between(n)`` is called by the caller's process, n being the number of launches so far: to check that
    counters are back at zero, or to overwrite outputs, in the tensors themselves.  What it raises ends the race.

    Before an access to memory, a program pauses with probability ``jitter``, for 1 µs to 30 ms, and more often (with
    its square root) where the access before was atomic; ``seed`` chooses the order and the pauses.  It does not choose
    the interleaving, which is the machine's: what was found once may need more launches to be found again, and what was
    not found may be there.

    It finds what goes wrong in some order of the accesses as programs make them: waiting for a program that has not
    begun, reliance on launch order, counters that lose arrivals or are left behind, a result that is read before it is
    written.  It cannot find a release, an acquire or a barrier that is missing: an x86 CPU keeps nearly every access in
    its place where a GPU need not, each program is one thread, and an access is over before the next one begins.

    Raises TimeoutError if no program ends for ``timeout`` seconds (it names those that run, with the line of the kernel
    where each is, and those that have not begun), RuntimeError with the traceback for an exception in a program, for a
    process that dies, outside the interpreter (``TRITON_INTERPRET=1``) and on platforms without fork, ValueError for
    arguments that it cannot run.  No process outlives the call.

    >>> import torch, triton
    >>> import triton.language as tl
    >>> from normops.testing import race
    >>> @triton.jit
    ... def count(total_ptr):
    ...     tl.atomic_add(total_ptr, 1)
    >>> total = torch.zeros(1, dtype=torch.int32)
    >>> done = race(count, 6, (total,), processes=2, repeats=2, jitter=0)
    >>> total.item(), done.programs, sum(done.share)
    (12, 6, 12)
    """
    _check(kernel, processes, repeats, order, jitter, timeout)
    dims = (grid,) if isinstance(grid, int) else tuple(grid)
    if not 1 <= len(dims) <= 3 or any(not isinstance(n, int) or n < 1 for n in dims):
        raise ValueError(f"grid must be one to three positive integers; got {grid!r}")
    kwargs = dict(kwargs or {})
    names = [*kernel.arg_names, *(f"argument {i}" for i in range(len(kernel.arg_names), len(args)))]
    named = [*zip(names, args, strict=False), *kwargs.items()]
    memory = Memory([found for name, value in named for found in tensors_in(name, value)])
    team = _Team(kernel, dims, args, kwargs, memory, processes, seed, order, jitter, timeout)
    share = np.zeros(processes, dtype=np.int64)
    try:
        team.start()
        for number in range(repeats):
            if number and between is not None:
                memory.store()
                between(number)
                memory.load()
            try:
                team.launch(number)
            except BaseException:
                memory.store()
                raise
            share += np.bincount(team.board.owner, minlength=processes)
    finally:
        team.end()
    memory.store()
    return Race(repeats, team.board.programs, tuple(int(n) for n in share), team.board.together)
