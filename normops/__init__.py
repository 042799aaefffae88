"""normops: one normalisation over any axis group, as hand-written Triton kernels, forward and backward."""

__version__ = "0.1.0"

from . import activations, functional, nn
from .functional import normalize
from .operators import decompositions
from .traced import decompose

__all__ = ["__version__", "activations", "decompose", "decompositions", "functional", "nn", "normalize"]
