"""What is read out of the text of PTX and of AMD's assembly."""

from __future__ import annotations

import pytest

from normops.testing import amdgcn, ptx

PTX = """
.visible .entry k(.param .u64 .ptr .global .align 1 k_param_0, .param .u64 k_param_1, .param .u32 k_param_2)
.reqntid 256
{
\t.local .align 8 .b8 \t__local_depot0[24];
\t.reg .b64 %rd<9>;
\tld.param.b64 \t%rd1, [k_param_0];
$L__BB0_1: // st.global.b32 [%rd1], %r1;
\tld.param.u64 %rd2, [k_param_1];
\tmul.wide.s32 \t%rd3, %r2, 4; add.s64 %rd4, %rd1, %rd3;
\tsetp.lt.u64 %p2, %rd2, %rd1;
\t@%p1 ld.global.L1::evict_last.L2::cache_hint.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd4 + 16 ], %rd9;
\t@!%p1 ld.volatile.global.v2.u64 {%rd5, %rd6}, [%rd2+8];
\tcp.async.cg.shared.global [ %r5 + 0 ], [ %rd4 + 0 ], 0x10, %r6;
\tcp.async.commit_group;
\tst.shared.b64 [%r5], %rd2; ld.shared.b64 %rd7, [%r5];
\t.loc\t2 57 16                          // norm.py:57:16 @[ other.py:7:3 @[ kernel.py:9:4 ] ]
\tst.global.cs.b8 [%rd7], %rs1;
\t.loc\t1 58 3
\tst.global.b16 [%rd5], %rs1; // an address out of memory
\tatom.global.gpu.acq_rel.add.f32 %f1, [%rd4], %f2; atom.shared.add.u32 %r7, [%r5], 1; redux.sync.add.s32 %r8, %r7, -1;
\tred.global.add.f32 [%rd2], %f1;
\tbar.sync 0; bar.warp.sync -1; mbarrier.init.b64 [%r5], 1;
\tbarrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;
\tret;
}
\t.file\t1 "/somewhere/kernel.py"
\t.file\t2 "norm.py"
"""


def test_ptx() -> None:
    none, first, second = frozenset(), frozenset([0]), frozenset([1])
    accesses = ptx.accesses(PTX, frozenset([0, 1]))
    assert [access[:3] for access in accesses] == [
        ("load", 128, first), ("load", 128, second), ("load", 128, first), ("store", 8, second), ("store", 16, none),
    ]  # fmt: skip
    inlined = {"norm.py:57", "other.py:7", "kernel.py:9"}
    assert [access.lines for access in accesses] == [none, none, none, inlined, {"kernel.py:58"}]
    assert ptx.barriers(PTX) == 2 and ptx.atomics(PTX) == 2
    assert ptx.arrays(PTX) == 24 and ptx.threads(PTX) == 256


AMDGCN = """
\ts_load_dwordx4 s[0:3], s[0:1], 0x0
\tglobal_load_dwordx4 v[0:3], v4, s[0:1]
\tbuffer_load_ushort v5, v4, s[4:7], 0 offen
\tglobal_load_short_d16_hi v5, v4, s[0:1]
\tbuffer_store_byte v5, v4, s[4:7], 0 offen
\tflat_store_b64 v[0:1], v[2:3]
\tds_read_b128 v[0:3], v4
\tglobal_atomic_add_f32 v4, v5, s[0:1]
\ts_barrier
    .vgpr_count:     12
"""


def test_amdgcn() -> None:
    assert amdgcn.accesses(AMDGCN) == (("load", 128), ("load", 16), ("load", 16), ("store", 8), ("store", 64))
    assert amdgcn.barriers(AMDGCN) == amdgcn.atomics(AMDGCN) == 1
    assert amdgcn.figure(AMDGCN, "vgpr_count") == 12
    with pytest.raises(ValueError, match="vgpr_spill_count"):
        amdgcn.figure(AMDGCN, "vgpr_spill_count")
    with pytest.raises(ValueError, match="format"):
        amdgcn.accesses("\tbuffer_load_format_xyzw v[0:3], v4, s[4:7], 0 idxen\n")
