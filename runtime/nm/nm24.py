"""2:4 for few tokens: sparse tensor cores fed straight from memory (runtime/cuda/nm24.cu)."""

import functools
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.runtime.launch import CupyLauncher, Launcher, Program
from sparsify_compiler.runtime.nm.fragments import pack_fragments
from sparsify_compiler.runtime.nm.nm24_variants import HOPPER, Variant, first_variant, variant_named, variants_for
from sparsify_compiler.runtime.refusals import not_in, not_on, not_two_of_four, older_than
from sparsify_compiler.runtime.rows import HALF_DTYPES, aligned_rows, element_defines, round_up
from sparsify_compiler.runtime.variants import variant_for

OLDEST = (8, 0)


@dataclass(frozen=True)
class Nm24Mma:
    """2:4 (and 1:4, 1:2) weights as `mma.sp` reads them; made for 1 to 64 tokens, right for any number.

    `capability` stands for the device's own where there is no CUDA device, as in tests.
    """

    name: str = "nm24_mma"
    launcher: Launcher = field(default_factory=CupyLauncher)
    capability: tuple[int, int] = OLDEST

    def rejects(self, spec: MatmulSpec) -> str | None:
        """Say what this needs of the device, pattern, dtype and packages, or None."""
        reason = not_on(spec, "cuda") or not_two_of_four(spec) or not_in(spec, HALF_DTYPES)
        return reason or older_than(spec, OLDEST) or self.launcher.unavailable()

    def variants(self, spec: MatmulSpec, tokens: int) -> tuple[str, ...]:
        """Name up to 20 shapes of block, the predicted fastest first (runtime/nm/nm24_variants.py)."""
        found = variants_for(spec.out, spec.in_, tokens, spec.capability or self.capability)
        return tuple(variant.name for variant in found)

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        """Return the records of runtime/nm/fragments.py: (ceil(out / 16), ceil(in / 64), 576) of `spec.dtype`."""
        return Prepared(self.name, packed.shape, (pack_fragments(packed, spec.device, spec.dtype),))

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        """Return (tokens, out) for `x` (tokens, in) of the weight's dtype; float32 sums, rounded once.

        Raises:
            KernelError: x is of another dtype or width, or the tuned variant does not suit the device.
        """
        (records,), (out, in_) = prepared.tensors, prepared.shape
        if x.dtype != records.dtype or x.ndim != 2 or x.shape[1] != in_:
            raise KernelError(
                f"{self.name} holds a {records.dtype} weight ({out}, {in_}); "
                f"found x of {x.dtype} {tuple(x.shape)}, needs (tokens, {in_}) of the same dtype"
            )
        tokens = x.shape[0]
        y = x.new_empty(tokens, out)
        if y.numel() == 0:
            return y
        variant = self._variant(prepared, tokens, x.device)
        x = aligned_rows(x, round_up(in_, 8))
        if bias is not None:
            bias = bias.to(x.dtype).contiguous()
        self.launcher.launch(
            program_for(variant, x.dtype, activation),
            (-(-out // variant.rows) * -(-tokens // variant.tokens), variant.cluster, 1),
            variant.threads,
            variant.shared_bytes,
            (y, records, x, bias, out, x.shape[1], records.shape[1], tokens),
            x.device,
        )
        return y

    def _variant(self, prepared: Prepared, tokens: int, device: torch.device) -> Variant:
        capability = device_capability(device) or self.capability
        if not (name := variant_for(prepared.variants, tokens)):
            return first_variant(*prepared.shape, tokens, capability)
        variant = variant_named(name)
        if variant.cluster > 1 and capability < HOPPER:
            raise KernelError(
                f"{self.name} was tuned to {name}, whose clusters need compute capability 9.0; "
                f"this GPU has {capability[0]}.{capability[1]}; tune again on it"
            )
        return variant


@functools.lru_cache(maxsize=1024)
def program_for(variant: Variant, dtype: torch.dtype, activation: Activation | None) -> Program:
    """Return the function of nm24.cu that is built as `variant`."""
    shape = (
        (variant.kind.upper(), 1),
        ("TILES", variant.tiles),
        ("WARPS", variant.warps),
        ("STAGES", variant.stages),
        ("STEPS", variant.steps),
        ("TOKENS", variant.tokens),
        ("CLUSTER", variant.cluster),
        ("BLOCKS", variant.blocks),
    )
    return Program("nm24.cu", f"nm24_{variant.kind}", element_defines(dtype, activation) + shape)


@functools.lru_cache(maxsize=64)
def device_capability(device: torch.device) -> tuple[int, int] | None:
    """Return the CUDA compute capability of a device, or None for any other; asked once, as it is wanted per call."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return major, minor
