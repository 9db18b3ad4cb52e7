"""SparseLinear and the operator behind it: values, gradients, state, moves, autocast, torch.compile, torch.export."""

import copy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from kernels import KERNELS, accepted, choose, skip_without_mkl
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from sparsify_compiler.errors import FallbackWarning, KernelError
from sparsify_compiler.kernel import Packed
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.layers.custom_op import sparse_linear
from sparsify_compiler.runtime.layers.modules import Running, SparseLinear
from sparsify_compiler.runtime.oracle import difference

PATTERNS: tuple[Pattern, ...] = (Unstructured(), NM(2, 4), Block(4, 4))
CPU = torch.device("cpu")
RUNS = {kernel.name: [p for p in accepted(kernel, CPU, (torch.float32,)) if p in PATTERNS] for kernel in KERNELS}
NAMES = [name for name, patterns in RUNS.items() if patterns]
NAMES_IN_FLOAT64 = [kernel.name for kernel in KERNELS if accepted(kernel, CPU, (torch.float64,))]
on_patterns = pytest.mark.parametrize(
    ("kernel", "pattern"), [(n, p) for n, found in RUNS.items() for p in found], ids=str
)


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Compiled code is cached by function and counted against a limit over the whole process."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer(
    kernel: str = "torch_csr",
    pattern: Pattern | None = None,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> tuple[SparseLinear, nn.Linear]:
    """A sparse layer of 16 inputs and 24 outputs, and the dense one that it must equal. Without a pattern: 2:4."""
    skip_without_mkl(kernel)
    if pattern is None:
        pattern = PATTERNS[2] if "block" in kernel else PATTERNS[1]
    torch.manual_seed(0)
    dense = nn.Linear(16, 24, bias=bias, dtype=dtype)
    keep = choose(pattern, dense.weight.detach())
    sparse = SparseLinear.from_dense(dense.weight, keep, pattern, dense.bias, kernel)
    dense.weight.data *= keep
    return sparse, dense


def close(y: torch.Tensor, x: torch.Tensor, dense: nn.Linear) -> bool:
    flat = y.detach().reshape(-1, 24), x.detach().reshape(-1, 16)
    bias = None if dense.bias is None else dense.bias.detach()
    return difference(*flat, dense.weight.detach(), bias) is None


@on_patterns
def test_a_sparse_layer_equals_the_dense_one_for_any_leading_shape_and_strides(kernel: str, pattern: Pattern) -> None:
    sparse, dense = layer(kernel, pattern)
    inputs = [
        torch.randn(16),
        torch.randn(5, 16),
        torch.randn(2, 3, 4, 16),
        torch.randn(0, 16),
        torch.randn(3, 0, 16),
        torch.randn(16, 7).T,
        torch.randn(4, 3, 32)[:, 1:, ::2],
        torch.randn(16).expand(6, 2, 16),
    ]
    for x in inputs:
        y = sparse(x)
        assert y.shape == (*x.shape[:-1], 24)
        assert close(y, x, dense)


@pytest.mark.parametrize("kernel", NAMES)
def test_inference_without_gradients_gives_the_same_bits(kernel: str) -> None:
    sparse, _ = layer(kernel)
    x = torch.randn(2, 3, 16)
    with torch.no_grad():
        plain = sparse(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(sparse(x), plain.bfloat16())
    assert torch.equal(plain, sparse(x))
    with torch.inference_mode():
        assert torch.equal(sparse(x), plain)


@pytest.mark.parametrize("kernel", NAMES_IN_FLOAT64)
def test_gradients_of_input_and_bias_are_those_of_the_dense_layer(kernel: str) -> None:
    sparse, dense = layer(kernel, dtype=torch.float64)
    x = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, 24, dtype=torch.float64)
    found = torch.autograd.grad((sparse(x) * weights).sum(), (x, sparse.bias))
    expected = torch.autograd.grad((dense(x) * weights).sum(), (x, dense.bias))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=0, atol=1e-13)  # sums of 24 float64 terms of size 1


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("kernel", NAMES_IN_FLOAT64)
def test_gradients_through_the_activation_agree_with_finite_differences(kernel: str, activation: str) -> None:
    sparse, _ = layer(kernel, dtype=torch.float64)
    tensors = [getattr(sparse, name) for name in sparse._prepared]
    x = torch.randn(1, 16, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: sparse_linear(x, tensors, b, kernel, 24, activation), (x, bias))


@pytest.mark.parametrize("kernel", NAMES)
def test_the_operator_passes_pytorchs_own_checks(kernel: str) -> None:
    sparse, _ = layer(kernel)
    tensors = [getattr(sparse, name) for name in sparse._prepared]
    for bias, activation in ((sparse.bias, None), (None, "relu")):
        x = torch.randn(3, 16, requires_grad=True)
        torch.library.opcheck(sparse_linear, (x, tensors, bias, kernel, 24, activation))


@on_patterns
def test_the_state_round_trips_through_safetensors(kernel: str, pattern: Pattern, tmp_path: Path) -> None:
    sparse, dense = layer(kernel, pattern)
    save_file(sparse.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    assert set(state) == {*sparse.packed.tensors, "bias"}
    tensors = {name: state[name] for name in sparse.packed.tensors}
    packed = Packed(sparse.layout, sparse.pattern, (24, 16), tensors)
    again = SparseLinear(packed, state["bias"], kernel, sparse.tokens)
    x = torch.randn(4, 16)
    assert torch.equal(again(x), sparse(x))
    assert close(again(x), x, dense)


@pytest.mark.parametrize("kernel", NAMES)
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_prepares_the_kernel_again(kernel: str, assign: bool) -> None:
    sparse, dense = layer(kernel)
    other = copy.deepcopy(sparse)
    other.values.zero_()
    other.prepare()
    x = torch.randn(4, 16)
    assert torch.equal(other(x), other.bias.expand(4, 24))
    nn.Sequential(other).load_state_dict({f"0.{name}": t for name, t in sparse.state_dict().items()}, assign=assign)
    assert close(other(x), x, dense)


def test_a_layer_on_the_meta_device_runs_once_its_data_is_assigned() -> None:
    sparse, dense = layer()
    empty = copy.deepcopy(sparse).to("meta")
    with pytest.raises(KernelError, match="no data yet"):
        empty(torch.randn(1, 16))
    empty.load_state_dict(sparse.state_dict(), assign=True)
    x = torch.randn(4, 16)
    assert close(empty(x), x, dense)


def test_a_moved_layer_is_prepared_again_and_runs_dense_with_a_warning_where_its_kernel_cannot() -> None:
    sparse, dense = layer("torch_csr")
    x = torch.randn(4, 16)
    assert close(sparse.double()(x.double()), x.double(), dense.double())
    with pytest.warns(
        FallbackWarning, match=r"'torch_csr' cannot run 2:4 torch.float16 on cpu: runs float32 and float64"
    ) as seen:
        half = sparse.half()
    assert len(seen) == 1
    assert half.running == Running("dense", half.running.reason)
    assert "found float16" in half.running.reason
    assert "kernel=torch_csr, running=dense (kernel 'torch_csr' cannot run" in repr(half)
    with torch.no_grad():
        assert close(half(x.half()), x.half(), dense.half())
    assert [name for name, _ in half.named_buffers() if name.startswith("prepared")] == ["prepared_0"]
    back = half.float()  # and takes its kernel up again, without a word
    assert back.running == Running("torch_csr")
    assert "running" not in repr(back)
    assert close(back(x), x, dense.float())


def test_a_deep_copy_shares_nothing() -> None:
    sparse, _ = layer()
    twin = copy.deepcopy(sparse)
    own = {t.untyped_storage().data_ptr() for t in (*sparse.buffers(), *sparse.parameters())}
    assert not own & {t.untyped_storage().data_ptr() for t in (*twin.buffers(), *twin.parameters())}


def test_from_dense_leaves_its_inputs_alone() -> None:
    weight, keep, bias = torch.randn(8, 8), torch.ones(8, 8, dtype=torch.bool), torch.randn(8)
    before = weight.clone(), bias.clone()
    sparse = SparseLinear.from_dense(weight, keep, Unstructured(), bias)
    sparse.bias.data.zero_()
    sparse.values.zero_()
    assert torch.equal(weight, before[0])
    assert torch.equal(bias, before[1])


@pytest.mark.parametrize("kernel", NAMES)
def test_autocast_runs_the_weights_own_dtype_and_returns_the_autocast_dtype(kernel: str) -> None:
    sparse, dense = layer(kernel)
    x = torch.randn(4, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = sparse(x)
        after = sparse(x.bfloat16())
    assert y.dtype == after.dtype == torch.bfloat16
    assert torch.equal(y, sparse(x).bfloat16())  # float32 inside, rounded once
    assert torch.equal(after, sparse(x.bfloat16().float()).bfloat16())
    assert close(sparse(x), x, dense)


@pytest.mark.parametrize("kernel", NAMES)
def test_torch_compile_takes_the_whole_layer_without_a_break(kernel: str, fresh_dynamo: None) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = layer(kernel)[0], nn.Linear(24, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(functional.silu(self.first(x)))

    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 5):
        x = torch.randn(2, rows, 16, requires_grad=True)
        y = compiled(x)
        torch.testing.assert_close(y, net(x), rtol=0, atol=0)  # the same operators in the same order
        (grad,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(grad, torch.autograd.grad(net(x).sum(), x)[0], rtol=1e-5, atol=1e-6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert compiled(torch.randn(2, 3, 16)).dtype == torch.bfloat16


@pytest.mark.skipif(sys.platform != "linux", reason="inductor needs a C++ compiler on this platform")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor imports deprecated parts of PyTorch itself
def test_inductor_compiles_the_layer(fresh_dynamo: None) -> None:
    sparse, dense = layer()
    x = torch.randn(6, 16)
    try:
        y = torch.compile(sparse, fullgraph=True)(x)
    except torch._inductor.exc.InvalidCxxCompiler:
        pytest.skip("inductor found no C++ compiler")
    assert close(y, x, dense)


@pytest.mark.parametrize("kernel", NAMES)
def test_torch_export_keeps_one_operator_and_dynamic_sizes(kernel: str) -> None:
    sparse, dense = layer(kernel)
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(sparse, (torch.randn(2, 3, 16),), dynamic_shapes=({0: batch, 1: batch},))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert "sparsify.linear.default" in calls
    with torch.no_grad():
        again = torch.export.export(sparse, (torch.randn(2, 3, 16),))
    assert "sparsify.linear.default" in [str(node.target) for node in again.graph.nodes if node.op == "call_function"]
    x = torch.randn(5, 7, 16)
    assert close(program.module()(x), x, dense)


def test_inputs_that_do_not_fit_are_refused_in_words() -> None:
    sparse, _ = layer()
    with pytest.raises(KernelError, match=r"needs x of \(..., 16\) torch.float32; found \(3, 15\)"):
        sparse(torch.randn(3, 15))
    with pytest.raises(KernelError, match=r"found \(3, 16\) torch.float64"):
        sparse(torch.randn(3, 16).double())
    with pytest.raises(KernelError, match="kernel 'fast'"):
        layer("fast")
    with pytest.raises(KernelError, match=r"found float16"):
        layer("torch_csr", dtype=torch.float16)
    for bias in (torch.zeros(23), torch.zeros(24, dtype=torch.float64)):
        with pytest.raises(KernelError, match=r"needs a bias \(24,\) of the same dtype"):
            SparseLinear(sparse.packed, bias)


def test_the_dense_weight_and_a_description_can_be_read() -> None:
    sparse, dense = layer()
    assert torch.equal(sparse.weight, dense.weight)
    assert sparse.packed.size_bytes() == 24 * 8 * 4 + 24 * 2
    text = repr(sparse)
    assert text == "SparseLinear(in_features=16, out_features=24, bias=True, pattern=2:4, kernel=torch_csr)"


def test_a_packed_weight_of_another_layout_than_its_pattern_runs() -> None:
    skip_without_mkl("torch_csr")
    weight = torch.randn(24, 16)
    keep = NM(2, 4).select(weight.abs(), 0.5)
    packed = format_for(Unstructured()).pack(weight, keep, NM(2, 4))  # a bitmap that records 2:4
    x = torch.randn(3, 16)
    assert difference(SparseLinear(packed, None, "torch_csr")(x), x, weight * keep) is None


def test_offloaded_tensors_come_back_for_every_move_and_load(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[str] = []
    put = SparseLinear._put_packed

    def recorded(self: SparseLinear, device: torch.device) -> None:
        moves.append(str(device))
        put(self, device)

    monkeypatch.setattr(SparseLinear, "_may_offload", lambda self: self.offload)  # as if the CPU were a GPU
    monkeypatch.setattr(
        SparseLinear, "_put_packed", lambda self, device: (moves.append(str(device)), put(self, device))
    )
    weight, x = torch.randn(8, 12), torch.randn(3, 12)
    packed = format_for(NM(2, 4)).pack(weight, NM(2, 4).select(weight.abs(), 0.5), NM(2, 4))
    module = SparseLinear(packed, torch.randn(8), "dense", offload=True)
    assert moves == ["cpu"]
    expected = module(x)
    assert torch.equal(module.double().float()(x), expected)
    assert moves == ["cpu", *["cpu", "cpu"] * 2]  # each change of dtype: brought back, then put away again
    other = SparseLinear(packed, torch.zeros(8), "dense", offload=True)
    other.load_state_dict(module.state_dict())
    assert torch.equal(other(x), expected)
    kept = SparseLinear(packed, None, "dense")
    moves.clear()
    kept.double()
    assert moves == []
