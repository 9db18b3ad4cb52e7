"""The pruning methods: one file each, named here for recipes."""

from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.wanda import Wanda

METHODS: dict[str, type[Magnitude] | type[Wanda] | type[SparseGPT]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
}
"""The words a recipe may write after `method =`."""
