"""Small ONNX models built by hand, and ONNX Runtime on the whole of one as the reference."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from sparsify_compiler.frontends.onnx import OnnxGraph

FLOAT, INT64, BOOL, STRING = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING
node = helper.make_node
Info = tuple[str, int, Sequence[int | str | None] | None]


def array(*shape: int, seed: int = 0) -> np.ndarray:
    """Normal float32 numbers, the same for the same arguments."""
    return np.random.default_rng((seed, *shape)).standard_normal(shape).astype(np.float32)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[Info],
    outputs: Sequence[Info],
    weights: Mapping[str, np.ndarray] | None = None,
    opset: int = 17,
    ir_version: int = 8,
    functions: Sequence[onnx.FunctionProto] = (),
    domains: Mapping[str, int] | None = None,
) -> onnx.ModelProto:
    """Put nodes and initialisers into a model; below IR version 4 initialisers are listed as inputs too."""
    tensors = [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()]
    infos = [helper.make_tensor_value_info(*each) for each in inputs]
    if ir_version < 4:
        infos += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
    graph = helper.make_graph(nodes, "g", infos, [helper.make_tensor_value_info(*each) for each in outputs], tensors)
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(*each) for each in (domains or {}).items())]
    return helper.make_model(graph, opset_imports=opsets, ir_version=ir_version, functions=list(functions))


def load(proto: onnx.ModelProto) -> OnnxGraph:
    """Read a model in memory as a graph."""
    return OnnxGraph(onnx_ir.from_proto(proto))


def reference(
    proto: onnx.ModelProto, batch: Mapping[str, Tensor], outputs: Sequence[str] | None = None
) -> list[Tensor]:
    """Run the whole model in ONNX Runtime without graph optimisation; `outputs` may name any value inside."""
    if outputs is not None:
        proto = onnx.ModelProto.FromString(proto.SerializeToString())
        known = {each.name for each in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs if name not in known)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    results = session.run(outputs, {name: value.numpy() for name, value in batch.items()})
    return [torch.from_numpy(np.asarray(result)) for result in results]


def scopes(each: onnx.NodeProto, *path: str) -> onnx.NodeProto:
    """Add the metadata of torch's exporter: the module paths from the root inwards, then the operation."""
    entry = each.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", repr(["", *path, "op"])
    return each
