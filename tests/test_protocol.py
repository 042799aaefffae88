"""The ticketed protocol in every order of its steps, at small sizes, under a weak memory; and with a fault, that it is
found.  What is modelled: protocol.py."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence

import pytest

from tests.protocol import KERNELS, Code, Edit, Launch, effects
from tests.search import Search, Violation

ALL = 1000
FORMS = {"forward": ({}, ALL), "backward": ({"backward": True}, 3), "plain twins": ({"ptx": False}, 3)}
"""And the most programs that are resident: the forward has all numbers of them."""


def states(launch: Launch, edits: Sequence[Edit] = (), most: int = ALL) -> int:
    """All that a launch can come to, with one resident program, two, … `most`, or all; raises Violation."""
    code = Code(launch, edits)
    return sum(Search(code, slots).run() for slots in range(1, min(launch.programs, most) + 1))


def launches(tiles: int, **form: bool) -> list[Launch]:
    """With every unit and every lead."""
    units = [unit for unit in range(1, tiles + 1) if tiles % unit == 0]
    return [Launch(tiles, unit, lead, **form) for unit in units for lead in range(unit, tiles + 1)]


@pytest.mark.parametrize("tiles", [1, 2, 3, 4])
@pytest.mark.parametrize("form", FORMS)
def test_every_order_of_few_tiles_is_right(form: str, tiles: int) -> None:
    """It ends, with each unit merged once from all of its partial results, each tile applied once with the statistics
    of its unit, and all words 0: so the next launch on them begins as this one did."""
    given, most = FORMS[form]
    for launch in launches(tiles, **given):
        assert states(launch, most=most) > launch.programs


def test_every_order_of_two_units_of_three_tiles_is_right() -> None:
    """With leads that let statistics end inside the applies of a unit; three programs at a time."""
    for launch in launches(6):
        if launch.unit == 3:
            assert states(launch, most=3) > launch.programs


TICKETS, FORWARD, BACKWARD = "tickets.py", "stream.py", "grad_stream.py"
SOME = Launch(4, 2, 3)
"""Has all there is: programs of both halves and of one, and a unit in whose applies the statistics end."""
BACK, PLAIN = SOME._replace(backward=True), SOME._replace(ptx=False)

BARRIER = "    tl.debug_barrier()\n"
STORE = "        store_moments(o, v, t, block_a, chunk_s, 1, n0, F)\n"
STORE_SUMS = "        store_sums(o, p1 * rstd, p0, t, chunk_of(block_a, chunk_s, chunks_s, F), n0, F)\n"
STATE = "        state = o.tickets + FIRST_STATE + unit\n"
MERGE = "            finish_groups(o, unit, tiles, chunks_s, 1, n0, eps, momentum, F)\n"
MERGE_SUMS = "            merge_group(o, unit, tiles if F.SHARED_A else chunks_s, n0, F)\n"
PUBLISH = "            publish(state)\n"
WAIT = "        wait(state, tiles, F)\n"
LOAD = "        mean, rstd = saved_statistics(o, u, F, True)\n"
LEAVE = "        leave(state, tiles, F)\n"
ADD = '    tl.atomic_add(word_ptr, 1, sem="release")\n'
DRAW = '    ticket = tl.atomic_add(tickets_ptr, 1, sem="relaxed")\n'
RESET_TICKETS = '        tl.atomic_xchg(tickets_ptr, 0, sem="relaxed")\n'
RESET = '            tl.atomic_xchg(word_ptr, 0, sem="relaxed")\n'

FAULTS = {
    "no wait": ("stale", FORWARD, {WAIT: ""}, SOME),
    "no publication": ("deadlock", FORWARD, {PUBLISH: ""}, SOME),
    "published before the statistics are stored": ("stale", FORWARD, {MERGE + PUBLISH: PUBLISH + MERGE}, SOME),
    "arrives before its results are stored": ("stale", FORWARD, {STORE + STATE: STATE, PUBLISH: PUBLISH + STORE}, SOME),
    "sum read before the wait": ("stale", FORWARD, {WAIT: "        load_pieces(o.sum, u, SUM, F)\n" + WAIT}, SOME),
    "statistics read before the wait": ("stale", FORWARD, {WAIT + LOAD: LOAD + WAIT}, SOME),
    "waits for the unit of its own statistics": ("stale", FORWARD, {"STATE + unit_u": "STATE + unit"}, SOME),
    "each arrival merges": ("stale", FORWARD, {"if arrive(state, tiles):": "if arrive(state, tiles) or True:"}, SOME),
    "backward: no wait": ("stale", BACKWARD, {WAIT: ""}, BACK),
    "backward: no publication": ("deadlock", BACKWARD, {PUBLISH: ""}, BACK),
    "backward: published too early": ("stale", BACKWARD, {MERGE_SUMS + PUBLISH: PUBLISH + MERGE_SUMS}, BACK),
    "backward: arrives too early": ("stale", BACKWARD, {STORE_SUMS: "", PUBLISH: PUBLISH + STORE_SUMS}, BACK),
    "a lead of n - 2": ("deadlock", TICKETS, {}, Launch(6, 3, 1)),
    "tickets by program id": ("deadlock", TICKETS, {DRAW: "    return tl.program_id(0)\n"}, SOME),
    "goes on at n": ("stale", TICKETS, {"acquired(word_ptr, F) <= tiles": "acquired(word_ptr, F) < tiles"}, SOME),
    "the last arrival but one merges": ("stale", TICKETS, {"expected - 1": "expected - 2"}, SOME),
    "arrives relaxed": ("stale", TICKETS, {'"acq_rel"': '"relaxed"'}, SOME),
    "arrives without acquiring": ("stale", TICKETS, {'"acq_rel"': '"release"'}, SOME),
    "arrives without a release": ("stale", TICKETS, {'"acq_rel"': '"acquire"'}, SOME),
    "publishes relaxed": ("stale", TICKETS, {'"release"': '"relaxed"'}, SOME),
    "waits relaxed": ("stale", TICKETS, {"ld.acquire.gpu": "ld.relaxed.gpu"}, SOME),
    "no barrier before it arrives": ("stale", TICKETS, {"    tl.debug_barrier()  # the stores": "    #"}, SOME),
    "no barrier after it arrived": ("stale", TICKETS, {BARRIER + "    return before": "    return before"}, SOME),
    "no barrier before it publishes": ("stale", TICKETS, {BARRIER + ADD: ADD}, SOME),
    "no barrier before it leaves": ("deadlock", TICKETS, {"tl.debug_barrier()  # every thread": "#"}, SOME),
    "tickets not reset": ("dirty", TICKETS, {RESET_TICKETS: "        pass\n"}, SOME),
    "tickets reset one too early": ("twice", TICKETS, {"num_programs(0) - 1:": "num_programs(0) - 2:"}, SOME),
    "state not reset": ("dirty", TICKETS, {"inc.u32 [$1], $2;": "add.u32 [$1], 1;"}, SOME),
    "state reset one apply too early": ("deadlock", TICKETS, {"2 * tiles], dtype": "2 * tiles - 1], dtype"}, SOME),
    "state reset one apply too late": ("dirty", TICKETS, {"2 * tiles], dtype": "2 * tiles + 1], dtype"}, SOME),
    "plain twins: waits relaxed": ("stale", TICKETS, {'"acquire"': '"relaxed"'}, PLAIN),
    "plain twins: no barrier after the wait": ("stale", TICKETS, {"if not F.PTX:": "if False:"}, PLAIN),
    "plain twins: state not reset": ("dirty", TICKETS, {RESET: "            pass\n"}, PLAIN),
}
"""What the search must say; a file of kernels/, and other text for pieces of it; the launch."""


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    kind, file, changes, launch = FAULTS[name]
    with pytest.raises(Violation, match=f"^{kind}: "):
        states(launch, [Edit(file, *change) for change in changes.items()])


def test_a_lead_of_a_unit_less_one_is_enough() -> None:
    """The last arrival that an apply waits for may be that of its own program, which arrives before it waits."""
    for launch in (Launch(3, 3, 2), Launch(4, 2, 1)):
        assert states(launch, most=3) > launch.programs


def test_an_apply_may_be_counted_before_it_loads() -> None:
    """Nothing that it loads is stored again before the next launch: what a leave counts is waits, not loads."""
    edits = [Edit(FORWARD, LEAVE, ""), Edit(FORWARD, LOAD, LEAVE + LOAD)]
    assert states(SOME, edits, most=3) > SOME.programs


@pytest.mark.parametrize("backward", [False, True])
def test_what_stands_for_a_function_takes_its_parameters(backward: bool) -> None:
    """Or a kernel has changed under the model."""
    nodes = [node for file in KERNELS.glob("*.py") for node in ast.parse(file.read_text(encoding="utf-8")).body]
    parameters = {f.name: [a.arg for a in f.args.args] for f in nodes if isinstance(f, ast.FunctionDef)}
    for name, stand_in in effects(Launch(1, 1, 1, backward)).items():
        assert list(inspect.signature(stand_in).parameters) == parameters[name], name
