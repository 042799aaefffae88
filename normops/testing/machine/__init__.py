"""Machine code of NVIDIA GPUs, read and walked through without a GPU.

    code.py      instructions, their control bits, where parted ways meet
    cubin.py     where a kernel's parameters lie
    lanes.py     what the 32 lanes of a warp hold
    warp.py      registers, predicates and memory of a warp
    operands.py  integers.py  meaning.py  what instructions read and do to it
    steps.py     a kernel's code, prepared
    counts.py    what is counted on the way
    walk.py      the way
"""
