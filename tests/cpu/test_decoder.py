"""The decoder that the benchmark runs equals transformers' Llama, token by token through its cache."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from sparsify_compiler.errors import ModelError
from sparsify_compiler.runtime.benchmark.decoder import CONFIGS, Decoder, DecoderConfig, read_config

SMALL = DecoderConfig(32, 48, 2, 4, 2, 8, 50, 10000.0, 1e-5)


def linear(weight: torch.Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    made.weight.data = weight
    return made


def test_every_step_equals_llama_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=50,
        rms_norm_eps=1e-5,
    )
    torch.manual_seed(0)
    llama = transformers.LlamaForCausalLM(config).eval()
    parts = [
        {
            "qkv": torch.cat(
                [layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]
            ),
            "o": layer.self_attn.o_proj.weight,
            "gate_up": torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
            "down": layer.mlp.down_proj.weight,
        }
        for layer in llama.model.layers
    ]

    def weight(layer: int, name: str, shape: tuple[int, int]) -> nn.Module:
        assert parts[layer][name].shape == shape
        return linear(parts[layer][name].detach())

    embedding, head = llama.model.embed_tokens.weight.detach(), llama.lm_head.weight.detach()
    decoder = Decoder(SMALL, weight, embedding, head, batch=2, context=6)
    tokens = torch.randint(0, 50, (2, 6))
    with torch.no_grad():
        expected = llama(tokens).logits
        found = torch.stack([decoder(tokens[:, i], torch.tensor([i])) for i in range(6)], dim=1)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)  # float32, logits of size 1


def test_configs_are_known_by_name_and_read_from_files(tmp_path: Path) -> None:
    assert read_config("llama-3-8b").shapes()["gate_up"] == (28672, 4096)
    assert read_config("llama-3-8b").shapes()["qkv"] == (6144, 4096)
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "vocab_size": 49152,
                "rope_theta": 100000,
                "rms_norm_eps": 1e-5,
            }
        )
    )
    assert read_config(str(tmp_path)) == CONFIGS["smollm2-135m"]


@pytest.mark.parametrize("text", ["{}", "[]", "no json", '{"hidden_size": "x"}'])
def test_a_file_that_is_no_decoder_is_refused_with_the_names_there_are(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"llama-3-8b"):
        read_config(str(tmp_path / "config.json"))
    with pytest.raises(ModelError, match="no such name or file"):
        read_config("llama-9-900b")
