"""The GEMV kernels' launches: they compile for every GPU generation and stay within what one holds."""

import pytest
import torch
from kernels import choose
from recorded import Launch, RecordingLauncher, build_log

from sparsify_compiler.kernel import Kernel
from sparsify_compiler.pattern import NM, Pattern, Unstructured
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.launch import CupyLauncher
from sparsify_compiler.runtime.launch_limits import MOST_PASSES, token_slices
from sparsify_compiler.runtime.nm.nm_gemv import NmGemv
from sparsify_compiler.runtime.unstructured.bitmap_gemv import BitmapGemv

needs_nvrtc = pytest.mark.skipif(CupyLauncher().unavailable() is not None, reason=str(CupyLauncher().unavailable()))


def record(pattern: Pattern, shape: tuple[int, int], tokens: int, dtype: torch.dtype, variant: str) -> Launch:
    recorder = RecordingLauncher()
    kernel: Kernel = NmGemv(launcher=recorder) if isinstance(pattern, NM) else BitmapGemv(launcher=recorder)
    weight = torch.randn(shape).to(dtype)
    packed = format_for(pattern).pack(weight, choose(pattern, weight, 0.8), pattern)
    prepared = kernel.prepare(packed, spec_for(packed, (tokens,)))
    prepared = type(prepared)(prepared.kernel, prepared.shape, prepared.tensors, f"1={variant}")
    kernel.run(prepared, torch.randn(tokens, shape[1]).to(dtype), None, "gelu")
    assert len(recorder.launches) == 1
    return recorder.launches[0]


@needs_nvrtc
@pytest.mark.parametrize(
    ("pattern", "tokens", "dtype", "variant", "capability"),
    [
        (NM(16, 32), 1, torch.float16, "warps8.split4.tokens1", (9, 0)),
        (NM(16, 32), 2, torch.bfloat16, "warps16.split1.tokens2", (8, 0)),
        (NM(1, 8), 4, torch.float16, "warps4.split1.tokens4", (8, 0)),
        (NM(31, 32), 8, torch.bfloat16, "warps8.split8.tokens8", (9, 0)),
        (Unstructured(), 1, torch.float16, "split4.tokens1", (9, 0)),
        (Unstructured(), 2, torch.bfloat16, "split1.tokens2", (8, 0)),
        (Unstructured(), 4, torch.float16, "split1.tokens4", (8, 9)),
        (Unstructured(), 8, torch.float16, "split8.tokens8", (9, 0)),
    ],
    ids=str,
)
def test_sources_compile(
    pattern: Pattern, tokens: int, dtype: torch.dtype, variant: str, capability: tuple[int, int]
) -> None:
    launch = record(pattern, (40, 2048), tokens, dtype, variant)
    assert launch.threads in (32, 64, 128, 256, 512)
    assert launch.grid[0] % dict(launch.program.defines)["SPLIT"] == 0
    build_log(launch.program, capability)


def test_shared_memory_stays_within_what_every_generation_has() -> None:
    limit = 99 * 1024  # of one block, capabilities 8.6 and 8.9; 8.0 and 9.0 have more
    for in_ in (4096, 14336, 40000):
        for tokens in (1, 2, 4, 8):
            assert (
                record(Unstructured(), (8, in_), tokens, torch.float16, f"split1.tokens{tokens}").shared_bytes <= limit
            )
    for warps in (4, 8, 16):
        assert record(NM(2, 4), (8, 4096), 8, torch.float16, f"warps{warps}.split1.tokens8").shared_bytes <= 48 * 1024


def test_more_tokens_than_a_grid_has_blocks_take_several_launches() -> None:
    assert list(token_slices(10, 4)) == [(0, 10)]
    most = 2 * MOST_PASSES
    assert list(token_slices(2 * most + 5, 2)) == [(0, most), (most, 2 * most), (2 * most, 2 * most + 5)]
