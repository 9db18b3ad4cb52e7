"""The baseline every other kernel must beat: unpack once, multiply densely."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.epilogue import activate
from sparsify_compiler.runtime.formats import unpack


@dataclass(frozen=True)
class Dense:
    """`torch.nn.functional.linear` on the unpacked weight. Always eligible."""

    name: str = "dense"

    def rejects(self, spec: MatmulSpec) -> str | None:
        """None: dense runs everything."""
        return None

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """One variant only."""
        return ("",)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Unpack to one (out, in) tensor of `spec.dtype` on `spec.device`."""
        return Prepared(self.name, packed.shape, (unpack(packed).to(spec.device, spec.dtype),))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in)."""
        return activate(functional.linear(x, prepared.tensors[0], bias), activation)
