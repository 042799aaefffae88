"""normops: one normalisation over any axis group, as hand-written Triton kernels, forward and backward.

:func:`normalize` takes any axes; :mod:`normops.functional` and :mod:`normops.nn` have PyTorch's norms by their names.

>>> import torch, normops
>>> normops.__version__.count(".")
2
>>> normops.normalize(torch.randn(2, 4), 1, activation="relu").shape
torch.Size([2, 4])
"""

__version__ = "0.1.0"

from . import activations, functional, nn
from .conversion import convert, register_converter, report, restore
from .faults import KernelError, fallback
from .functional import normalize
from .operators import decompositions
from .traced import decompose

__all__ = [
    "KernelError", "__version__", "activations", "convert", "decompose", "decompositions", "fallback", "functional",
    "nn", "normalize", "register_converter", "report", "restore",
]  # fmt: skip
