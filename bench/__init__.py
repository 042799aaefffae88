"""Evidence: what normops computes against float64, how long it takes against others, and networks trained on it."""

import os

import torch

if not torch.cuda.is_available():  # before anything imports triton, here and in every worker process
    os.environ.setdefault("TRITON_INTERPRET", "1")
