"""Run a graph by torch.export in float32 whatever its dtype, so that its rounding hides no difference."""

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import Argument, Target, map_aggregate
from torch.utils._pytree import tree_leaves

HALF = (torch.float16, torch.bfloat16)


class InFloat32(fx.Interpreter):
    """A `GraphModule` as it is, every tensor and every dtype of half precision taken as float32, on `device`.

    Weights are widened where they are read, one at a time; the module is not modified.
    """

    def __init__(self, module: fx.GraphModule, device: torch.device) -> None:
        super().__init__(module)
        self._device = device

    def outputs(self, *inputs: Any) -> tuple[Tensor, ...]:
        """Run on the inputs in the order of the placeholders, without gradients, and return the output tensors."""
        with torch.no_grad():
            found = self.run(*map(self._wide, inputs), enable_io_processing=False)
        return tuple(value for value in tree_leaves(found) if isinstance(value, Tensor))

    def run_node(self, n: fx.Node) -> Any:
        """Run one node, dtypes among its arguments widened."""
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return getattr(self, n.op)(n.target, map_aggregate(args, _wide_dtype), map_aggregate(kwargs, _wide_dtype))

    def get_attr(self, target: Target, args: tuple[Argument, ...], kwargs: dict[str, Any]) -> Any:
        """Read a weight, or a graph that an operation calls."""
        found = self.fetch_attr(str(target))
        return InFloat32(found, self._device).call if isinstance(found, fx.GraphModule) else self._wide(found)

    def call(self, *inputs: Any) -> Any:
        """Run as the graph of an operation."""
        return self.run(*inputs, enable_io_processing=False)

    def _wide(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self._device, torch.float32 if value.dtype in HALF else value.dtype)


def _wide_dtype(value: Any) -> Any:
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value
