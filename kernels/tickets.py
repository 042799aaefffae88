"""The protocol of a launch whose programs wait for one another.  docs/ticketed.md argues why it is safe.

A launch visits each of its tiles twice: once for statistics, once to apply them.  Its programs draw tickets, and what a
program does follows from its ticket alone: the first `lead` tickets are statistics of the first tiles, then come, in
turn, the tile to apply next and the statistics of the one `lead` tiles further, at last the applies that are left.  A
*unit* is the tiles whose statistics belong together; `lead` is at least the tiles of one, so a program that applies
waits only for tickets drawn before its own.

    words of tickets_ptr      [0] the next ticket      [32 + unit] its state      [32 + units + ...] blocks of chunks
    state of a unit           0 ... n: arrivals of statistics      n + 1 ... n + 1 + tiles: published, and applies done

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
def turn(ticket, lead):
    """(whether the ticket applies, its tile)"""
    tiles = tl.num_programs(0) // 2
    i = ticket - lead
    paired = (i >= 0) & (i < 2 * (tiles - lead))
    ends = i >= 2 * (tiles - lead)
    applies = ends | (paired & (i % 2 == 0))
    tile = tl.where(ends, ticket - tiles, tl.where(paired, tl.where(i % 2 == 0, i // 2, lead + i // 2), ticket))
    return applies, tile


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
def wait(word_ptr, expected):
    """Until a unit of `expected` arrivals is published."""
    # Adding 0 is a load with acquire semantics: Triton has no other.
    while tl.atomic_add(word_ptr, 0, sem="acquire") <= expected:
        pass
    tl.debug_barrier()


@triton.jit
def leave(word_ptr, expected, tiles):
    """The last of the `tiles` applies of a unit puts its state back to 0."""
    before = tl.atomic_add(word_ptr, 1, sem="relaxed")
    if before == expected + tiles:
        tl.atomic_xchg(word_ptr, 0, sem="relaxed")
