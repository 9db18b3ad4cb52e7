"""The block kernel for many tokens without a GPU: what it prepares, names and refuses; its kernels run and compiled."""

import dataclasses
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsify_compiler.kernel import MatmulSpec
from sparsify_compiler.pattern import NM, Block
from sparsify_compiler.runtime.block.many_tokens import MOST_ROWS, BlockTriton, bands_to_join
from sparsify_compiler.runtime.formats import BlockFormat, unpack
from sparsify_compiler.runtime.kernels import spec_for

ROOT = Path(__file__).resolve().parents[2]
KERNEL = BlockTriton()
H200 = MatmulSpec(14336, 4096, torch.float16, Block(128, 128), 0.1, (1, 8192), torch.device("cuda", 0), (9, 0))
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
def test_the_kernels_give_the_float64_result_in_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/interpreted/test_block_triton.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


def test_what_it_cannot_run_is_refused_in_words() -> None:
    assert "multiples of 16; found 8x16" in (KERNEL.rejects(dataclasses.replace(H200, pattern=Block(8, 16))) or "")
    assert "found 2:4" in (KERNEL.rejects(dataclasses.replace(H200, pattern=NM(2, 4))) or "")
    assert "found float32" in (KERNEL.rejects(dataclasses.replace(H200, dtype=torch.float32)) or "")
    assert "capability 8.0 or later; found 7.5" in (KERNEL.rejects(dataclasses.replace(H200, capability=(7, 5))) or "")
    assert "runs on cuda; found cpu" in (KERNEL.rejects(dataclasses.replace(H200, device=torch.device("cpu"))) or "")


def test_a_missing_triton_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install 'sparsify-compiler[cuda]'" in (KERNEL.rejects(H200) or "")
    assert all(".ptr." in name for name in KERNEL.variants(H200, 8192))


@needs_triton
@pytest.mark.parametrize("tokens", [1, 17, 130, 512, 1024, 8192])
def test_variants_fit_the_gpu_and_use_tensor_maps_only_where_it_has_them(tokens: int) -> None:
    hopper, ampere = (
        KERNEL.variants(H200, tokens),
        KERNEL.variants(dataclasses.replace(H200, capability=(8, 6)), tokens),
    )
    assert ".tma." in hopper[0]
    assert all(".ptr." in name for name in ampere)
    for names, limit in ((hopper, 227 * 1024), (ampere, 99 * 1024)):
        assert len(names) == len(set(names)) <= 14
        for name in names:
            tile, stages = re.match(r"tokens(\d+)\.warps\d+\.stages(\d+)", name).groups()  # type: ignore[union-attr]
            assert int(stages) * (int(tile) + MOST_ROWS) * 128 < limit
    narrow = KERNEL.variants(dataclasses.replace(H200, pattern=Block(32, 32)), tokens)
    assert all(".ptr." in name for name in narrow)


def test_bands_join_where_they_keep_the_same_columns_and_not_where_they_share_none() -> None:
    kept = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) < 0.1
    assert bands_to_join(kept.repeat_interleave(8, 0), 16) == 8
    assert bands_to_join(kept, 16) == 1
    assert bands_to_join(torch.ones_like(kept), 16) == 8
    assert bands_to_join(kept, 128) == 1


@pytest.mark.parametrize("pattern", [Block(16, 16), Block(48, 32), Block(128, 64), Block(256, 128)], ids=str)
def test_prepared_slabs_hold_the_weight(pattern: Block) -> None:
    tile_rows, tile_cols = -(-300 // pattern.rows), -(-200 // pattern.cols)
    tiles = torch.rand(tile_rows, tile_cols, generator=torch.Generator().manual_seed(1)) > 0.5
    packed = BlockFormat().pack(torch.randn(300, 200).half(), pattern.expand(tiles)[:300, :200], pattern)
    table, columns, values = KERNEL.prepare(packed, spec_for(packed, (1,))).tensors
    rows, parts = values.shape[1], columns.shape[1]
    width = 64 // parts
    found = torch.zeros(table.shape[0] * rows, 256, dtype=torch.float16)
    for start, steps, place, _ in table.tolist():
        for step in range(start, start + steps):
            for part in range(parts):
                column = int(columns[step, part]) * width
                piece = values[step, :, part * width : (part + 1) * width]
                found[place * rows : (place + 1) * rows, column : column + width] += piece
    assert torch.equal(found[:300, :200], unpack(packed))
    assert columns.shape[0] == int(table[:, 1].sum()) + 1  # one more, which the kernel reads ahead


def compiled(name: str, constants: dict[str, int], pointers: str, warps: int, stages: int) -> Any:
    """Compile a kernel for an H200 as its launch would: aligned addresses, `width` and `out` multiples of 16."""
    triton = importlib.import_module("triton")
    function = getattr(importlib.import_module("sparsify_compiler.runtime.block.triton_kernels"), name)
    maps = constants.get("DESCRIPTORS", 1)
    types = {"columns": "*i32", "table": "*i32", "bias": f"*{pointers}", "x": f"*{pointers}", "values": f"*{pointers}"}
    types["y"] = "*fp32" if constants.get("SPLIT", 1) > 1 else f"*{pointers}"
    if maps:
        types["x"] = f"tensordesc<{pointers}[{constants['TOKENS']},64]>"
        types["values"] = f"tensordesc<{pointers}[{constants['ROWS']},64]>"
    names = function.arg_names
    signature = {arg: "constexpr" if arg in constants else types.get(arg, "i32") for arg in names}
    aligned = ({"columns", "table", "bias", "y", "width", "out"} | (set() if maps else {"x", "values"})) & set(names)
    source = triton.compiler.ASTSource(
        fn=function,
        signature=signature,
        constexprs=constants,
        attrs={(names.index(arg),): [["tt.divisibility", 16]] for arg in aligned},
    )
    target = importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


@needs_triton
@pytest.mark.parametrize(
    ("name", "tokens", "rows", "parts", "maps", "warps", "stages", "element"),
    [
        ("block_product", 256, 128, 1, 1, 8, 4, "fp16"),
        ("block_product", 128, 128, 1, 0, 8, 3, "bf16"),
        ("block_product", 128, 32, 2, 0, 4, 4, "fp16"),
        ("block_product", 16, 128, 1, 1, 4, 4, "bf16"),
        ("block_stream", 256, 128, 1, 1, 8, 3, "fp16"),
        ("block_stream", 128, 128, 1, 1, 4, 3, "bf16"),
    ],
)
def test_the_kernels_compile_for_hopper_with_all_stages_and_without_spills(
    name: str,
    tokens: int,
    rows: int,
    parts: int,
    maps: int,
    warps: int,
    stages: int,
    element: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    constants = {"TOKENS": tokens, "ROWS": rows, "ACTIVATION": 1}
    if name == "block_product":
        constants |= {"PARTS": parts, "SPLIT": 1, "DESCRIPTORS": maps}
    kernel = compiled(name, constants, element, warps, stages)
    code = kernel.asm["ptx"]
    assert ("wgmma.mma_async" in code) == (tokens >= 64)  # a warpgroup multiplies 64 rows
    assert ("cp.async.bulk.tensor" in code) == bool(maps)
    narrow = re.findall(r"cp\.async\.c[ag]\.shared\.global .*?, (0x4|0x2|4|2)\b", code)
    assert narrow == [], "x and weights are copied 16 bytes at a time"
    buffers = stages if tokens >= 64 else stages - 1  # wgmma reads its operands in place, while the next are loaded
    assert kernel.metadata.shared >= buffers * (tokens + rows) * 128, "every stage has a buffer of its own"
    assert kernel.metadata.shared <= 227 * 1024
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    tool = Path(importlib.import_module("triton").__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([str(tool), "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:0 SHARED:\d+ LOCAL:0", usage), usage
