from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
import torch

from sparsify_compiler.errors import ExportError
from sparsify_compiler.export.onnx_bodies import DOMAIN, DOMAIN_VERSION, make_attributes, make_function, operator_name
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.formats import format_for, packed_tensors

# Up to the newest opset that this ONNX Runtime implements officially.
OPSETS = (11, 12, 14, 15, 18, 23)
LAYOUTS: Mapping[str, Pattern] = {"nm": NM(2, 4), "bitmap": Unstructured(), "block": Block(4, 3)}
UNPACKING = {"CumSum", "GatherElements", "Gather", "Concat", "Expand", "Slice"}


def make_case(
    layout: str, opset: int, dtype: np.dtype, product: bool, shape: tuple[int, int] = (13, 22), native: tuple = ()
) -> tuple[onnx_ir.Model, np.ndarray]:
    """A one-node model, and the dense weight (out, in) found with NumPy from the same mask."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(shape, generator=generator).to(torch.from_numpy(np.zeros(1, dtype)).dtype)
    pattern = LAYOUTS[layout]
    if layout == "block":  # tiles that do not divide the weight: expand a coarse mask by hand
        tiles = torch.rand(-(-shape[0] // 4), -(-shape[1] // 3), generator=generator) < 0.4
        keep = Block(4, 3).expand(tiles)[: shape[0], : shape[1]]
    else:
        keep = pattern.select(weight.abs().float(), 0.7)
    packed = format_for(pattern).pack(weight, keep, pattern)
    assert packed.layout == layout
    values = [
        onnx_ir.Value(name=name, const_value=onnx_ir.tensor(packed.tensors[name].numpy(), name=name))
        for name in packed_tensors(layout)
    ]
    ir_dtype = onnx_ir.DataType.from_numpy(np.dtype(dtype))
    x = onnx_ir.val("x", ir_dtype, ["n", shape[1]])
    native_shape, perm = native or ((), ())
    attributes = make_attributes(layout, opset, ir_dtype, shape, native_shape or None, perm or None)
    name = operator_name(layout, product)
    inputs = [x, *values] if product else list(values)
    y = onnx_ir.val("y", ir_dtype, ["a", "b", "c", "d"][: 2 if product else len(native_shape)])
    nodes = [onnx_ir.Node(DOMAIN, name, inputs, attributes, outputs=[y])]
    graph = onnx_ir.Graph(
        [x], [y], nodes=nodes, initializers=values, opset_imports={"": opset, DOMAIN: DOMAIN_VERSION}, name="case"
    )
    function = make_function(layout, product, opset)
    model = onnx_ir.Model(graph, ir_version=8, functions=[function])
    return model, (weight * keep).numpy()


def run(model: onnx_ir.Model, x: np.ndarray, optimised: str | None = None) -> np.ndarray:
    proto = onnx_ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if optimised:
        options.optimized_model_filepath = optimised
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.float64])
def test_the_weight_body_returns_exactly_the_packed_weight(layout, opset, dtype):
    out, in_ = 13, 22
    model, weight = make_case(layout, opset, dtype, product=False, native=((out, in_), (0, 1)))
    found = run(model, np.zeros((1, in_), dtype))
    assert found.dtype == dtype
    assert np.array_equal(found, weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_the_product_body_multiplies_by_the_transposed_weight(layout, opset, dtype):
    model, weight = make_case(layout, opset, dtype, product=True)
    x = np.random.default_rng(3).standard_normal((5, 22)).astype(dtype)
    # Float32 sums of 22 products round in another order; float16 results are rounded to 2^-11.
    tolerance = 1e-5 if dtype == np.float32 else 4e-3
    expected = x.astype(np.float64) @ weight.astype(np.float64).T
    assert np.abs(run(model, x).astype(np.float64) - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 4), (4, 8), (5, 9), (16, 17), (3, 64), (9, 6)])
def test_sides_that_fill_no_byte_and_no_tile_unpack_exactly(layout, shape):
    model, weight = make_case(layout, 18, np.float32, product=False, shape=shape, native=(shape, (1, 0)))
    assert np.array_equal(run(model, np.zeros((1, shape[1]), np.float32)), weight.T)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_convolution_weight_comes_back_in_its_own_order(layout):
    # 13 output channels, 2 x 3 taps of 4 input channels, columns tap by tap.
    native = ((13, 2, 3, 4), (0, 3, 1, 2))
    model, weight = make_case(layout, 17, np.float32, product=False, shape=(13, 24), native=native)
    expected = weight.reshape(13, 2, 3, 4).transpose(0, 3, 1, 2)
    assert np.array_equal(run(model, np.zeros((1, 24), np.float32)), expected)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("opset", [11, 13, 18])
def test_onnx_runtime_folds_the_body_to_a_plain_product(layout, dtype, opset, tmp_path):
    model, _ = make_case(layout, opset, dtype, product=True)
    file = str(tmp_path / "optimised.onnx")
    run(model, np.zeros((2, 22), dtype), optimised=file)
    nodes = onnx.load(file).graph.node
    assert not {node.op_type for node in nodes} & UNPACKING
    assert not [node for node in nodes if node.domain == DOMAIN]
    # Float16 products run as float32 between casts on a CPU.
    assert {node.op_type for node in nodes} <= {"MatMul", "FusedMatMul", "Gemm", "Cast"}


@pytest.mark.parametrize("layout", ["bitmap", "block"])
def test_a_weight_that_keeps_nothing_unpacks_to_zeros(layout):
    pattern = LAYOUTS[layout]
    packed = format_for(pattern).pack(torch.ones(8, 12), torch.zeros(8, 12, dtype=torch.bool), pattern)
    model, _ = make_case(layout, 18, np.float32, product=False, shape=(8, 12), native=((8, 12), (0, 1)))
    for name, tensor in packed.tensors.items():
        model.graph.initializers[name].const_value = onnx_ir.tensor(tensor.numpy(), name=name)
    assert np.array_equal(run(model, np.zeros((1, 12), np.float32)), np.zeros((8, 12), np.float32))


def test_an_opset_below_eleven_is_refused():
    with pytest.raises(ExportError, match="needs opset 11; found 10"):
        make_function("nm", True, 10)
