"""Put the kernels that an artefact names into the module that was rebuilt from it."""

import torch
from torch import nn

from sparsify_compiler.batches import home
from sparsify_compiler.export.torch import Artefact
from sparsify_compiler.passes.lower import Lowerable, lower, lowerable
from sparsify_compiler.pattern import parse_pattern
from sparsify_compiler.pipeline.environment import device_name
from sparsify_compiler.pipeline.tuning import Tuner
from sparsify_compiler.runtime.kernels import kernel_named


def put_kernels(module: nn.Module, artefact: Artefact) -> str:
    """Swap the sites whose sparse kernel won, in place, on the device they were measured on.

    Returns which of them stay dense, how many and why, in words; empty where none does.

    Raises:
        KernelError: the artefact names a kernel that this version has not.
    """
    sparse = [site for site in artefact.sites if site.kernel != "dense"]
    if not sparse:
        return ""
    for site in sparse:
        kernel_named(site.kernel)
    here = home(module)
    if artefact.device != device_name(here):
        return (
            f"all {len(sparse)} sites whose sparse kernel won run dense: they were measured on {artefact.device} and "
            f"the module is on {device_name(here)}; compile again there, or give a module on that device as into="
        )
    found = {site.site.name: lowerable(module, site.site, site.keep) for site in sparse}
    parts = {name: part for name, part in found.items() if not isinstance(part, str)}
    by_name = {site.site.name: site for site in sparse}
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    tuner = Tuner(artefact.tokens, dtype, here)
    chosen = {site.site.name: site.kernel for site in sparse if site.site.name in parts}

    def build(part: Lowerable, kernel: str) -> nn.Module:
        site = by_name[part.site.name]
        return tuner.build(part, parse_pattern(site.pattern), kernel, site.variants)

    lower(module, chosen, parts, build)
    refused = {name: part for name, part in found.items() if isinstance(part, str)}
    if not refused:
        return ""
    name, reason = next(iter(refused.items()))
    return f"{len(refused)} of {len(sparse)} sites whose sparse kernel won run dense; {name}: {reason}"
