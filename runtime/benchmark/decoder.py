"""A decoder of the Llama family with a static cache: one token a call, made of parts that dense and sparse share.

It exists to measure: random weights, real shapes. Query, key and value are one product, gate and up another, as
serving engines do it, so that both the dense and the sparse side run their best shapes. The arithmetic is that of
`transformers.LlamaForCausalLM` (tests compare the two).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparsify_compiler.errors import ModelError


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a Llama-like decoder, in the words of its config.json."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    def shapes(self) -> dict[str, tuple[int, int]]:
        """Return the weight (out, in) of each linear layer of one decoder layer."""
        attention = self.heads * self.head_dim
        return {
            "qkv": (attention + 2 * self.kv_heads * self.head_dim, self.hidden),
            "o": (self.hidden, attention),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }


CONFIGS = {
    "llama-3-8b": DecoderConfig(4096, 14336, 32, 32, 8, 128, 128256, 500000.0),
    "llama-3.2-1b": DecoderConfig(2048, 8192, 16, 32, 8, 64, 128256, 500000.0),
    "llama-2-7b": DecoderConfig(4096, 11008, 32, 32, 32, 128, 32000),
    "smollm2-135m": DecoderConfig(576, 1536, 30, 9, 3, 64, 49152, 100000.0),
}


def read_config(reference: str) -> DecoderConfig:
    """Return the configuration called `reference`, or read it from a config.json of the Llama family.

    Raises:
        ModelError: no such name or file, or the file lacks the sizes of a Llama-like decoder.
    """
    if reference in CONFIGS:
        return CONFIGS[reference]
    path = Path(reference)
    path = path / "config.json" if path.is_dir() else path
    known = ", ".join(CONFIGS)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        heads = int(found["num_attention_heads"])
        hidden = int(found["hidden_size"])
        rope = found.get("rope_parameters") or {}
        return DecoderConfig(
            hidden=hidden,
            intermediate=int(found["intermediate_size"]),
            layers=int(found["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(found.get("num_key_value_heads") or heads),
            head_dim=int(found.get("head_dim") or hidden // heads),
            vocabulary=int(found["vocab_size"]),
            rope_theta=float(found.get("rope_theta") or rope.get("rope_theta") or 10000.0),
            norm_eps=float(found.get("rms_norm_eps") or 1e-5),
        )
    except OSError:
        raise ModelError(
            f"config {reference!r}: no such name or file; give {known}, or the config.json of a Llama-like model"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"config {reference!r}: not the config.json of a Llama-like decoder ({type(error).__name__}: {error}); "
            f"give {known}, or another file"
        ) from None


MakeLinear = Callable[[int, str, tuple[int, int]], nn.Module]
"""From layer number, name ("qkv", "o", "gate_up", "down") and (out, in) to the module that multiplies."""


class DecoderLayer(nn.Module):
    """Attention and feed-forward of one layer; `keys` and `values` are its cache, written in place."""

    keys: Tensor
    values: Tensor

    def __init__(
        self, config: DecoderConfig, linear: Callable[[str], nn.Module], batch: int, context: int, like: Tensor
    ) -> None:
        super().__init__()
        self.config = config
        self.qkv, self.o, self.gate_up, self.down = (linear(name) for name in ("qkv", "o", "gate_up", "down"))
        self.norm_attention = nn.Parameter(like.new_ones(config.hidden), requires_grad=False)
        self.norm_feedforward = nn.Parameter(like.new_ones(config.hidden), requires_grad=False)
        shape = (batch, config.kv_heads, context, config.head_dim)
        self.register_buffer("keys", like.new_zeros(shape), persistent=False)
        self.register_buffer("values", like.new_zeros(shape), persistent=False)

    def forward(self, x: Tensor, position: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """Return (batch, hidden) for `x` (batch, hidden) at `position` (1,) int64, and remember its key and value.

        `cos` and `sin` are (head_dim,) at that position, `mask` (1, context) bool is True where attention may look.
        """
        c = self.config
        normed = functional.rms_norm(x, (c.hidden,), self.norm_attention, c.norm_eps)
        heads = self.qkv(normed).view(x.shape[0], c.heads + 2 * c.kv_heads, c.head_dim)
        query, key, value = heads.split((c.heads, c.kv_heads, c.kv_heads), dim=1)
        self.keys.index_copy_(2, position, _rotate(key, cos, sin).unsqueeze(2))
        self.values.index_copy_(2, position, value.unsqueeze(2))
        attended = functional.scaled_dot_product_attention(
            _rotate(query, cos, sin).unsqueeze(2), self.keys, self.values, attn_mask=mask, enable_gqa=True
        )  # (batch, heads, 1, head_dim)
        x = x + self.o(attended.reshape(x.shape[0], c.heads * c.head_dim))
        normed = functional.rms_norm(x, (c.hidden,), self.norm_feedforward, c.norm_eps)
        gate, up = self.gate_up(normed).chunk(2, dim=-1)
        return x + self.down(functional.silu(gate) * up)  # type: ignore[no-any-return]


class Decoder(nn.Module):
    """`config.layers` layers between an embedding and a dense head. One call is one step of greedy decoding."""

    cos: Tensor
    sin: Tensor

    def __init__(
        self, config: DecoderConfig, linear: MakeLinear, embedding: Tensor, head: Tensor, batch: int, context: int
    ) -> None:
        """Build with weights from `linear`; `embedding` and `head` (vocabulary, hidden) give dtype and device."""
        super().__init__()
        self.config, self.context = config, context
        self.embedding = nn.Parameter(embedding, requires_grad=False)
        self.head = nn.Parameter(head, requires_grad=False)
        self.norm = nn.Parameter(head.new_ones(config.hidden), requires_grad=False)
        shapes = config.shapes()
        self.layers = nn.ModuleList(
            DecoderLayer(config, lambda name, i=index: linear(i, name, shapes[name]), batch, context, head)  # type: ignore[misc]
            for index in range(config.layers)
        )
        cos, sin = _rotation(config, context, head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Return logits (batch, vocabulary) for `tokens` (batch,) int64 at `position` (1,) int64 below `context`."""
        x = functional.embedding(tokens, self.embedding)
        cos, sin = self.cos.index_select(0, position)[0], self.sin.index_select(0, position)[0]
        mask = (torch.arange(self.context, device=tokens.device) <= position)[None]  # (1, context)
        for layer in self.layers:
            x = layer(x, position, cos, sin, mask)
        x = functional.rms_norm(x, (self.config.hidden,), self.norm, self.config.norm_eps)
        return functional.linear(x, self.head)


def _rotation(config: DecoderConfig, context: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cos and sin (context, head_dim) of rotary positions, the second half repeating the first."""
    powers = torch.arange(0, config.head_dim, 2, device=like.device).float() / config.head_dim
    angles = torch.arange(context, device=like.device).float()[:, None] / config.rope_theta**powers
    angles = torch.cat((angles, angles), dim=1)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` (batch, heads, head_dim): the halves of a head are the two coordinates of each plane."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
