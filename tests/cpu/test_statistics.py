"""Second moments: against products in float64, in one piece."""

import pytest
import torch

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.graph import ConvLayout, MatmulLayout
from sparsify_compiler.problem import Needs
from sparsify_compiler.statistics import GPU_PANEL, Moments, add_gram, panels

LINEAR = MatmulLayout(transposed=False)


def test_the_gram_matrix_equals_the_float64_product_over_all_batches() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, 50, 300) * (1 + i) for i in range(3)]
    moments = Moments(LINEAR, 1, 300, Needs.GRAM)
    for number, x in enumerate(batches):
        moments.add(x, "site", number)
    rows = torch.cat([x.reshape(-1, 300) for x in batches]).double()
    exact = rows.t() @ rows / 300
    assert moments.tokens == 300
    # Chunks are multiplied in float32: relative error about 3e-7 of the diagonal.
    assert (moments.gram(0).matrix - exact).abs().max() < 1e-6 * exact.diagonal().max()
    assert torch.equal(moments.gram(0).matrix, moments.gram(0).matrix.t())


def test_sites_that_share_an_input_share_one_gram_object() -> None:
    moments = Moments(LINEAR, 1, 4, Needs.GRAM)
    moments.add(torch.randn(9, 4), "site", 0)
    assert moments.gram(0) is moments.gram(0)
    assert torch.allclose(moments.mean_square(0), moments.gram(0).matrix.diagonal())


def test_norms_alone_equal_the_diagonal_of_the_gram_matrix() -> None:
    x = torch.randn(70, 12)
    norms, gram = Moments(LINEAR, 1, 12, Needs.NORMS), Moments(LINEAR, 1, 12, Needs.GRAM)
    norms.add(x, "site", 0)
    gram.add(x, "site", 0)
    assert torch.allclose(norms.mean_square(0), gram.mean_square(0), rtol=1e-6)


def test_each_group_of_a_convolution_has_its_own_gram_matrix() -> None:
    layout = ConvLayout((3,), (1,), ((1, 1),), (1,), 2)
    x = torch.randn(2, 6, 8)
    moments = Moments(layout, 2, 9, Needs.GRAM)
    moments.add(x, "site", 0)
    assert moments.tokens == 16
    single = ConvLayout((3,), (1,), ((1, 1),), (1,), 1)
    for group, part in enumerate((x[:, :3], x[:, 3:])):
        alone = Moments(single, 1, 9, Needs.GRAM)
        alone.add(part, "site", 0)
        assert torch.allclose(moments.gram(group).matrix, alone.gram(0).matrix, atol=1e-7)


def test_dense_targets_give_the_cross_products_of_the_same_tokens() -> None:
    pruned, dense = torch.randn(5, 40, 6), torch.randn(5, 40, 6)
    moments = Moments(LINEAR, 1, 6, Needs.GRAM)
    moments.add(pruned, "site", 0)
    moments.add_pair(pruned, dense, "site", 0)
    assert moments.cross is not None
    expected = pruned.reshape(-1, 6).double().t() @ dense.reshape(-1, 6).double()
    assert torch.allclose(moments.cross[0], expected, atol=1e-4)  # sums of 200 float32 products of order 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_the_site_and_the_batch(bad: float) -> None:
    moments = Moments(LINEAR, 1, 4, Needs.GRAM)
    x = torch.ones(3, 4)
    x[1, 2] = bad
    with pytest.raises(CalibrationError, match=r"'blocks\.3\.fc'.*batch 7"):
        moments.add(x, "blocks.3.fc", 7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_dense_activations_that_are_not_finite_name_the_site_and_the_batch(bad: float) -> None:
    moments = Moments(LINEAR, 1, 4, Needs.GRAM)
    x = torch.ones(3, 4)
    dense = x.clone()
    dense[1, 2] = bad
    moments.add(x, "blocks.3.fc", 7)
    with pytest.raises(CalibrationError, match=r"'blocks\.3\.fc'.*dense model.*batch 7"):
        moments.add_pair(x, dense, "blocks.3.fc", 7)


def test_a_site_without_tokens_says_so() -> None:
    with pytest.raises(CalibrationError, match="no tokens"):
        Moments(LINEAR, 1, 4, Needs.GRAM).gram(0)


@pytest.mark.parametrize("width", [1, 255, 256, 257, 700])
def test_lower_panels_cover_the_diagonal_and_all_below_it(width: int) -> None:
    rows = torch.randn(1, 30, width)
    total = torch.zeros(1, width, width, dtype=torch.float64)
    add_gram(total, rows)
    expected = (rows[0].double().t() @ rows[0].double()).tril()
    assert torch.allclose(total[0].tril(), expected, atol=1e-4)


@pytest.mark.parametrize("width", [700, GPU_PANEL, GPU_PANEL + 1])
def test_the_wide_panels_of_a_gpu_give_the_same_gram_matrix(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    x = torch.randn(20, width)
    narrow, wide = Moments(LINEAR, 1, width, Needs.GRAM), Moments(LINEAR, 1, width, Needs.GRAM)
    narrow.add(x, "site", 0)
    expected = narrow.gram(0).matrix
    monkeypatch.setattr("sparsify_compiler.statistics.CPU_PANEL", GPU_PANEL)
    wide.add(x, "site", 0)
    assert len(panels(width, x.device)) == -(-width // GPU_PANEL)
    # Float32 products whose sums may come in another order: 20 terms of about 1, over 20 tokens.
    assert torch.allclose(wide.gram(0).matrix, expected, rtol=0, atol=1e-6)
