"""Where a CPU has no kernels: the formula in PyTorch's operations, and no need of Triton."""

from __future__ import annotations

from collections.abc import Callable


def test_cpu_without_interpreter_runs_the_reference(plain: Callable[[str], str]) -> None:
    script = """
import torch
from normops import calls, functional as F
x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True)
assert not calls.uses_kernels(x)
rm, rv, tm, tv = torch.zeros(8), torch.ones(8), torch.zeros(8), torch.ones(8)
y = F.batch_norm(x, rm, rv, w, None, True, activation="silu")
ref = torch.nn.functional.silu(torch.nn.functional.batch_norm(x, tm, tv, w, None, True))
torch.testing.assert_close(y, ref)
torch.testing.assert_close((rm, rv), (tm, tv))
for a, b in zip(torch.autograd.grad(y.square().sum(), [x, w]), torch.autograd.grad(ref.square().sum(), [x, w])):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
torch.testing.assert_close(F.batch_norm(x, rm, rv, w), torch.nn.functional.batch_norm(x, rm, rv, w))
torch.testing.assert_close(F.layer_norm(x, (8,), w), torch.nn.functional.layer_norm(x, (8,), w))
print("reference")
"""
    assert plain(script) == "reference"


def test_inference_tensors_without_kernels(plain: Callable[[str], str]) -> None:
    """Modules and inputs of inference mode serve outside of it, as PyTorch's do, and record nothing but what
    PyTorch's do: its RMSNorm multiplies tensors that are none of inference mode any more."""
    found = plain("""
import torch
from normops import nn
with torch.inference_mode():
    x = torch.randn(3, 6, 4, 4)
    norms = [nn.GroupNorm(2, 6), nn.LayerNorm(4), nn.RMSNorm(4), nn.LayerNorm2d(6), nn.InstanceNorm2d(6, affine=True)]
    norms += [nn.BatchNorm2d(6).eval()]
for norm in norms:
    y = norm(x)
    assert y.requires_grad <= isinstance(norm, nn.RMSNorm) and y.shape == x.shape
print("nothing recorded")
""")
    assert found == "nothing recorded"


def test_a_cpu_needs_no_triton(plain: Callable[[str], str]) -> None:
    """Nor does the import; CUDA tensors are told what is missing."""
    found = plain("""
import importlib.util, sys
original = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "triton" else original(name, *a)
sys.modules["triton"] = None  # an import raises ModuleNotFoundError
import torch
from normops import calls, nn, normalize

x = torch.randn(4, 6, 5, requires_grad=True)
for norm in (nn.BatchNorm1d(6), nn.GroupNorm(2, 6, activation="silu"), nn.LayerNorm(5), nn.RMSNorm(5)):
    norm(x).sum().backward()
normalize(x, "n c l -> n", activation="gelu").sum().backward()
assert torch.func.vmap(nn.LayerNorm(5))(x).shape == x.shape
assert not any(name.startswith(("triton.", "normops.kernels")) for name in sys.modules)

class OnCuda:
    device = torch.device("cuda")

try:
    calls.uses_kernels(OnCuda)
except ModuleNotFoundError as error:
    print(error)
""")
    assert found == "normops runs its kernels with Triton: expected the package triton"
