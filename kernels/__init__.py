"""Device code of normops: hand-written Triton kernels, imported as ``normops.kernels``.

Every normalisation is one formula; only the axes that are averaged over differ:

    mean = 1/|R| * sum_R x        rstd = 1/sqrt(1/|R| * sum_R (x - mean)^2 + eps)     (RMS: mean = 0)
    xhat = (x - mean) * rstd      y = act(xhat * w + b + post)

An axis of x is kept (K) or reduced (R), and the affine parameters vary along it (a) or not.  Sorted
into those four kinds, the index of an element is four coordinates:

    m  kept                the rows of a LayerNorm, the samples of an InstanceNorm
    c  kept, affine        the channels of a BatchNorm, the groups of a GroupNorm
    a  reduced, affine     the features of a LayerNorm, the channels inside a group of a GroupNorm
    s  reduced             the pixels of a BatchNorm, InstanceNorm or GroupNorm

so mean and rstd are indexed by (m, c), w and b by (c, a), and no kernel is named after a norm.

Every kernel takes two values (bundles.py): ``o``, its operands, pointers that are None where the operand is absent,
and ``F``, the form of the call, all that is known when it is compiled; between them numbers of one launch.

Grammar.  ``F.SPACE`` is the sizes of the four coordinates, each a tuple of runs from the outermost to the innermost in
memory; the one size written 0 there is the run-time argument ``n0`` (the batch, usually), so that a new batch size
compiles nothing.  A capital letter or word for an operand (``F.X``, ``F.W``, ``F.STAT``) is its strides in the same
shape, ``()`` where it does not vary.  A tile is [BLOCK_K, BLOCK_A, BLOCK_S], or PIECES such blocks, neighbours along a
or s; its first axis runs along m or along c (``ALONG_M``), whichever lies further inside.  Where BLOCK_K is 1, what
there is one of for each group is a number, not a block.

``FOLD`` = (columns of a group, columns of a block, lanes of its groups, columns that a sum over s stands for:
1, or those of a group where they share their parameters).  Where a reduced axis is the innermost one and its
pieces are short (10 channels a group in channels_last, 7 × 7 planes), it is counted among the kept ones: m or c are
then *columns*, read as wide as memory allows.  A program that holds whole groups takes blocks of whole ones; sums
over s are taken by column first, then over the columns of a group (``by_group``).  A program that walks along
columns takes each for a group of its own, FOLD = (1, block, block, 1), and a finish finds them APART.  A fifth
element of an operand's strides says how many neighbours along (m, c) share one of its elements.  Elsewhere a group
is one column: FOLD = (1, BLOCK_K, BLOCK_K, 1).

    resident.py     normalize · grad_normalize · grad_group: a whole group on chip (or rows, given their sums)
    stream.py       stream: groups that are visited twice, in two launches or in one, in the order of tickets.py
    grad_stream.py  grad_stream: the same backward
    finish.py       finish · grad_finish · sum_rows: partial results, in index order
    norm.py         the formula on a tile: moments, affine map and activation, gradient
    tile.py  memory.py  sums.py  elements.py  activations.py  bundles.py: the pieces they share
"""

if __name__ != "normops.kernels":
    # At the top level `kernels` is another distribution (Hugging Face's), which transformers looks for by importing it:
    # beside a checkout of normops it finds a package without a version or anything else, and goes on without.
    __path__ = []

    def __getattr__(name):
        raise AttributeError(f"this folder is the package normops.kernels, and no other: it has no {name!r}")
