"""Randomly initialised transformers models from their configurations, small enough for a CPU; factories for --trust."""

import torch
from torch import nn


def gpt2() -> nn.Module:
    """GPT-2 with two layers: Conv1D sites, a head tied to the embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=2, n_embd=128, n_head=4, vocab_size=500, n_positions=64, bos_token_id=0, eos_token_id=0)
    return _seeded(lambda: GPT2LMHeadModel(config))


def vit() -> nn.Module:
    """A vision transformer with two layers and a classifier."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256, image_size=32, patch_size=8
    )
    return _seeded(lambda: ViTForImageClassification(config))


def whisper_encoder() -> nn.Module:
    """The encoder of Whisper with two layers: two one-dimensional convolutions in front."""
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(
        d_model=128,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=256,
        num_mel_bins=20,
        max_source_positions=50,
        vocab_size=200,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    return _seeded(lambda: WhisperEncoder(config))


def resnet20() -> tuple[nn.Module, list[torch.Tensor]]:
    """ResNet20 trained on CIFAR-10, with inputs, which a plain module does not declare."""
    from tests.models.resnet20 import resnet20 as trained

    return trained(), _images(32)


def efficientnet_lite0() -> tuple[nn.Module, list[torch.Tensor]]:
    """EfficientNet-Lite0 trained on ImageNet, with inputs."""
    from tests.models.efficientnet_lite0 import efficientnet_lite0 as trained

    return trained(), _images(224)


def _images(side: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, side, side, generator=generator) for _ in range(2)]


def _seeded(build: "type[nn.Module] | object") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()  # type: ignore[operator, no-any-return]
