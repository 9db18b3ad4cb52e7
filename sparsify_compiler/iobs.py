"""I-OBS as a solver: minimise any smooth loss over vectors of few non-zeros, with its steps, selectors and baselines.

The names here are public; they live in `passes/prune`. Weights are (problems, d) float64, on any device.
"""

from sparsify_compiler.passes.prune.hard_thresholding import IHT
from sparsify_compiler.passes.prune.iobs import IOBSStep, SparseSolution, Stop, Trace, minimise
from sparsify_compiler.passes.prune.iobs_bounds import Constants, constants_along
from sparsify_compiler.passes.prune.smooth import Differentiable, Quadratic, Smooth
from sparsify_compiler.passes.prune.support_admm import ADMM
from sparsify_compiler.passes.prune.support_search import GreedyOBS, SwapSearch
from sparsify_compiler.passes.prune.supports import ColumnSweep, DiagonalOBS, Exhaustive, Selector, TopK

__all__ = [
    "ADMM",
    "IHT",
    "ColumnSweep",
    "Constants",
    "DiagonalOBS",
    "Differentiable",
    "Exhaustive",
    "GreedyOBS",
    "IOBSStep",
    "Quadratic",
    "Selector",
    "Smooth",
    "SparseSolution",
    "Stop",
    "SwapSearch",
    "TopK",
    "Trace",
    "constants_along",
    "minimise",
]
