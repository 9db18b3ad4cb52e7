"""Prune a torch module: trace, prune, copy the user's module with the pruned weights; then finish the copy."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from sparsify_compiler.batches import Batch, call, home
from sparsify_compiler.errors import DataError
from sparsify_compiler.evaluate import Forward
from sparsify_compiler.export.torch import PrunedSite
from sparsify_compiler.frontends.torch import TorchGraph, trace_module, trace_program
from sparsify_compiler.frontends.torch_run import dotted, move_constants
from sparsify_compiler.passes.batchnorm import batchnorm_layers, reestimate_batchnorm
from sparsify_compiler.passes.prune.layerwise import SiteOutcome
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.pruning import Normalisation, prune_graph
from sparsify_compiler.plan import Decision
from sparsify_compiler.precision import Precision, products


@dataclass(frozen=True)
class Pruned:
    """The pruned module before lowering, the `dense` one, and what was decided and found for its sites."""

    dense: nn.Module | ExportedProgram
    module: nn.Module
    graph: TorchGraph
    decisions: Sequence[Decision]
    outcomes: Mapping[str, SiteOutcome]
    sites: Mapping[str, PrunedSite]


def prune_torch(job: Job, model: nn.Module | ExportedProgram) -> Pruned:
    """Prune `model` as the job's recipe says; it is not modified itself. `finish_torch` does what is left to do.

    Rounds are compared as the module would be handed out: with BatchNorm statistics re-estimated after each of them,
    where that is wanted. [distill] trains around statistics re-estimated before it.

    Raises:
        SparsifyError: anything the user can act on.
    """
    device = job.options.torch_device()
    with job.stage("trace"):
        job.progress("trace", 0, 1)
        if isinstance(model, nn.Module):
            graph = trace_module(model, job.batches[0], device, job.options.precision)
        else:
            graph = trace_program(model, device, job.options.precision)
        job.progress("trace", 1, 1)
    if job.options.precision != "float32":
        _check_precision(job.options.precision, model)
        job.notes.append(f"products of the model ran in {job.options.precision} while it was calibrated and tuned")
    if graph.traced.how != "torch.export":
        job.notes.append(f"traced by {graph.traced.how}")
    normalisation = None
    if isinstance(model, nn.Module) and job.options.recalibrate_batchnorm and batchnorm_layers(model):
        normalisation = Normalisation(
            lambda: module_forward(_reestimated(job, model, graph), job.options.precision),
            lambda: _settle(job, model, graph),
        )
    decisions, outcomes = prune_graph(job, graph, normalisation)
    module = _copy(model, graph, outcomes)
    by_name = {site.name: site for site in graph.sites}
    rules = {d.site.name: d.rule for d in decisions if d.rule is not None}
    sites = {
        name: PrunedSite(by_name[name], str(rules[name].pattern), outcome.keep, graph.aliases(by_name[name]))
        for name, outcome in outcomes.items()
    }
    return Pruned(model, module, graph, decisions, outcomes, sites)


def _check_precision(precision: Precision, model: nn.Module | ExportedProgram) -> None:
    """Refuse weights that autocast does not multiply in another dtype, or that do not meet what it makes of them."""
    tensors = model.parameters() if isinstance(model, nn.Module) else model.state_dict.values()
    for dtype in {tensor.dtype for tensor in tensors if tensor.is_floating_point()}:
        if dtype not in (torch.float32, torch.bfloat16):
            raise DataError(
                f"precision {precision!r}: the model has weights of {dtype}; leave it out, or load as float32"
            )


def finish_torch(job: Job, pruned: Pruned) -> None:
    """Re-estimate the BatchNorm statistics of the pruned module where that is wanted, and cast it, in place."""
    _reestimate(job, pruned)
    pruned.module.to(job.options.torch_dtype())


def _reestimated(job: Job, model: nn.Module, graph: TorchGraph) -> nn.Module:
    """Return the module with the weights that the graph has now, its BatchNorm statistics those of the job's data."""
    module = _copy(model, graph, [site.name for site in graph.sites if site.refusal is None])
    reestimate_batchnorm(module, model, job.batches, _orders(graph), job.progress)
    return module


def _settle(job: Job, model: nn.Module, graph: TorchGraph) -> Forward:
    """Move the BatchNorm statistics of the graph as those of the module are, and return the module's forward."""
    module = _reestimated(job, model, graph)
    for name, layer in batchnorm_layers(module).items():
        for leaf in ("running_mean", "running_var"):
            graph.set_buffer(f"{name}.{leaf}", layer.get_buffer(leaf))
    return module_forward(module, job.options.precision)


def module_forward(module: nn.Module, precision: Precision = "float32") -> Forward:
    """Return `module`, in eval mode, as a function of batches that may lie elsewhere; products run in `precision`."""

    def forward(batch: Batch) -> tuple[Tensor, ...]:
        with torch.no_grad(), products(precision, home(module)):
            return call(module, batch)

    return forward


def _copy(model: nn.Module | ExportedProgram, graph: TorchGraph, outcomes: Iterable[str]) -> nn.Module:
    """Copy the user's module with the graph's new weights in it, not copied; the dense ones are left out."""
    if isinstance(model, ExportedProgram):
        return move_module(_unshare(graph.module), home(graph.module))
    by_name = {site.name: site for site in graph.sites}
    memo: dict[int, object] = {}
    for names in dict.fromkeys((*graph.reordered, *(graph.aliases(by_name[name]) for name in outcomes))):
        new: Tensor | None = None
        stood = graph.reordered.get(names)
        for name in names:
            old = dotted(model, name)
            if new is None and isinstance(old, nn.Parameter):
                new = nn.Parameter(dotted(graph.module, name).detach().to(old), requires_grad=old.requires_grad)
            elif new is None and stood is not None:  # a statistic: the dense one in its new order, whatever it is now
                new = old.index_select(0, stood.to(old.device))
            elif new is None:
                new = dotted(graph.module, name).detach().to(old, copy=True)
            memo[id(old)] = new
    copied = copy.deepcopy(model, memo)
    return copied.eval()


def move_module(module: nn.Module, device: torch.device) -> nn.Module:
    """Move a module, in place, with the devices that tracing wrote into a program's operations."""
    if isinstance(module, fx.GraphModule):
        move_constants(module, device)
    return module.to(device)


def _unshare(module: nn.Module) -> nn.Module:
    """Give a program's module, in place, Parameters of its own: a cast would write into the program's."""
    copies: dict[int, nn.Parameter] = {}
    for owner in module.modules():
        for name, old in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            if id(old) not in copies:
                copies[id(old)] = nn.Parameter(old.detach().clone(), requires_grad=old.requires_grad)
            setattr(owner, name, copies[id(old)])
    return module


def _reestimate(job: Job, pruned: Pruned) -> None:
    if not job.options.recalibrate_batchnorm or job.generated:
        return
    layers = 0
    if isinstance(pruned.dense, nn.Module):
        with job.stage("re-estimate BatchNorm"):
            orders = _orders(pruned.graph)
            layers = reestimate_batchnorm(pruned.module, pruned.dense, job.batches, orders, job.progress)
    if _folded_batchnorm(pruned.module):
        job.notes.append("BatchNorm statistics are constants of the traced program: they were not re-estimated")
    if layers:
        job.notes.append(
            f"the statistics of {layers} BatchNorm layers were re-estimated: moved by what pruning changed on the data"
        )


def _orders(graph: TorchGraph) -> dict[str, Tensor]:
    """Return by layer where the channels of a BatchNorm stood before they were put in another order."""
    found = {}
    for names, stood in graph.reordered.items():
        for layer, _, leaf in (name.rpartition(".") for name in names):
            if leaf == "running_mean" and stood is not None:
                found[layer] = stood
    return found


def _folded_batchnorm(module: nn.Module) -> bool:
    """Say whether a traced program normalises by statistics that are plain buffers, not a BatchNorm layer's."""
    nodes = module.graph.nodes if isinstance(module, fx.GraphModule) else ()
    return any("batch_norm" in str(node.target) for node in nodes)
