"""Layouts: a problem's rows times its weight must give what the layer itself computes."""

import pytest
import torch
import torch.nn.functional as F

from sparsify_compiler.frontends.layout import (
    CHUNK_ELEMENTS,
    LEAST_ROWS,
    from_problem,
    problem_shape,
    row_chunks,
    to_problem,
)
from sparsify_compiler.graph import ConvLayout, MatmulLayout

CONVOLUTIONS = [
    ConvLayout((3,), (1,), ((1, 1),), (1,), 1),
    ConvLayout((5,), (2,), ((0, 3),), (2,), 2),
    ConvLayout((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1),
    ConvLayout((3, 2), (2, 1), ((1, 0), (0, 2)), (1, 2), 4),
    ConvLayout((1, 1), (2, 2), ((0, 0), (0, 0)), (1, 1), 1),
    ConvLayout((2, 3, 2), (1, 2, 1), ((1, 1), (0, 0), (1, 0)), (1, 1, 2), 2),
]


def convolve(x: torch.Tensor, weight: torch.Tensor, layout: ConvLayout) -> torch.Tensor:
    pads = [side for pair in reversed(layout.padding) for side in pair]
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(layout.kernel)]
    return function(F.pad(x, pads), weight, None, layout.stride, 0, layout.dilation, layout.groups)


@pytest.mark.parametrize("layout", CONVOLUTIONS, ids=str)
def test_rows_times_the_problem_weight_equal_the_convolution(layout: ConvLayout) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 8 // layout.groups, *layout.kernel, dtype=torch.float64)
    x = torch.randn(3, 8, *([9] * len(layout.kernel)), dtype=torch.float64)
    problem = to_problem(weight, layout)
    rows = torch.cat(list(row_chunks(x, layout)), dim=1)
    product = rows @ problem.transpose(1, 2)  # (groups, tokens, out)
    expected = convolve(x, weight, layout).flatten(2)  # (images, channels, positions)
    expected = expected.reshape(3, layout.groups, -1, expected.shape[2]).permute(1, 0, 3, 2).flatten(1, 2)
    # The same sums in float64 in another order.
    assert torch.allclose(product, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", CONVOLUTIONS, ids=str)
def test_a_convolution_weight_survives_the_way_there_and_back(layout: ConvLayout) -> None:
    weight = torch.randn(8, 8 // layout.groups, *layout.kernel)
    shape = tuple(weight.shape)
    assert torch.equal(from_problem(to_problem(weight, layout), layout, shape), weight)
    groups, out, in_, run = problem_shape(shape, layout)
    assert tuple(to_problem(weight, layout).shape) == (groups, out, in_)
    assert run == 8 // layout.groups


def test_neighbouring_columns_of_a_convolution_are_channels_at_one_tap() -> None:
    layout = ConvLayout((3, 3), (1, 1), ((0, 0), (0, 0)), (1, 1), 1)
    weight = torch.zeros(1, 4, 3, 3)
    weight[0, :, 1, 2] = 1.0  # all channels of tap (1, 2), the sixth of nine
    assert torch.equal(to_problem(weight, layout)[0, 0].nonzero().flatten(), torch.arange(5 * 4, 6 * 4))


@pytest.mark.parametrize(("transposed", "axis"), [(False, -1), (True, -1), (False, -2), (True, -2)])
def test_rows_times_the_problem_weight_equal_the_matmul(transposed: bool, axis: int) -> None:
    layout = MatmulLayout(transposed, axis)
    native = torch.randn(5, 7)
    in_ = 5 if transposed else 7
    x = torch.randn(2, 3, in_) if axis == -1 else torch.randn(2, in_, 3)
    rows = torch.cat(list(row_chunks(x, layout)), dim=1)[0]
    matrix = native.t() if transposed else native
    expected = x.movedim(axis, -1).reshape(-1, in_) @ matrix.t()
    assert torch.allclose(rows @ to_problem(native, layout)[0].t(), expected, atol=1e-6)
    assert torch.equal(from_problem(to_problem(native, layout), layout, (5, 7)), native)


def test_long_inputs_come_in_bounded_chunks() -> None:
    layout = ConvLayout((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    chunks = list(row_chunks(torch.zeros(40, 16, 64, 64), layout))
    assert len(chunks) > 1
    assert sum(chunk.shape[1] for chunk in chunks) == 40 * 64 * 64


@pytest.mark.parametrize("in_", [64, 1024, 14336])
def test_rows_of_a_matmul_come_in_chunks_that_statistics_multiply_at_once(in_: int) -> None:
    x = torch.zeros(1, 1).expand(3 * LEAST_ROWS + 5, in_)
    counts = [chunk.shape[1] for chunk in row_chunks(x, MatmulLayout(transposed=False))]
    assert sum(counts) == len(x)
    assert all(count >= LEAST_ROWS for count in counts[:-1])
    assert all(count * in_ <= max(CHUNK_ELEMENTS, LEAST_ROWS * in_) for count in counts)


def test_an_image_without_a_batch_axis_is_one_image() -> None:
    layout = ConvLayout((3, 3), (1, 1), ((1, 1), (1, 1)), (1, 1), 1)
    x = torch.randn(2, 5, 5)
    assert torch.equal(next(row_chunks(x, layout)), next(row_chunks(x[None], layout)))
