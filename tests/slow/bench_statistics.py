"""Cost of the statistics of one SmolLM2-sized decoder layer beside the linear layers they watch (pytest-benchmark).

The walk runs every linear layer twice, once to gather and once with the pruned weights, and gathers once: the cost of
statistics is the second figure over twice the first.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from sparsify_compiler.statistics import add_gram

pytestmark = pytest.mark.slow

TOKENS = 1024
LINEAR = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)]
"""(out, in) of q, k, v, o, gate, up and down."""
GATHERED = [576, 576, 576, 1536]
"""Widths of the distinct inputs: q/k/v share one, gate and up another."""


def inputs() -> dict[int, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {width: torch.randn(1, TOKENS, width, generator=generator) for width in (576, 1536)}


def test_the_linear_layers_of_one_decoder_layer(benchmark: Any) -> None:
    x = inputs()
    weights = [torch.randn(shape) for shape in LINEAR]
    benchmark(lambda: [torch.nn.functional.linear(x[weight.shape[1]], weight) for weight in weights])


def test_the_gram_matrices_of_their_inputs(benchmark: Any) -> None:
    x = inputs()
    totals = [torch.zeros(1, width, width, dtype=torch.float64) for width in GATHERED]
    benchmark(lambda: [add_gram(total, x[total.shape[1]]) for total in totals])
