"""The pieces of the walk through machine code: instructions as they are printed, lanes, bank conflicts, meetings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from normops.testing.machine import lanes
from normops.testing.machine.code import meeting_points, read
from normops.testing.machine.integers import MEANINGS as INTEGERS
from normops.testing.machine.steps import Code
from normops.testing.machine.walk import Walk
from normops.testing.machine.warp import Warp

M32 = lanes.M32


def listing(*lines: str, control: int = 0xE << 46 | 7 << 49) -> str:
    """What cuobjdump prints of a function with these instructions."""
    text = ["\t\tFunction : made_up"]
    for n, line in enumerate(lines):
        text.append(f"        /*{16 * n:04x}*/  {line} ;  /* 0x{n:016x} */")
        text.append(f"                             /* 0x{control:016x} */")
    return "\n".join(text)


def walked(*lines: str, ticket: int | None = None, **registers: Any) -> Walk:
    code = Code(read(listing(*lines), "made_up"))
    walk = Walk(code, {"SR_CTAID.X": 5}, {0x210: 7, 0x214: 0}, 0, ticket)
    walk.registers |= registers
    walk.run()
    return walk


def test_an_instruction_is_read_with_its_control_bits() -> None:
    high = 5 << 41 | 2 << 46 | 7 << 49 | 0b101001 << 52
    (one,) = read(listing("@!P2 LDG.E.128.CONSTANT R12, desc[UR8][R54.64+0x600]", control=high), "made_up")
    assert (one.guard, one.head, one.width, one.address) == ("!P2", "LDG", 128, 0)
    assert one.operands == ("R12", "desc[UR8][R54.64+0x600]")
    assert (one.stall, one.sets, one.frees, one.waits) == (5, 2, None, (0, 3, 5))
    with pytest.raises(ValueError, match="function must be one of made_up, got 'other'"):
        read(listing("EXIT"), "other")


EXAMPLES = [
    ("IADD3 R0, R1, -R2, RZ", {"R1": 5, "R2": 7}, M32 - 1),
    ("IMAD R0, R1, 0x3, R2", {"R1": M32, "R2": 4}, 1),
    ("IMAD.HI.U32 R0, R1, R2, RZ", {"R1": 1 << 31, "R2": 6}, 3),
    ("LEA R0, R1, R2, 0x4", {"R1": 3, "R2": 2}, 50),
    ("LEA.HI.SX32 R0, R1, R2, 0x1f", {"R1": M32, "R2": 1}, 0),
    ("SHF.R.S32.HI R0, RZ, 0x1f, R1", {"R1": 1 << 31}, M32),
    ("SHF.R.U32.HI R0, RZ, 0x1f, R1", {"R1": 1 << 31}, 1),
    ("SHF.L.U32 R0, R1, 0x4, RZ", {"R1": 0xF0000001}, 0x10),
    ("LOP3.LUT R0, R1, 0xf, R2, 0xf8, !PT", {"R1": 0x123, "R2": 0x1C}, 0x12F),
    ("LOP3.LUT R0, R1, RZ, RZ, 0xc0, !PT", {"R1": None}, 0),
    ("LOP3.LUT R0, R1, 0xf, RZ, 0xc0, !PT", {"R1": None}, None),
    ("SEL R0, R1, R2, PT", {"R1": 1, "R2": 2}, 1),
    ("VIMNMX R0, R1, R2, PT", {"R1": M32, "R2": 3}, M32),
    ("VIMNMX.U32 R0, R1, R2, !PT", {"R1": 9, "R2": 3}, 9),
    ("PRMT R0, R1, 0x7610, R2", {"R1": 0x11112222, "R2": 0x33334444}, 0x33332222),
    ("IABS R0, R1", {"R1": M32 - 4}, 5),
    ("SGXT R0, R1, 0x4", {"R1": 0x18}, M32 - 7),
    ("SGXT.U32 R0, R1, 0x4", {"R1": 0x18}, 8),
    ("POPC R0, R1", {"R1": 0xF0F}, 8),
    ("FLO.U32 R0, R1", {"R1": 0x900}, 11),
    ("BREV R0, R1", {"R1": 1}, 1 << 31),
    ("HFMA2.MMA R0, -RZ, RZ, 0, 5.9604644775390625e-08", {}, 1),
    ("MOV R0, c[0x0][0x210]", {}, 7),
    ("S2R R0, SR_CTAID.X", {}, 5),
    ("FADD R0, R1, R1", {"R1": 0}, None),
    ("SOMETHING.NEW R0, R1", {"R1": 0}, None),
]  # fmt: skip


@pytest.mark.parametrize(("line", "registers", "value"), EXAMPLES, ids=[example[0] for example in EXAMPLES])
def test_what_an_instruction_does(line: str, registers: dict[str, Any], value: int | None) -> None:
    assert walked(line, "EXIT", **registers).registers["R0"] == value
    if line.split(".")[0].split()[0] in INTEGERS and None not in registers.values():
        spread = {name: np.full(32, v, np.uint64) for name, v in registers.items()}
        result = walked(line, "EXIT", **spread).registers["R0"]
        assert (lanes.array(result) == value).all(), "the same for 32 lanes that might differ"


def test_a_carry_goes_on_to_the_high_half() -> None:
    add = ("IADD3 R0, P0, R2, R4, RZ", "IADD3.X R1, R3, R5, RZ, P0, !PT", "EXIT")
    done = walked(*add, R2=M32, R3=1, R4=2, R5=0)
    assert (done.registers["R0"], done.registers["R1"]) == (1, 2)
    subtract = ("IADD3 R0, P0, R2, -R4, RZ", "IADD3.X R1, R3, ~R5, RZ, P0, !PT", "EXIT")
    for a, b in ((1 << 33, 1), (5, 5), (3, 9), (1 << 32, 0)):
        done = walked(*subtract, R2=a & M32, R3=a >> 32, R4=b & M32, R5=b >> 32)
        assert done.registers["R0"] | done.registers["R1"] << 32 == (a - b) % (1 << 64)


def test_lanes_that_part_meet_again() -> None:
    done = walked(
        "S2R R1, SR_LANEID", "ISETP.GE.U32.AND P0, PT, R1, 0x8, PT", "@P0 BRA 0x50", "MOV R0, 0x1", "BRA 0x60",
        "MOV R0, 0x2", "IADD3 R2, R0, 0x1, RZ", "EXIT",
    )  # fmt: skip
    assert done.registers["R2"].tolist() == [2] * 8 + [3] * 24
    assert done.count.visits == [1] * 8 and not done.count.branches and done.mask is True


def test_lanes_leave_a_loop_one_after_the_other() -> None:
    done = walked(
        "S2R R1, SR_LANEID", "MOV R0, RZ", "IADD3 R0, R0, 0x1, RZ", "ISETP.LT.U32.AND P0, PT, R0, R1, PT",
        "@P0 BRA 0x20", "EXIT",
    )  # fmt: skip
    assert done.registers["R0"].tolist() == [max(1, lane) for lane in range(32)]
    assert done.count.visits == [1, 1, 31, 31, 31, 1], "as often as the last lane"


def test_what_data_decides_is_bounded_by_both_ways() -> None:
    done = walked(
        "LDG.E R1, [R2.64]", "ISETP.GE.AND P0, PT, R1, RZ, PT", "@P0 BRA 0x60", "MOV R0, 0x1", "MOV R3, 0x1",
        "BRA 0x70", "MOV R0, 0x2", "EXIT",
    )  # fmt: skip
    assert sum(done.count.visits) == 5 and sum(done.count.maybe) == 3 and not done.count.endless
    assert done.registers["R0"] is None and done.count.branches == {2}


def test_a_loop_that_data_ends_is_endless() -> None:
    done = walked("LDG.E R1, [R2.64]", "ISETP.GE.AND P0, PT, R1, RZ, PT", "@P0 BRA 0x0", "EXIT")
    assert done.count.endless and done.count.loops == {2} and done.count.visits[-1] == 1


def test_a_call_that_does_not_come_back_is_a_branch() -> None:
    """A loop that is left by calling its end: 100 trips of it are not 100 ways to go on."""
    lines = ["LDG.E R1, [R2.64]", "ISETP.GE.AND P0, PT, R1, RZ, PT", "@!P0 CALL.REL.NOINC 0x40", "BRA 0x0", "EXIT"]
    done = walked(*lines)
    assert done.count.loops == {2} and done.count.endless and sum(done.count.visits) < 10
    back = ["@!P0 CALL.REL.NOINC 0x30", "MOV R0, 0x1", "EXIT", "MOV R2, 0x5", "RET.REL.NODEC R4 0x0"]
    done = walked(*back)
    assert done.count.visits == [1, 1, 1, 1, 1] and done.registers["R2"] == 5


def test_bulk_copies_are_awaited_at_the_barrier_that_was_told_of_them() -> None:
    tell = ("ELECT P0, URZ, PT", "@P0 MOV R4, 0x2000", "@P0 SYNCS.ARRIVE.TRANS64 RZ, [R6], R4")
    done = walked(*tell, "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R6], R7", "@!P1 BRA 0x30", "EXIT", R4=None, R6=64)
    assert (done.count.loaded, done.count.sectors, done.count.in_flight) == (8192, 256, 8192), "by one lane"
    assert done.count.rounds == 1 and not done.count.branches
    other = walked(*tell, "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R7], R7", "EXIT", R6=64, R7=72)
    assert other.count.rounds == 0, "that barrier was told of none"
    arrived = walked("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [R6], R4", "EXIT", R4=1, R6=64)
    assert arrived.count.loaded == 0, "a warp arrives, no bytes"


def test_a_ticket_is_the_first_addition_of_one_lane() -> None:
    lines = (
        "S2R R1, SR_LANEID", "ISETP.EQ.U32.AND P0, PT, R1, RZ, PT", "@P0 ATOMG.E.ADD.STRONG.GPU PT, R0, [R2.64], R4",
        "@P0 ATOMG.E.ADD.STRONG.GPU PT, R5, [R2.64], R4", "EXIT",
    )  # fmt: skip
    done = walked(*lines, ticket=41, R2=4096, R3=1, R4=1)
    assert done.registers["R0"][0] == 41 and done.registers["R5"] is None
    assert done.first_atomic == (4096 + (1 << 32), 1)
    assert walked(*lines[:2], "ATOMG.E.ADD PT, R0, [R2.64], R4", "EXIT", ticket=41, R4=1).registers["R0"] is None


@pytest.mark.parametrize(
    ("step", "width", "turns"),
    [(4, 4, 1), (8, 4, 2), (128, 4, 32), (0, 4, 1), (132, 4, 1), (16, 16, 4), (8, 8, 2), (512, 16, 32)],
)
def test_bank_conflicts(step: int, width: int, turns: int) -> None:
    """Lanes that are `step` bytes apart read `width` bytes each of shared memory."""
    code = Code(read(listing("EXIT"), "made_up"))
    at = lanes.LANES * step
    assert code.wavefronts(at if step else 0, width) == turns
    assert code.wavefronts(at + 4096 if step else 4096, width) == turns


def test_meeting_points() -> None:
    code = read(listing("@P0 BRA 0x30", "MOV R0, R1", "BRA 0x40", "MOV R0, R2", "@P1 BRA 0x0", "EXIT"), "made_up")
    assert meeting_points(code) == [4, 2, 4, 4, 5, 6]
    leaving = read(listing("@P0 BRA 0x20", "EXIT", "MOV R0, R1", "EXIT"), "made_up")
    assert meeting_points(leaving)[0] == 4, "they do not meet before the end"


def test_a_warp_knows_what_the_first_one_left_in_shared_memory() -> None:
    warp = Warp({}, {}, 1, None, ({16: 9}, {16: 10}))
    assert warp.remembered("shared", 16, 0) is None, "not before a barrier"
    warp.barriers.append({})
    assert warp.remembered("shared", 16, 0) == 9
    warp.barriers.append({})
    assert warp.remembered("shared", 12, 4) == 10
    warp.remember("shared", 16, 0, 3)
    assert warp.remembered("shared", 16, 0) == 3
