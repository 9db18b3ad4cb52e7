"""From a torch module to one torch.fx graph: torch.export first, torch.fx.symbolic_trace second."""

import copy
import inspect
import operator
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_flatten

from sparsify_compiler.batches import Batch, call_arguments
from sparsify_compiler.errors import TraceError

TRACE_FAILURES = (
    RuntimeError,  # also torch._dynamo.exc.TorchDynamoException and torch.fx guard errors
    TypeError,
    ValueError,
    AttributeError,
    KeyError,
    IndexError,
    AssertionError,
    NotImplementedError,
    NameError,
)
"""What the two tracers raise on models they cannot follow; anything else is a bug and propagates."""


@dataclass(frozen=True)
class Traced:
    """A graph and how to call it.

    `positional` is the number of leading positional inputs, `keywords` the names of the rest, in placeholder order.
    `how` names the tracer in words; `dynamic` says whether batch sizes other than the example's may be given.
    `in_place` says that operations may write into the values they read.
    """

    graph_module: fx.GraphModule
    positional: int
    keywords: tuple[str, ...]
    how: str
    dynamic: bool
    in_place: bool = False


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode and restore each one's own mode afterwards."""
    modes = [(sub, sub.training) for sub in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for sub, mode in modes:
            sub.training = mode


@contextmanager
def inference(module: nn.Module) -> Iterator[None]:
    """Run `module` in eval mode without gradients. A saved program has the one mode it was exported in."""
    mode = nullcontext() if isinstance(module, fx.GraphModule) else evaluating(module)
    with mode, torch.no_grad():
        yield


def trace(module: nn.Module, batch: Batch) -> Traced:
    """Trace `module` in eval mode on an example `batch`. The module is not modified.

    Raises:
        TraceError: neither tracer could follow the model; names the operation and the line of the model's source.
    """
    args, kwargs = call_arguments(module, batch)
    with evaluating(module):
        try:
            return _export(module, args, kwargs)
        except TRACE_FAILURES as error:
            export_error = error
        try:
            return _symbolic(module, args, kwargs)
        except TRACE_FAILURES as error:
            raise TraceError(
                f"{type(module).__name__} cannot be traced: torch.export failed with {_explain(export_error)}; "
                f"torch.fx.symbolic_trace failed with {_explain(error)}; rewrite the operation without data-dependent "
                "Python control flow, or export the model to ONNX yourself and compile that file"
            ) from export_error


def from_program(program: ExportedProgram) -> Traced:
    """Take the graph of a saved torch.export program."""
    graph_module = _functional(program).module()
    args_spec, kwargs_spec = program.call_spec.in_spec.children()
    keywords = tuple(kwargs_spec.context or ())
    if args_spec.num_leaves != args_spec.num_children:
        raise TraceError("the program's positional inputs are nested; export the model with plain tensor inputs")
    return Traced(_clean(graph_module), args_spec.num_leaves, keywords, "torch.export program", dynamic=True)


def export_program(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[ExportedProgram, bool]:
    """Export `module`, in the mode it is in, with free sizes where it allows them, else with the example's own.

    Returns the program, and whether axis 0 of every tensor input may have another size than the example's. Free are,
    where the module allows it, axis 0 and the length of token ids and masks.

    Raises:
        TRACE_FAILURES: torch.export cannot follow the module.
    """
    grown = _grow((args, kwargs))
    first_error: BaseException | None = None
    for kind in (Dim.DYNAMIC, Dim.AUTO, None):
        example = (args, kwargs) if kind is None else grown
        shapes = None if kind is None else _dynamic_shapes(module, example, kind)
        try:
            with torch.no_grad():
                program = torch.export.export(module, example[0], example[1], dynamic_shapes=shapes)
        except TRACE_FAILURES as error:
            first_error = first_error or error
            continue
        free = kind is not None and _batch_is_free(program)
        if kind is Dim.AUTO and not free and example[0] is not args:
            continue  # the model fixed the size of the grown batch, which is not the caller's
        return program, free
    assert first_error is not None
    raise first_error


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    program, free = export_program(module, args, kwargs)
    how = "torch.export" if free else "torch.export with fixed sizes"
    return Traced(_clean(_functional(program).module()), len(args), tuple(kwargs), how, dynamic=free)


def _symbolic(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Traced:
    concrete = {name: value for name, value in kwargs.items() if not isinstance(value, Tensor)}
    # The graph calls the leaf modules that it is given: copies, so that weights are not replaced in the user's own.
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    graph_module = fx.symbolic_trace(copy.deepcopy(module, tensors), concrete_args=concrete or None)
    graph_module.graph.eliminate_dead_code()
    names = [node.name for node in graph_module.graph.nodes if node.op == "placeholder"]
    keywords = tuple(name for name in kwargs if name in names)
    for node in list(graph_module.graph.nodes):  # forward arguments that were left at their defaults
        if node.op == "placeholder" and node.name in names[len(args) :] and node.name not in keywords:
            if node.users:
                raise ValueError(f"forward argument {node.name!r} has no value in the batch")
            graph_module.graph.erase_node(node)
    return Traced(graph_module, len(args), keywords, "torch.fx.symbolic_trace", dynamic=True, in_place=True)


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Return the program without operations that write into what they read: segments are run more than once."""
    for graph_module in program.graph_module.modules():
        if isinstance(graph_module, fx.GraphModule) and any(_writes(node) for node in graph_module.graph.nodes):
            with warnings.catch_warnings():  # torch warns of itself
                warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated", category=FutureWarning)
                functional: ExportedProgram = program.run_decompositions({})
            return functional
    return program


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def input_tensors(program: ExportedProgram) -> list[Tensor]:
    """List what tracing knows of the program's tensor inputs, in order: fake tensors with sizes fixed or free."""
    inputs = set(program.graph_signature.user_inputs)
    values = [node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder" and node.name in inputs]
    return [value for value in values if isinstance(value, Tensor)]


def _batch_is_free(program: ExportedProgram) -> bool:
    """Say whether axis 0 of every tensor input may have another size than the example's."""
    return all(fixed_size(value.shape[0]) is None for value in input_tensors(program) if value.dim())


def fixed_size(size: int | torch.SymInt) -> int | None:
    """Return the one length that tracing allows an axis, or None where it is free."""
    fixed: int | None = size.node.maybe_as_int() if isinstance(size, torch.SymInt) else size
    return fixed


def _clean(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Drop guards and assertions on sizes and devices, writes to inputs and buffers, and what nothing reads."""
    graph = graph_module.graph
    asserts = {"_guards_fn"}
    for node in reversed(list(graph.nodes)):
        if node.users:
            continue
        named = str(node.target)
        if named in asserts or "_assert" in named or "sym_constrain_range" in named or named == "aten.copy_.default":
            graph.erase_node(node)
    _restore_batch_norm(graph)
    graph.eliminate_dead_code()
    return graph_module


def _restore_batch_norm(graph: fx.Graph) -> None:
    """Write what `_functional` made of a BatchNorm in eval mode as the one operation it was."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._native_batch_norm_legit_no_training.default:
            *tensors, momentum, epsilon = node.args
            with graph.inserting_before(node):
                whole = graph.call_function(
                    torch.ops.aten.batch_norm.default, (*tensors, False, momentum, epsilon, False)
                )
            for user in list(node.users):
                assert user.target is operator.getitem
                whole.meta = dict(user.meta)
                user.replace_all_uses_with(whole)
                graph.erase_node(user)
            graph.erase_node(node)


def _grow(tree: tuple[tuple[Any, ...], dict[str, Any]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Repeat a batch of one, because torch.export takes a size of one for a constant."""
    leaves = [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor) and leaf.dim()]
    if not leaves or any(leaf.shape[0] != 1 for leaf in leaves):
        return tree
    args, kwargs = tree
    return (
        tuple(_twice(value) for value in args),
        {name: _twice(value) for name, value in kwargs.items()},
    )


def _twice(value: Any) -> Any:
    return value.repeat(2, *[1] * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value


def _dynamic_shapes(module: nn.Module, example: tuple[tuple[Any, ...], dict[str, Any]], kind: Any) -> Any:
    def free(value: Any) -> Any:
        if isinstance(value, tuple):  # *args
            return tuple(map(free, value))
        if isinstance(value, dict):  # **kwargs
            return {name: free(entry) for name, entry in value.items()}
        if not isinstance(value, Tensor) or not value.dim():
            return None
        return dict.fromkeys((0, 1) if is_text(value) else (0,), kind)

    args, kwargs = example
    bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    return {name: free(value) for name, value in bound.arguments.items()}


def is_text(value: Tensor) -> bool:
    """Say whether a tensor is (samples, length) of integers or booleans: token ids, or a mask over them."""
    return value.dim() == 2 and not value.is_floating_point()


def _explain(error: BaseException) -> str:
    """Name the error, its first line, and the model's own source line, not torch's."""
    text = str(error).strip().splitlines()
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if "torch" not in Path(frame.filename).parts and "sparsify_compiler" not in Path(frame.filename).parts
    ]
    where = f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""
    return f"{type(error).__name__}: {text[0] if text else 'no message'}{where}"
