"""Walks a warp through machine code: what it executes, how often it waits, where data decides.

A warp of 32 lanes is taken through the integer arithmetic of a program; lanes that part meet again at the first
instruction common to both ways.  Where data decides a branch, both ways are walked: the shorter one counts as executed,
the other one as possible.  A loop whose end data decides is counted once, and the count has no upper bound.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import lanes
from .code import PREDICATE
from .counts import Count, Waits
from .lanes import Value
from .operands import predicate
from .steps import Code, Step
from .warp import Warp

LIMIT = 1_000_000
"""Instructions of one warp, after which a walk gives up."""
FORK = 25
"""Instructions that are walked in the time that it takes to prepare two ways: about 0.2 ms."""


class Frame(NamedTuple):
    """Lanes that parted: where they meet (the end: where they return), in how many calls, all of them, and those that
    still have to take the other way."""

    meets: int
    depth: int
    mask: Value
    other: tuple[int, Value] | None


class Walk(Warp):
    """A warp, what it has counted, and how it goes on."""

    def __init__(self, code: Code, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.code, n = code, len(code.steps)
        self.count, self.waits = Count([0] * n, [0] * n), Waits()
        self.open: set[int] = set()
        self.left = LIMIT

    def run(self, at: int = 0, stop: int | None = None) -> None:
        """From an instruction until `stop` (or the return from the function that it is in), or the end."""
        steps, count, waits, depth = self.code.steps, self.count, self.waits, len(self.calls)
        end = len(steps)
        frames: list[Frame] = []
        while at < end:
            if frames and at == frames[-1].meets:
                at = self._join(frames)
                continue
            if at == stop and not frames:
                return
            step = steps[at]
            i = step.i
            if self.left <= 0:
                count.endless = True
                return
            self.left -= 1
            count.visits[at] += 1
            if i.waits:
                waits.wait(count, i.waits)
            count.cycles += i.stall or 1
            before, went = self.mask, at + 1
            guard = True if step.guard is None else step.guard(self)
            if step.control:
                guard = lanes.settled(guard, before if isinstance(before, np.ndarray) else True)
                if i.head == "RET" and guard is True:
                    if (other := self._returning(frames)) is not None:
                        at = other
                        continue
                    if len(self.calls) == depth and stop is not None:
                        return
                went = self._control(step, at, guard, frames)
                if went == at:  # nothing more to do
                    return
            elif guard is not False:
                mask = before if guard is True else lanes.both(before, guard)
                mask = lanes.settled(mask, True)
                if mask is not False:
                    self.mask = mask
                    if step.access:
                        waits.access(count, step, self, self.code)
                        if mask is None and step.access == "global":
                            count.accesses.add(at)
                    if step.act is not None:
                        step.act(self)
                    if step.far:
                        waits.begin(count, step)
                    self.mask = before
            if step.noted:
                waits.note(count, step)
            at = went

    def _join(self, frames: list[Frame]) -> int:
        """Lanes that came to their meeting point: the others come next, or all go on together."""
        frame = frames.pop()
        if frame.other is not None:
            at, self.mask = frame.other
            frames.append(frame._replace(other=None))
        else:
            at, self.mask = frame.meets, frame.mask
        self.mask = self._remaining(self.mask)
        if self.mask is not False:
            return at
        return self._join(frames) if frames else len(self.code.steps)

    def _returning(self, frames: list[Frame]) -> int | None:
        """Lanes that come to the end of a function: where others that parted in it go on, None where all are there."""
        while frames and frames[-1].meets == len(self.code.steps) and frames[-1].depth == len(self.calls) > 0:
            at = self._join(frames)
            if at < len(self.code.steps):
                return at
        return None

    def _remaining(self, mask: Value) -> Value:
        return lanes.settled(lanes.both(mask, lanes.inverted(self.gone)), True)

    def _control(self, step: Step, at: int, guard: Value, frames: list[Frame]) -> int:
        """Where the warp goes; `at` itself: nowhere, it has ended."""
        i, head = step.i, step.i.head
        if head == "BAR":
            if guard is not False:
                self.barriers.append(dict(self.memory["shared"]))
            return at + 1
        if head == "LDGDEPBAR":
            self.waits.copies_set_out(self.count, i)
            return at + 1
        if head == "DEPBAR":
            self.waits.wait_for_all_but(self.count, i)
            return at + 1
        if head == "CALL":
            if guard is False or i.target is None:
                return at + 1
            if guard is not True:
                return self._fork(step, at, self.code.places[i.target])
            self.calls.append(at + 1)
            return self.code.places[i.target]
        if head == "RET":
            if guard is None:
                return self._fork(step, at, len(self.code.steps))
            if guard is True:
                return self.calls.pop() if self.calls else at
            if guard is not False:  # some lanes return, and wait for the others at the end of the function
                frames.append(Frame(len(self.code.steps), len(self.calls), self.mask, None))
                self.mask = lanes.both(self.mask, lanes.inverted(guard))
            return at + 1
        if head == "EXIT":
            return self._exit(step, at, guard, frames)
        for operand in i.operands:
            if PREDICATE.match(operand):
                guard = lanes.both(guard, predicate(operand)(self))
        target = self.code.places.get(i.target) if i.target is not None else None
        if head != "BRA" or target is None:
            self.count.branches.add(at)
            self.count.endless = True
            return at
        if i.parts[-1] == "DIV" or guard is False:
            return at + 1
        guard = lanes.settled(guard, self.mask if isinstance(self.mask, np.ndarray) else True)
        if guard is None:
            return self._fork(step, at, target)
        if isinstance(guard, bool):
            if guard and target == at:
                return at
            return target if guard else at + 1
        taken, rest = lanes.both(self.mask, guard), lanes.both(self.mask, lanes.inverted(guard))
        here, there = (at + 1, rest), (target, taken)
        if target <= at:  # lanes that leave a loop wait for the others
            here, there = there, here
        if here[0] == step.meets:
            here, there = there, here
        if not (frames and frames[-1].meets == step.meets and there[0] == step.meets and frames[-1].other is None):
            other = there if there[0] != step.meets else None
            frames.append(Frame(step.meets, len(self.calls), self.mask, other))
        self.mask = here[1]
        return here[0]

    def _exit(self, step: Step, at: int, guard: Value, frames: list[Frame]) -> int:
        if guard is False:
            return at + 1
        if guard is None:
            return self._fork(step, at, len(self.code.steps))
        leaving = self.mask if guard is True else lanes.both(self.mask, guard)
        if not frames and lanes.settled(leaving, True) is True:
            return at
        self.gone = lanes.either(self.gone, leaving)
        self.mask = self._remaining(self.mask)
        if self.mask is not False:
            return at + 1
        return self._join(frames) if frames else at

    def _fork(self, step: Step, at: int, target: int) -> int:
        """Data decides: walks both ways to where they meet, and goes on there with what both leave the same."""
        count, end, calls = self.count, len(self.code.steps), step.i.head == "CALL"
        meets = at + 1 if calls else step.meets
        if at in self.open:  # a second time before the ways met: a loop
            count.endless = True
            count.loops.add(at)
            return meets if meets < end else at
        self.left -= FORK
        count.branches.add(at)
        self.open.add(at)
        before = self.state(), self.waits.state()
        ways = []
        for start in (at + 1, target):
            self.restore(before[0])
            self.waits.restore(before[1])
            self.count = count.beside()
            if calls and start == target:
                self.calls = [*self.calls, at + 1]
            if start != meets and start < end:
                self.run(start, meets)
            ways.append((self.count, self.state(), self.waits.state()))
        self.open.discard(at)
        (least, kept, waiting), (most, other, _) = sorted(ways, key=lambda way: sum(way[0].visits))
        self.restore(kept)
        self.waits.restore(waiting)
        self.forget_what_differs(other)
        count.add(least, most)
        self.count = count
        if meets < end:
            return meets
        return self.calls.pop() if self.calls and not calls else at  # both ways end a function, or the program
