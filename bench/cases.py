"""The calls that are verified and timed: norms of real networks, one line a case."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch


@dataclass(frozen=True)
class Case:
    name: str
    norm: str
    """batch, batch_eval, instance, group, layer, layer2d (over axis 1), rms, adaln (layer, parameters per sample)"""
    shape: tuple[int, ...]
    small: tuple[int, ...]
    """The same call shrunken for the interpreter."""
    origin: str
    activation: str | None = None
    pre_add: bool = False
    post_add: bool = False
    groups: int = 32
    dims: int = 1
    """How many of the last axes `layer` and `rms` average over."""

    @property
    def formats(self) -> dict[str, torch.memory_format]:
        other = {4: "channels_last", 5: "channels_last_3d"}.get(len(self.shape))
        names = ["contiguous", other] if other and self.norm not in ("layer", "rms", "adaln") else ["contiguous"]
        return {name: getattr(torch, f"{name}_format" if name == "contiguous" else name) for name in names}

    @property
    def group(self) -> int:
        """Elements that share a mean, at the real shape."""
        n, c, *space = self.shape
        sizes = {"instance": prod(space), "group": prod(space) * c // self.groups, "layer2d": c}
        if self.norm in sizes:
            return sizes[self.norm]
        return n * prod(space) if self.norm.startswith("batch") else prod(self.shape[-self.dims :])


RESNET, CONVNEXT, UNET, VAE = "ResNet-50", "ConvNeXt-B", "Stable Diffusion UNet", "Stable Diffusion VAE decoder"
GAN, NNUNET, VIT, LLAMA = "CycleGAN generator", "nnU-Net 3D", "ViT", "Llama and Qwen, residual added"
SILU, RELU, LEAKY = ({"activation": name} for name in ("silu", "relu", "leaky_relu"))
ADD_RELU = {"activation": "relu", "post_add": True}

# fmt: off
CASES = (
    Case("resnet stem", "batch", (32, 64, 112, 112), (3, 5, 9, 11), f"{RESNET} stem, b32", **RELU),
    Case("resnet 64x56 b32", "batch", (32, 64, 56, 56), (3, 8, 8, 7), f"{RESNET} layer1 bn1, b32", **RELU),
    Case("resnet 256x56 b32", "batch", (32, 256, 56, 56), (2, 16, 7, 7), f"{RESNET} layer1 bn3, b32", **ADD_RELU),
    Case("resnet 512x28 b32", "batch", (32, 512, 28, 28), (3, 17, 6, 5), f"{RESNET} layer2 bn3, b32", **ADD_RELU),
    Case("resnet 1024x14 b32", "batch", (32, 1024, 14, 14), (4, 33, 5, 5), f"{RESNET} layer3 bn3, b32", **ADD_RELU),
    Case("resnet 2048x7 b32", "batch", (32, 2048, 7, 7), (4, 40, 7, 7), f"{RESNET} layer4 bn3, b32", **ADD_RELU),
    Case("resnet downsample", "batch", (32, 512, 28, 28), (2, 24, 6, 6), f"{RESNET} layer2 downsample, b32"),
    Case("resnet stem b256", "batch", (256, 64, 112, 112), (5, 4, 12, 12), f"{RESNET} stem, b256", **RELU),
    Case("resnet 64x56 b256", "batch", (256, 64, 56, 56), (8, 4, 9, 9), f"{RESNET} layer1 bn1, b256", **RELU),
    Case("resnet 256x56 b256", "batch", (256, 256, 56, 56), (7, 8, 8, 8), f"{RESNET} layer1 bn3, b256", **ADD_RELU),
    Case("resnet 512x28 b256", "batch", (256, 512, 28, 28), (9, 9, 5, 7), f"{RESNET} layer2 bn3, b256", **ADD_RELU),
    Case("resnet 1024x14 b256", "batch", (256, 1024, 14, 14), (6, 20, 6, 4), f"{RESNET} layer3 bn3, b256", **ADD_RELU),
    Case("resnet 2048x7 b256", "batch", (256, 2048, 7, 7), (11, 18, 3, 3), f"{RESNET} layer4 bn3, b256", **ADD_RELU),
    Case("resnet frozen", "batch_eval", (32, 256, 56, 56), (3, 12, 6, 7), f"{RESNET} layer1 bn3, frozen", **ADD_RELU),
    Case("convnext 128x56", "layer2d", (32, 128, 56, 56), (2, 13, 9, 8), f"{CONVNEXT} stage 1 LayerNorm2d"),
    Case("convnext 256x28", "layer2d", (32, 256, 28, 28), (2, 32, 6, 7), f"{CONVNEXT} stage 2 LayerNorm2d"),
    Case("convnext 512x14", "layer2d", (32, 512, 14, 14), (3, 50, 5, 5), f"{CONVNEXT} stage 3 LayerNorm2d"),
    Case("convnext 1024x7", "layer2d", (32, 1024, 7, 7), (2, 100, 3, 3), f"{CONVNEXT} stage 4 LayerNorm2d"),
    Case("unet 320x64", "group", (2, 320, 64, 64), (1, 96, 6, 7), f"{UNET}, one image with guidance", **SILU),
    Case("unet 640x32", "group", (2, 640, 32, 32), (2, 64, 5, 5), f"{UNET}, one image with guidance", **SILU),
    Case("unet 960x64", "group", (2, 960, 64, 64), (1, 96, 5, 6), f"{UNET}, skip joined, 30 channels a group", **SILU),
    Case("unet 1280x16", "group", (2, 1280, 16, 16), (2, 96, 4, 5), f"{UNET}, one image with guidance", **SILU),
    Case("unet 1280x8", "group", (2, 1280, 8, 8), (3, 96, 3, 3), f"{UNET}, one image with guidance", **SILU),
    Case("unet 2560x8", "group", (2, 2560, 8, 8), (2, 160, 3, 4), f"{UNET}, skip joined", **SILU),
    Case("unet 320x64 b16", "group", (16, 320, 64, 64), (3, 64, 5, 4), f"{UNET}, batch 16", **SILU),
    Case("unet 1280x16 b16", "group", (16, 1280, 16, 16), (4, 64, 4, 3), f"{UNET}, batch 16", **SILU),
    Case("unet attention", "group", (16, 640, 32, 32), (2, 96, 4, 4), f"{UNET}, before attention, batch 16"),
    Case("vae 128x512", "group", (1, 128, 512, 512), (1, 64, 9, 8), f"{VAE}, last blocks", **SILU),
    Case("vae 256x256", "group", (1, 256, 256, 256), (1, 96, 7, 8), f"{VAE}, third blocks", **SILU),
    Case("vae 512x128", "group", (1, 512, 128, 128), (1, 96, 6, 8), f"{VAE}, second blocks", **SILU),
    Case("vae 512x64", "group", (1, 512, 64, 64), (1, 64, 7, 7), f"{VAE}, first blocks", **SILU),
    Case("cyclegan 256x64", "instance", (1, 256, 64, 64), (1, 17, 15, 15), f"{GAN}, residual blocks", **RELU),
    Case("cyclegan 64x256", "instance", (1, 64, 256, 256), (1, 7, 24, 25), f"{GAN}, first and last layers", **RELU),
    Case("nnunet 32x128", "instance", (2, 32, 128, 128, 128), (2, 5, 7, 8, 9), f"{NNUNET}, input", **LEAKY),
    Case("nnunet 128x32", "instance", (2, 128, 32, 32, 32), (2, 9, 6, 6, 7), f"{NNUNET}, middle level", **LEAKY),
    Case("nnunet 320x8", "instance", (2, 320, 8, 8, 8), (2, 19, 5, 4, 5), f"{NNUNET}, bottleneck", **LEAKY),
    Case("vit-b", "layer", (64, 197, 768), (3, 7, 96), f"{VIT}-B/16, batch 64"),
    Case("vit-l", "layer", (64, 197, 1024), (2, 9, 128), f"{VIT}-L/16, batch 64"),
    Case("vit-b add", "layer", (64, 197, 768), (3, 5, 77), f"{VIT}-B/16, residual added", pre_add=True),
    Case("llama 2048", "rms", (2, 4096, 2048), (2, 11, 64), f"{LLAMA}, hidden 2048", pre_add=True),
    Case("qwen 3584", "rms", (2, 4096, 3584), (2, 9, 112), f"{LLAMA}, hidden 3584", pre_add=True),
    Case("llama 4096", "rms", (2, 4096, 4096), (2, 7, 128), f"{LLAMA}, hidden 4096", pre_add=True),
    Case("qwen 5120", "rms", (2, 4096, 5120), (2, 7, 160), f"{LLAMA}, hidden 5120", pre_add=True),
    Case("llama 8192", "rms", (1, 4096, 8192), (1, 9, 256), f"{LLAMA}, hidden 8192", pre_add=True),
    Case("llama 16384", "rms", (1, 4096, 16384), (1, 7, 500), f"{LLAMA}, hidden 16384", pre_add=True),
    Case("llama last", "rms", (2, 4096, 4096), (2, 5, 130), "Llama, norm before the head"),
    Case("head norm 64", "rms", (8, 32, 4096, 64), (2, 3, 9, 16), "query and key norm, head 64"),
    Case("head norm 128", "rms", (8, 32, 4096, 128), (2, 3, 7, 33), "Qwen3 query and key norm, head 128"),
    Case("dit adaln", "adaln", (32, 256, 1152), (3, 8, 72), "DiT-XL/2 AdaLN, scale and shift of each sample"),
    Case("long row 32768", "layer", (64, 32768), (3, 900), "64 rows of 32768"),
    Case("long row 131072", "layer", (16, 131072), (2, 1300), "16 rows of 131072"),
    Case("long row 262144", "rms", (8, 262144), (2, 1500), "8 rows of 262144"),
    Case("many long rows", "layer", (4096, 65536), (5, 1300), "4096 rows of 65536"),
    Case("four rows", "layer", (4, 1 << 24), (4, 1400), "4 rows of 16M"),
    Case("rows of 48", "layer", (1 << 21, 48), (45, 48), "2M rows of 48"),
    Case("rows of 1000", "layer", (16384, 1000), (9, 1000), "16384 rows of 1000"),
    Case("rows of 1001", "layer", (16384, 1001), (9, 1001), "16384 rows of 1001"),
    Case("rows of 14336", "rms", (2, 4096, 14336), (1, 5, 700), "8192 rows of 14336"),
    Case("layer2d 2048x14", "layer2d", (32, 2048, 14, 14), (2, 140, 3, 6), "LayerNorm2d over 2048 channels"),
    Case("channels 36", "batch", (32, 36, 112, 112), (3, 36, 6, 6), "BatchNorm of 36 channels", **RELU),
    Case("channels 100", "group", (8, 100, 64, 64), (2, 100, 5, 6), "5 channels a group", groups=20, **SILU),
    Case("odd planes", "batch", (64, 520, 13, 17), (3, 24, 5, 7), "BatchNorm of 13 x 17 planes"),
    Case("image batch", "batch", (5, 256, 32, 32), (5, 10, 6, 6), "5 feature maps, BatchNorm"),
    Case("image layer", "layer", (5, 256, 32, 32), (3, 10, 6, 6), "5 feature maps, LayerNorm over C, H, W", dims=3),
    Case("image instance", "instance", (5, 256, 32, 32), (5, 10, 6, 7), "5 feature maps, InstanceNorm"),
    Case("image group", "group", (5, 256, 32, 32), (3, 64, 5, 6), "5 feature maps, GroupNorm"),
)
# fmt: on

DOZEN = (
    "resnet 64x56 b256", "resnet 512x28 b32", "convnext 128x56", "unet 320x64", "unet 320x64 b16", "vae 512x128",
    "nnunet 32x128", "vit-b", "llama 4096", "head norm 128", "rows of 1001", "many long rows",
)  # fmt: skip
"""One of each kind: what ``python -m bench`` looks at where nobody says otherwise and nothing can be timed."""


def select(only: str | None) -> list[Case]:
    """Cases whose name, norm or origin contains the text."""
    text = (only or "").lower()
    return [case for case in CASES if text in f"{case.name} {case.norm} {case.origin}".lower()]
