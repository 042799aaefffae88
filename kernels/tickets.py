"""The protocol of a launch whose programs wait for one another.  docs/ticketed.md argues why it is safe.

A launch visits each of its tiles twice: once for statistics, once to apply them.  Its programs draw tickets, and what a
program does follows from its ticket t alone (``pair``): the statistics of tile t, and then the apply of tile t - lead;
the first `lead` tickets have no tile to apply, the last `lead` no statistics.  A *unit* is the tiles whose statistics
belong together.  An apply waits until its unit is published, which is what the program does whose statistics are the
last of the unit to arrive.  `lead` is at least the tiles of a unit, so all that an apply waits for was drawn before
it, and a program has done its own statistics before it waits: nobody waits for a ticket that is not drawn yet.

    words of o.tickets    [0] the next ticket                  [32 + unit] its state
    state of a unit       0 ... tiles: arrivals of statistics  tiles + 1 ... 2 tiles + 1: published, and applies done

Every word is 0 again when a launch ends.
"""

import triton
import triton.language as tl

FIRST_STATE = tl.constexpr(32)
"""States begin on a line of memory of their own: every program touches the first word."""


@triton.jit
def draw(tickets_ptr):
    """The next ticket, 0 to num_programs - 1; whoever draws the last one puts the word back to 0."""
    ticket = tl.atomic_add(tickets_ptr, 1, sem="relaxed")
    if ticket == tl.num_programs(0) - 1:
        tl.atomic_xchg(tickets_ptr, 0, sem="relaxed")
    return ticket


@triton.jit
def pair(ticket, lead):
    """(whether a ticket does statistics, the tile of these; whether it applies, the tile that it applies).

    Tiles of what it does not do are some that there are.
    """
    last = tl.num_programs(0) - lead - 1
    return ticket <= last, tl.minimum(ticket, last), ticket >= lead, tl.maximum(ticket - lead, 0)


@triton.jit
def arrive(word_ptr, expected):
    """Whether all `expected` have arrived, this program last: what each of them stored before can then be loaded."""
    tl.debug_barrier()  # the stores of all threads come before the one that tells of them
    before = tl.atomic_add(word_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return before == expected - 1


@triton.jit
def publish(word_ptr):
    """Let everyone who waits for this unit go on, and see what was stored before."""
    tl.debug_barrier()
    tl.atomic_add(word_ptr, 1, sem="release")


@triton.jit
def acquired(word_ptr, F: tl.constexpr):
    """The state of a unit; what was stored before it became that can then be loaded."""
    if F.PTX:  # by every thread for itself: no barrier, and no way through shared memory
        state = tl.inline_asm_elementwise(
            "ld.acquire.gpu.global.b32 $0, [$1];", "=r,l", [word_ptr], dtype=tl.int32, is_pure=False, pack=1
        )
    else:  # adding 0 is a load with acquire semantics: Triton has no other
        state = tl.atomic_add(word_ptr, 0, sem="acquire")
    return state


@triton.jit
def wait(word_ptr, tiles, F: tl.constexpr):
    """Until a unit of so many tiles is published."""
    while acquired(word_ptr, F) <= tiles:
        pass
    if not F.PTX:
        tl.debug_barrier()


@triton.jit
def leave(word_ptr, tiles, F: tl.constexpr):
    """The last of the applies of a unit puts its state back to 0."""
    if F.PTX:
        tl.debug_barrier()  # every thread waits for itself, and a slow one is not to see the 0
        # Counts up to 2 tiles, and then from 0.
        tl.inline_asm_elementwise(
            "{ .reg .pred first; .reg .b32 thread; mov.u32 thread, %tid.x; setp.eq.u32 first, thread, 0;"
            " @first red.relaxed.gpu.global.inc.u32 [$1], $2; mov.b32 $0, 0; }",
            "=r,l,r", [word_ptr, 2 * tiles], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip
    else:
        before = tl.atomic_add(word_ptr, 1, sem="relaxed")
        if before == 2 * tiles:
            tl.atomic_xchg(word_ptr, 0, sem="relaxed")
