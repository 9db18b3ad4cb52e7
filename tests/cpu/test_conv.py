"""SparseConv2d against PyTorch's own convolution, and the measured choice between them."""

import copy
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from kernels import skip_without_mkl
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparsify_compiler.errors import FallbackWarning, KernelError
from sparsify_compiler.frontends.layout import to_problem
from sparsify_compiler.graph import ConvLayout
from sparsify_compiler.pattern import NM, Block, Pattern, Unstructured
from sparsify_compiler.runtime.layers import conv_windows
from sparsify_compiler.runtime.layers.conv import SparseConv2d
from sparsify_compiler.runtime.layers.conv_windows import ConvGeometry, geometry_of

CASES: Mapping[str, dict[str, object]] = {
    "1x1": {"kernel_size": 1},
    "1x1 strided": {"kernel_size": 1, "stride": 2},
    "1x1 padded": {"kernel_size": 1, "padding": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "3x3 valid": {"kernel_size": 3, "padding": "valid"},
    "5x3 strided": {"kernel_size": (5, 3), "stride": (2, 3), "padding": (2, 0)},
    "dilated": {"kernel_size": 3, "dilation": (2, 1), "padding": 2},
    "same": {"kernel_size": (2, 3), "padding": "same"},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "replicated": {"kernel_size": 3, "padding": (1, 2), "padding_mode": "replicate"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 2},
    "grouped 1x1": {"kernel_size": 1, "groups": 2, "bias": False},
}

TWO_FOUR = NM(2, 4)


def pair(
    options: Mapping[str, object],
    kernel: str = "torch_csr",
    pattern: Pattern = TWO_FOUR,
    dtype: torch.dtype = torch.float64,
) -> tuple[SparseConv2d, nn.Conv2d]:
    """A sparse convolution of 8 channels to 12, and the dense one that it must equal."""
    skip_without_mkl(kernel)
    torch.manual_seed(0)
    dense = nn.Conv2d(8, 12, **options, dtype=dtype)  # type: ignore[arg-type]
    geometry = geometry_of(dense)
    layout = ConvLayout(geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    rows = to_problem(dense.weight.detach(), layout)  # (groups, out, in), tap-major
    keep = torch.stack([pattern.select(row.abs(), 0.5, geometry.run) for row in rows])
    sparse = SparseConv2d.from_dense(dense.weight, keep, pattern, geometry, dense.bias, kernel, (10,))
    kept = keep.reshape(12, *geometry.kernel, geometry.run).permute(0, 3, 1, 2)
    dense.weight.data *= kept
    return sparse, dense


def images(count: int = 2, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, 8, 9, 7, generator=torch.Generator().manual_seed(1), dtype=dtype)


def assert_equal(y: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)  # at most 120 float64 terms of size 1


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")  # PyTorch pads a copy, as we do
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["torch_csr", "dense"])
def test_a_sparse_convolution_equals_the_dense_one_and_keeps_the_inputs_memory_format(kernel: str, case: str) -> None:
    sparse, dense = pair(CASES[case], kernel)
    assert torch.equal(sparse.weight, dense.weight)
    x = images()
    inputs = [x, x.to(memory_format=torch.channels_last), images(4)[::2, :, 1:], x[0], images(0)]
    with torch.no_grad():
        for x in inputs:
            y = sparse(x)
            assert_equal(y, dense(x))
            last = x is inputs[1]
            assert y.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("pattern", [Unstructured(), NM(1, 4), Block(4, 4)], ids=str)
def test_every_pattern_runs_in_groups_and_taps(pattern: Pattern) -> None:
    for case in ("3x3", "grouped"):
        if isinstance(pattern, Block) and case == "grouped":
            pattern = Block(3, 4)
        sparse, dense = pair(CASES[case], "torch_csr", pattern)
        assert torch.equal(sparse.weight, dense.weight)
        assert_equal(sparse(images()), dense(images()))


@pytest.mark.parametrize("most", [1, 500, 1500, 4000])
def test_windows_in_chunks_give_the_same_result(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    sparse, dense = pair(CASES["grouped"])
    monkeypatch.setattr(conv_windows, "CPU_CHUNK", most)
    with torch.no_grad():
        whole = list(sparse.geometry.rows(images(3)))
        assert len(whole) > 1
        largest = max(part.numel() * 2 for chunk in whole for part in chunk)
        assert largest <= max(most, 72 * 7)  # one line of windows is the least
        assert_equal(sparse(images(3)), dense(images(3)))


def test_a_1x1_kernel_reads_channels_last_input_without_a_copy() -> None:
    x = images().to(memory_format=torch.channels_last)
    ((rows,),) = ConvGeometry(8, (1, 1)).rows(x)
    assert rows.data_ptr() == x.data_ptr()
    first, second = next(iter(ConvGeometry(8, (1, 1), groups=2).rows(x)))
    assert (rows.shape, first.shape, second.shape) == ((126, 8), (126, 4), (126, 4))


@pytest.mark.parametrize("case", ["1x1 strided", "5x3 strided", "grouped", "reflected"])
def test_gradients_of_input_and_bias_are_those_of_the_dense_convolution(case: str) -> None:
    sparse, dense = pair(CASES[case])
    x = images().requires_grad_()
    y, expected = sparse(x), dense(x)
    pull = torch.randn_like(expected)
    biases = [part.bias for part in sparse.parts]
    found, *rest = torch.autograd.grad((y * pull).sum(), (x, *biases))
    other, bias = torch.autograd.grad((expected * pull).sum(), (x, dense.bias))
    torch.testing.assert_close(found, other, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cat(rest), bias, rtol=0, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch calls its own deprecated class
def test_compiling_and_exporting_a_convolution_keeps_one_operator_a_group() -> None:
    sparse, dense = pair(CASES["grouped"])
    torch._dynamo.reset()
    with torch.no_grad():
        assert_equal(torch.compile(sparse, fullgraph=True, backend="aot_eager")(images()), dense(images()))
        batch = torch.export.Dim.DYNAMIC
        program = torch.export.export(sparse, (images(),), dynamic_shapes=({0: batch},)).run_decompositions()
        assert [str(n.target) for n in program.graph.nodes].count("sparsify.linear.default") == 2
        assert_equal(program.module()(images(5)), dense(images(5)))
    torch._dynamo.reset()


@pytest.mark.parametrize("assign", [False, True])
def test_the_state_round_trips_through_safetensors(assign: bool, tmp_path: Path) -> None:
    sparse, dense = pair(CASES["grouped"])
    save_file(sparse.state_dict(), tmp_path / "conv.safetensors")
    other = copy.deepcopy(sparse)
    other = other.to("meta") if assign else other
    if not assign:
        other.products[0].values.zero_()
    other.load_state_dict(load_file(tmp_path / "conv.safetensors"), assign=assign)
    assert_equal(other(images()), dense(images()))


def test_a_convolution_moved_where_its_kernel_cannot_run_runs_densely_and_says_so() -> None:
    sparse, dense = pair(CASES["3x3"], dtype=torch.float32)
    with pytest.warns(FallbackWarning, match="'torch_csr' cannot run 2:4 torch.bfloat16 on cpu"):
        sparse.bfloat16()
    assert sparse.running.kernel == "dense"
    x = images(dtype=torch.bfloat16)
    assert torch.equal(sparse(x), dense.bfloat16()(x))
    assert "running=dense" in repr(sparse)


@pytest.mark.parametrize("kernel", ["dense", "torch_csr"])
def test_a_convolution_runs_under_vmap(kernel: str) -> None:
    sparse, dense = pair(CASES["3x3"])
    layer = SparseConv2d([part.packed for part in sparse.parts], sparse.geometry, dense.bias, kernel)
    x = torch.stack([images(), 2 * images()])
    assert_equal(torch.vmap(layer)(x), torch.vmap(dense)(x))


def test_an_activation_is_applied_once() -> None:
    sparse, dense = pair(CASES["3x3"])
    packed = [part.packed for part in sparse.parts]
    for kernel in ("torch_csr", "dense"):
        fused = SparseConv2d(packed, sparse.geometry, dense.bias, kernel, activation="gelu")
        assert_equal(fused(images()), nn.functional.gelu(dense(images())))


def test_what_does_not_fit_is_refused_in_words() -> None:
    sparse, _ = pair(CASES["3x3"])
    with pytest.raises(
        KernelError, match=r"x of \(images, 8, height, width\) torch.float64 on cpu; found \(2, 7, 9, 9\)"
    ):
        sparse(torch.randn(2, 7, 9, 9).double())
    for kernel in ("dense", "torch_csr"):
        layer = SparseConv2d([part.packed for part in sparse.parts], sparse.geometry, None, kernel)
        for wrong in (images().half(), images().int(), images().to("meta")):
            with pytest.raises(KernelError, match=f"found .*{wrong.dtype} on {wrong.device}; convert x"):
                layer(wrong)
        with pytest.raises(KernelError, match="SparseConv2d has no data yet"):
            layer.to("meta")(images().to("meta"))
    valid, _ = pair(CASES["3x3 valid"])
    with pytest.raises(KernelError, match="input of 2x9 is too small"):
        valid(torch.randn(1, 8, 2, 9, dtype=torch.float64))
    with pytest.raises(KernelError, match="depthwise convolution of 8 channels"):
        ConvGeometry(8, (3, 3), groups=8)
    with pytest.raises(KernelError, match="3 groups do not divide"):
        ConvGeometry(8, (3, 3), groups=3)
    with pytest.raises(KernelError, match=r"needs as many weights of \(out, 8\); found 1 of \(12, 72\)"):
        SparseConv2d([part.packed for part in sparse.parts], ConvGeometry(8, (1, 1)))
