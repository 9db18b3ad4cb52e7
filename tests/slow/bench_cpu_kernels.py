"""Print what the CPU kernels gain over dense, as the tuner measures it: cold weights, dense in the same rounds.

    OMP_NUM_THREADS=2 python tests/slow/bench_cpu_kernels.py [seconds a weight and token count, default 1]

One line a weight and token count: dense in microseconds, then every kernel with its variant and speed-up. A quiet
machine is needed; the load before and after is printed.
"""

import argparse
import os
import platform

import numba
import torch

from sparsify_compiler.pattern import Block, Pattern, Unstructured
from sparsify_compiler.runtime.benchmark.layers import random_layer
from sparsify_compiler.runtime.cpu.block_gather import BlockGather
from sparsify_compiler.runtime.cpu.csr import TorchCsr
from sparsify_compiler.runtime.cpu.numba_block import NumbaBlock
from sparsify_compiler.runtime.cpu.numba_csr import NumbaCsr
from sparsify_compiler.runtime.dense import Dense
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.tuning.tune import Budget, tune

SHAPES = ((1536, 576), (576, 1536), (4096, 4096))
PATTERNS: tuple[Pattern, ...] = (Unstructured(), Block(16, 16), Block(32, 32), Block(64, 64))


def main(seconds: float) -> None:
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, numba {numba.__version__}"
    print(f"{versions}, {torch.get_num_threads()} threads, load {os.getloadavg()}")
    for pattern in PATTERNS:
        for shape in SHAPES:
            for sparsity in (0.8, 0.9, 0.95):
                packed = random_layer(shape, pattern, sparsity, torch.float32, torch.device("cpu"))
                for tokens in (1, 16, 512):
                    kernels = (Dense(), TorchCsr(), NumbaCsr(), NumbaBlock(), BlockGather())
                    verdict = tune(packed, spec_for(packed, (tokens,)), kernels, budget=Budget(seconds, 7, 100))
                    rows = "  ".join(
                        f"{row.kernel}{f' {row.variant}' if row.variant else ''} {row.speedup:.2f} ±{row.spread:.0%}"
                        for row in verdict.timings
                    )
                    dense = verdict.timings[0].dense_us
                    print(
                        f"{pattern!s:>12} {shape[0]}x{shape[1]} {sparsity:.0%} {tokens:>3}  {dense:8.0f}  {rows}",
                        flush=True,
                    )
    print(f"load {os.getloadavg()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seconds", type=float, nargs="?", default=1.0, help="a weight and token count, default 1")
    main(parser.parse_args().seconds)
