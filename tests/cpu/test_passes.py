"""BatchNorm re-estimation and lowering."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.frontends.torch import trace_module
from sparsify_compiler.passes.batchnorm import reestimate_batchnorm
from sparsify_compiler.passes.lower import Lowerable, lower, lowerable
from tests.models.small import Cnn, Mlp, image_batches, mlp_batches, seeded


def test_batchnorm_statistics_become_those_of_the_data() -> None:
    module, batches = seeded(Cnn), image_batches()
    assert reestimate_batchnorm(module, batches) == 2
    with torch.no_grad():
        inputs = [module.stem(x) for x in batches]  # type: ignore[operator]
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    variance = torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0)
    assert torch.allclose(module.bn.running_mean, mean, atol=1e-6)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(module.bn.running_var, variance, rtol=1e-5)  # type: ignore[union-attr, arg-type]


def test_re_estimation_restores_modes_and_momentum() -> None:
    module = seeded(Cnn)
    module.bn.momentum = 0.3  # type: ignore[union-attr, assignment]
    module.bn2.training = True  # type: ignore[union-attr]
    reestimate_batchnorm(module, image_batches())
    assert (module.bn.momentum, module.bn.training, module.bn2.training) == (0.3, False, True)  # type: ignore[union-attr]


def test_a_module_without_batchnorm_is_left_alone() -> None:
    module = seeded(Mlp)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert reestimate_batchnorm(module, mlp_batches()) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@dataclass(frozen=True)
class Marked:
    """Stands for a kernel's module."""

    part: Lowerable
    kernel: str

    def module(self) -> nn.Module:
        layer = nn.Linear(self.part.site.in_, self.part.site.out)
        layer.weight.data, layer.kernel = self.part.weight * self.part.keep, self.kernel  # type: ignore[assignment]
        return layer


def test_only_sites_that_a_sparse_kernel_won_are_swapped() -> None:
    module, x = seeded(Mlp), mlp_batches(1)[0]
    graph = trace_module(module, x)
    parts = {}
    for site in graph.sites[:2]:
        part = lowerable(module, site, torch.ones(1, site.out, site.in_, dtype=torch.bool))
        assert isinstance(part, Lowerable)
        parts[site.name] = part
    first, second = list(parts)
    chosen = {first: "fast", second: "dense"}
    dense = module.get_submodule(second)
    assert lower(module, chosen, parts, lambda part, kernel: Marked(part, kernel).module()) == 1
    assert module.get_submodule(first).kernel == "fast"
    assert module.get_submodule(second) is dense
    assert not module.get_submodule(first).training


def test_sites_that_cannot_be_swapped_say_why() -> None:
    module = nn.Sequential(nn.Conv1d(4, 8, 3), nn.Flatten(), nn.Linear(48, 4)).eval()
    graph = trace_module(module, torch.randn(2, 4, 8))
    stem = graph.sites[0]
    reason = lowerable(module, stem, torch.ones(1, stem.out, stem.in_, dtype=torch.bool))
    assert isinstance(reason, str)
    assert "only 2-d convolutions" in reason


def test_a_convolution_is_lowered_with_its_weight_tap_major_and_its_groups_one_below_the_other() -> None:
    module = seeded(Cnn)
    graph = trace_module(module, image_batches(1)[0])
    site = next(site for site in graph.sites if site.name == "grouped")
    keep = torch.rand(site.groups, site.out, site.in_) > 0.5
    part = lowerable(module, site, keep)
    assert isinstance(part, Lowerable)
    assert torch.equal(part.weight, graph.weight(site).reshape(16, 72))
    assert torch.equal(part.keep, keep.reshape(16, 72))
    assert part.weight[9, 8 * 4 + 3] == module.grouped.weight[9, 3, 1, 1]  # tap (1, 1) is the fifth of nine


def test_layers_that_read_a_linear_modules_weight_themselves_stay_dense() -> None:
    module = nn.Sequential(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)).eval()
    graph = trace_module(module, torch.randn(2, 5, 32))
    sites = {site.name: site for site in graph.sites}
    for name in ("0.self_attn.out_proj", "0.linear1"):
        found = lowerable(module, sites[name], graph.weight(sites[name]) != 0)
        assert isinstance(found, str)
        assert "reads the weight itself" in found


def test_a_batch_too_small_for_batch_statistics_is_named() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(CalibrationError, match=r"batch 0.*more samples"):
        reestimate_batchnorm(module, [torch.randn(1, 4)])
