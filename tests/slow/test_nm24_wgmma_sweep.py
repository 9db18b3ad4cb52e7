"""Every shape that the sparse warpgroup kernels can be compiled for, over odd sizes, on the CPU."""

import dataclasses
import shutil
from typing import get_args

import pytest
import torch
from emulated import EmulatedLauncher
from kernels import choose

from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.formats import format_for, unpack
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.nm.nm24_shapes import CLUSTERS, ROW_TILES, SPLITS, TOKEN_TILES, Shape, Way
from sparsify_compiler.runtime.nm.nm24_wgmma import Nm24Wgmma
from sparsify_compiler.runtime.oracle import difference

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to run CUDA sources on the CPU"),
]

SHAPES = tuple(
    shape
    for way in get_args(Way)
    for rows in ROW_TILES
    for tokens in TOKEN_TILES
    for split in SPLITS
    for cluster in ((1,) if way == "few" else CLUSTERS)
    if (shape := Shape(way, rows, tokens, split, cluster)).possible
)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_possible_shape_equals_float64(shape: Shape) -> None:
    generator = torch.Generator().manual_seed(shape.rows + shape.tokens)
    dtype = torch.bfloat16 if shape.split % 2 else torch.float16
    for out, in_, tokens in ((shape.rows + 5, 325, shape.tokens + 1), (72, 960, max(shape.tokens - 3, 1))):
        weight = torch.randn(out, in_, generator=generator).to(dtype)
        packed = format_for(NM(2, 4)).pack(weight, choose(NM(2, 4), weight), NM(2, 4))
        x = torch.randn(tokens, in_, generator=generator).to(dtype)
        bias = torch.randn(out, generator=generator).to(dtype)
        kernel = Nm24Wgmma(launcher=EmulatedLauncher(seed=7))
        prepared = kernel.prepare(packed, spec_for(packed, (tokens,)))
        y = kernel.run(dataclasses.replace(prepared, variants=f"1={shape.name}"), x, bias, "relu")
        assert difference(y, x, unpack(packed), bias, "relu") is None, (out, in_, tokens)
