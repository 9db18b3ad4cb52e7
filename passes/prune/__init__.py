"""The pruning methods: one file each, named here for recipes."""

from sparsify_compiler.passes.prune.alps import ALPS
from sparsify_compiler.passes.prune.iobs_layer import IOBS
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.wanda import Wanda

METHODS: dict[str, type[Magnitude] | type[Wanda] | type[SparseGPT] | type[ALPS] | type[OBC] | type[IOBS]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "alps": ALPS,
    "obc": OBC,
    "iobs": IOBS,
}
"""The words a recipe may write after `method =`."""
