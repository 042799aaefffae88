"""All orders of the steps of a ticketed launch; see protocol.py for what a step is, and what threads see of memory.

A state is where the threads of all programs are, what they see, and what the words hold.  Steps that no other program
sees (barriers, loads and stores, which an atomic makes known) are taken at once.  The code has no loop but that of a
wait; a turn of it is no step, as all that it does is that more is seen.  So states form no circle, and where each but
the last has a step, every run ends.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from normops.ticketing import FIRST_STATE
from tests.protocol import END, THREADS, Atomic, Barrier, Code, Data, Load, Number, Op, halves


class Violation(Exception):
    """What must not happen in a launch, and does."""


class Program(NamedTuple):
    places: tuple[int, ...]
    """Where its threads are in the code."""
    views: tuple[int, ...]
    """What they see: a bit for each thread's half of a location."""


class Word(NamedTuple):
    value: int = 0
    view: int = 0
    """What is seen by who acquires it."""
    first: tuple[int, int] | None = None
    """The first value above n and its view: loads may find it long after."""


class State(NamedTuple):
    left: int
    """Programs that have not begun."""
    ids: int
    """Their ids, a bit for each."""
    programs: tuple[Program, ...]
    """Those that have begun and not ended, in the order of their places."""
    words: tuple[Word, ...]
    written: int


def _with(values: tuple[Any, ...], at: int, value: object) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


class Search:
    """Of a launch with so many programs resident at a time."""

    def __init__(self, code: Code, slots: int) -> None:
        self._code, self._slots, launch = code, slots, code.launch
        units = range(launch.tiles // launch.unit)
        self._words = {0: 0} | {FIRST_STATE + unit: 1 + unit for unit in units}
        self._bits = THREADS * code.locations
        self._begin = State(launch.programs, (1 << launch.programs) - 1, (), (Word(),) * len(self._words), 0)

    def run(self) -> int:
        """The number of states; raises Violation."""
        stack, seen = [self._begin], {self._begin}
        while stack:
            state = stack.pop()
            following = {*self._steps(state)}
            if not following:
                self._end(state)
            stack += following - seen
            seen |= following
        return len(seen)

    def _end(self, state: State) -> None:
        """Of a state without steps."""
        if state.left or state.programs:
            at = [self._code.ops[place] for program in state.programs for place in program.places if place != END]
            raise Violation(f"deadlock: {state.left} programs have not begun; at {at}")
        if any(word.value for word in state.words):
            raise Violation(f"dirty: words hold {[word.value for word in state.words]} at the end")
        if state.written != (1 << self._bits) - 1:
            raise Violation("lost: not all was stored")

    def _op(self, place: int) -> Op | None:
        return None if place == END else self._code.ops[place]

    def _steps(self, state: State) -> Iterator[State]:
        if state.left and len(state.programs) < self._slots:
            yield from self._starts(state)
        for i, (places, views) in enumerate(state.programs):
            rest = state._replace(programs=state.programs[:i] + state.programs[i + 1 :])
            for thread, place in enumerate(places):
                op = self._op(place)
                if isinstance(op, Load):
                    yield from self._load(rest, places, views, thread, op)
                elif isinstance(op, Atomic) and thread == 0:
                    yield from self._atomic(rest, places, views, op)

    def _starts(self, state: State) -> Iterator[State]:
        """A program begins, with the step that tells it from others; before that it might not have begun as well."""
        code, rest, views = self._code, state._replace(left=state.left - 1), (0,) * THREADS
        op = self._op(code.start)
        if isinstance(op, Atomic):
            yield from self._atomic(rest, (code.start,) * THREADS, views, op)
        else:
            assert isinstance(op, Number)
            for i in (i for i in range(code.launch.programs) if state.ids >> i & 1):
                yield self._local(rest._replace(ids=state.ids ^ 1 << i), (code.after(code.start, i),) * THREADS, views)

    def _place_of(self, address: int) -> int:
        if address not in self._words:
            raise Violation(f"outside: {address} is no word of the launch")
        return self._words[address]

    def _load(
        self, rest: State, places: tuple[int, ...], views: tuple[int, ...], thread: int, op: Load
    ) -> Iterator[State]:
        word = rest.words[self._place_of(op.word)]
        for value, view in {word.first or word[:2], word[:2]}:
            place = self._code.after(places[thread], value)
            if place != places[thread]:
                seen = views[thread] | (view if op.sem == "acquire" else 0)
                yield self._local(rest, _with(places, thread, place), _with(views, thread, seen))

    def _atomic(self, rest: State, places: tuple[int, ...], views: tuple[int, ...], op: Atomic) -> Iterator[State]:
        at = self._place_of(op.word)
        value, view, first = rest.words[at]
        if op.sem in ("acquire", "acq_rel"):
            views = _with(views, 0, views[0] | view)
        if op.sem in ("release", "acq_rel"):
            view |= views[0]
        wrapped = value + 1 if value < op.operand else 0
        new = {"add": value + op.operand, "exch": op.operand, "inc": wrapped}[op.action]
        first = None if at == 0 or new <= self._code.launch.unit else first or (new, view)
        rest = rest._replace(words=_with(rest.words, at, Word(new, view, first)))
        if not op.used:
            yield self._local(rest, _with(places, 0, self._code.after(places[0])), views)
            return
        assert len({*places}) == 1, "not modelled: a result handed to a thread that is not there yet"
        place = self._code.after(places[0], value)
        if place != places[0]:
            yield self._local(rest, (place,) * THREADS, views)

    def _local(self, rest: State, places: tuple[int, ...], views: tuple[int, ...]) -> State:
        """After all of a program's steps that no other program sees."""
        code, written, together = self._code, rest.written, True
        while together:
            for thread, place in enumerate(places):
                op = self._op(place)
                while isinstance(op, Data) or (isinstance(op, Atomic) and thread and not op.used):
                    if isinstance(op, Data):
                        views, written = self._data(op, thread, views, written)
                    place = code.after(place)
                    op = self._op(place)
                places = _with(places, thread, place)
            together = all(isinstance(self._op(place), Barrier) for place in places)
            if together:
                places = tuple([code.after(place) for place in places])
                views = (views[0] | views[1],) * THREADS
        programs = rest.programs
        if {*places} != {END}:
            programs = tuple(sorted([*programs, Program(places, views)]))
        return rest._replace(programs=programs, written=written)

    @staticmethod
    def _data(op: Data, thread: int, views: tuple[int, ...], written: int) -> tuple[tuple[int, ...], int]:
        if not op.stores:
            if halves(op.location) & ~views[thread]:
                raise Violation(f"stale: thread {thread} loads location {op.location} and may not see it")
            return views, written
        half = 1 << THREADS * op.location + thread
        if written & half:
            raise Violation(f"twice: location {op.location} is stored again")
        return _with(views, thread, views[thread] | half), written | half
