"""The pruning methods: one file each, named here for recipes."""

from sparsify_compiler.passes.prune.alps import ALPS
from sparsify_compiler.passes.prune.iobs_layer import IOBS
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor

Method = Magnitude | Wanda | SparseGPT | ALPS | OBC | IOBS | WoodTaylor

METHODS: dict[str, type[Method]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
    "obc": OBC,
    "iobs": IOBS,
    "woodtaylor": WoodTaylor,
}
"""The words a recipe may write after `method =`."""
