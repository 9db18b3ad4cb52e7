"""A piece of a traced model as a differentiable function of one weight."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparsify_compiler.graph import Site, Values


@dataclass(frozen=True)
class Slice:
    """The next recorded operations after one site, as a differentiable function of that site's weight.

    `inputs` names the values it reads besides the weight, `records` the values it returns, in execution order, the
    site's own output first. Get both from `TorchGraph.record`: inputs with the pruned weights, targets with the dense.
    """

    site: Site
    inputs: tuple[str, ...]
    records: tuple[str, ...]
    evaluate: Callable[[Tensor, Values], tuple[Tensor, ...]]

    def __call__(self, weight: Tensor, values: Values) -> tuple[Tensor, ...]:
        """Return the recorded outputs for `weight` (groups, out, in); supports jvp, vjp and double backward.

        Attention runs in its mathematical form: the fused kernels have no forward-mode or second derivative.
        """
        with sdpa_kernel(SDPBackend.MATH):
            return self.evaluate(weight, values)
