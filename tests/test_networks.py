"""Models of transformers and diffusers, with random weights: taken over, they give the same; given back, they are the
same.  Each is skipped where its library is not installed (``pip install 'normops[models]'``)."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import normops
from tests.test_convert import near

WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
VOCABULARY = {"vocab_size": 64}
DECODER = {**WIDTH, **VOCABULARY, "num_key_value_heads": 2, "head_dim": 8}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
UNET = {"sample_size": 8, "block_out_channels": (16, 16), "layers_per_block": 1, "norm_num_groups": 4}


def words() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 64, (2, 5))}


def pictures(side: int) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"pixel_values": torch.randn(2, 3, side, side)}


# library, model, config, its arguments, inputs; norms of the model, and how many are fused
Network = tuple[str, str, str, dict[str, Any], Callable[[], dict[str, Any]], int, int]
NETWORKS: dict[str, Network] = {
    "llama": ("transformers", "LlamaForCausalLM", "LlamaConfig", DECODER, words, 5, 2),
    "mistral": ("transformers", "MistralForCausalLM", "MistralConfig", DECODER, words, 5, 2),
    "qwen3": ("transformers", "Qwen3ForCausalLM", "Qwen3Config", DECODER, words, 9, 2),
    "gemma": ("transformers", "GemmaForCausalLM", "GemmaConfig", DECODER, words, 5, 2),
    "gemma3": ("transformers", "Gemma3ForCausalLM", "Gemma3TextConfig", DECODER, words, 13, 2),
    "bert": ("transformers", "BertModel", "BertConfig", {**WIDTH, **VOCABULARY, **STILL}, words, 5, 5),
    "vit": ("transformers", "ViTModel", "ViTConfig", {**WIDTH, "image_size": 8, "patch_size": 4}, pictures(8), 5, 2),
    "t5": (
        "transformers", "T5EncoderModel", "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 64, "dropout_rate": 0.0},
        words, 5, 0,
    ),
    "convnext": (
        "transformers", "ConvNextModel", "ConvNextConfig", {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]},
        pictures(64), 9, 0,
    ),
    "resnet": (
        "transformers", "ResNetModel", "ResNetConfig",
        {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}, pictures(64), 16, 9,
    ),
    "unet": (
        "diffusers", "UNet2DModel", "",
        {**UNET, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
         "up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
        lambda: {"sample": torch.randn(1, 3, 8, 8), "timestep": 3}, 21, 17,
    ),
    "conditional unet": (
        "diffusers", "UNet2DConditionModel", "",
        {**UNET, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "cross_attention_dim": 16,
         "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"), "attention_head_dim": 8},
        lambda: {"sample": torch.randn(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(1, 5, 16)},
        33, 16,
    ),
    "vae": (
        "diffusers", "AutoencoderKL", "",
        {"block_out_channels": (16, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
         "up_block_types": ("UpDecoderBlock2D",) * 2, "norm_num_groups": 4},
        lambda: {"sample": torch.randn(1, 3, 8, 8)}, 24, 21,
    ),
    "dit": (
        "diffusers", "DiTTransformer2DModel", "",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 1, "sample_size": 4,
         "norm_num_groups": 4},
        lambda: {"hidden_states": torch.randn(2, 4, 4, 4), "timestep": torch.tensor([1, 2]),
                 "class_labels": torch.tensor([1, 2])}, 3, 0,
    ),
}  # fmt: skip


def built(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    library, model, config, arguments, inputs, *_ = NETWORKS[name]
    module = pytest.importorskip(library, reason=f"{library} is not installed: pip install 'normops[models]'")
    torch.manual_seed(1)
    made = getattr(module, model)
    return made(getattr(module, config)(**arguments)) if config else made(**arguments), inputs()


def output(model: torch.nn.Module, inputs: dict[str, Any]) -> Tensor:
    torch.manual_seed(2)  # of labels that are dropped
    found = model(**inputs)
    names = ("logits", "last_hidden_state", "sample")
    result: Tensor = next(getattr(found, name) for name in names if hasattr(found, name))
    return result


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name: str) -> None:
    """Outputs, gradients, buffers, and three steps of an optimiser; restored, types and results to the bit."""
    model, inputs = built(name)
    reference = copy.deepcopy(model)
    report = normops.report(normops.convert(model))
    assert (len(report), sum(bool(row.fused) for row in report)) == NETWORKS[name][-2:]
    assert all(row.now for row in report), report
    for training in (False, True):
        near([output(model.train(training), inputs)], [output(reference.train(training), inputs)], "output")
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, reference)]
    for _ in range(3):
        for m, optimiser in zip((model, reference), optimisers, strict=True):
            optimiser.zero_grad()
            output(m, inputs).square().mean().backward()
            optimiser.step()
    near(model.state_dict().values(), reference.state_dict().values(), "after three steps")
    normops.restore(model)
    reference.load_state_dict(model.state_dict())
    assert [type(m) for m in model.modules()] == [type(m) for m in reference.modules()]
    assert torch.equal(output(model.eval(), inputs), output(reference.eval(), inputs))
