"""BatchNorm re-estimation and lowering."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.errors import CalibrationError
from sparsify_compiler.frontends.torch import trace_module
from sparsify_compiler.passes.batchnorm import reestimate_batchnorm
from sparsify_compiler.passes.lower import Lowerable, lower, lowerable
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.torch_prune import finish_torch, prune_torch
from sparsify_compiler.progress import silent
from sparsify_compiler.steps import Permute
from tests.models.small import Cnn, Mlp, image_batches, mlp_batches, seeded


def pruned_cnn() -> nn.Module:
    """`Cnn` without two thirds of its stem and its point-wise convolution."""
    module = seeded(Cnn)
    generator = torch.Generator().manual_seed(3)
    for layer in (module.stem, module.point):
        gone = torch.rand(layer.weight.shape, generator=generator) < 2 / 3  # type: ignore[union-attr, arg-type]
        layer.weight.data[gone] = 0  # type: ignore[union-attr, index, operator]
    return module


def leaves(module: nn.Module, layer: str, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return mean and variance per channel of what `layer` returns on all batches, in float64."""
    found: list[Tensor] = []
    handle = module.get_submodule(layer).register_forward_hook(lambda _, inputs, y: found.append(y.double()))
    with torch.no_grad():
        for batch in batches:
            module(batch)
    handle.remove()
    rows = torch.cat(found).movedim(1, 0).flatten(1)
    return rows.mean(1), rows.var(1, correction=0)


def test_batchnorm_gives_what_the_dense_model_has_there() -> None:
    dense, module, batches = seeded(Cnn), pruned_cnn(), image_batches()
    apart = [
        abs(leaves(module, name, batches)[1] / leaves(dense, name, batches)[1] - 1).max() for name in ("bn", "bn2")
    ]
    assert min(apart) > 0.3
    assert reestimate_batchnorm(module, dense, batches) == 2
    for name, tolerance in (("bn", 1e-5), ("bn2", 0.05)):  # later layers were matched batch by batch: 5 % of them
        mean, variance = leaves(module, name, batches)
        wanted_mean, wanted_variance = leaves(dense, name, batches)
        assert torch.allclose(variance, wanted_variance, rtol=tolerance)
        assert torch.allclose(mean, wanted_mean, atol=tolerance * float(wanted_variance.sqrt().max()))


def test_where_nothing_was_pruned_batchnorm_stays_whatever_the_data() -> None:
    dense, module = seeded(Cnn), seeded(Cnn)
    reestimate_batchnorm(module, dense, [5 + 3 * batch for batch in image_batches()])
    for name, tensor in module.state_dict().items():
        assert torch.allclose(tensor, dense.state_dict()[name], rtol=1e-6), name


class Bottleneck(nn.Module):
    """Two linear layers with a BatchNorm between; inputs (samples, 12)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(12, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.norm(self.first(x)).relu())
        return y


def bottleneck() -> nn.Module:
    module = seeded(Bottleneck)
    generator = torch.Generator().manual_seed(4)
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(module.norm, name).data = torch.rand(16, generator=generator) + 0.5
    return module


def test_channels_in_another_order_are_compared_with_themselves() -> None:
    dense, module = bottleneck(), bottleneck()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    for tensor in (*module.first.parameters(), *module.norm.parameters(), *module.norm.buffers()):  # type: ignore[union-attr, operator]
        if tensor.ndim:
            tensor.data = tensor.data[order]
    module.second.weight.data = module.second.weight.data[:, order]  # type: ignore[union-attr, index]
    batches = [torch.randn(20, 12, generator=torch.Generator().manual_seed(6)) * 3 + 1]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    reestimate_batchnorm(module, dense, batches, {"norm": order})
    for name, tensor in module.state_dict().items():
        assert torch.allclose(tensor, before[name], rtol=1e-5), name
    reestimate_batchnorm(module, dense, batches)
    assert not torch.allclose(module.norm.running_mean, before["norm.running_mean"], rtol=1e-2)  # type: ignore[union-attr, arg-type]


def test_the_order_that_a_recipe_finds_reaches_batchnorm() -> None:
    dense = bottleneck()
    batches = [torch.randn(40, 12, generator=torch.Generator().manual_seed(7))]
    rule = sc.make_rule("second", sc.NM(2, 4), sc.Magnitude())
    job = Job("m", sc.Recipe((rule,), permute=Permute()), sc.Options(device="cpu"), batches, False, None, silent, None)
    pruned = prune_torch(job, dense)
    dense_weight, weight = dense.norm.weight, pruned.module.norm.weight  # type: ignore[union-attr]
    assert not torch.equal(weight, dense_weight)  # type: ignore[arg-type]
    of_graph = pruned.graph.module.get_buffer("norm.running_var").clone()
    pruned.module.norm.running_var += 1.0  # type: ignore[union-attr, operator]
    assert torch.equal(pruned.graph.module.get_buffer("norm.running_var"), of_graph)  # no memory is shared
    finish_torch(job, pruned)
    stands = [int((dense_weight == value).nonzero()) for value in weight]  # type: ignore[union-attr]
    mean, variance = dense.norm.running_mean, dense.norm.running_var  # type: ignore[union-attr]
    # only `second` was pruned, behind the BatchNorm, so that its statistics stay
    assert torch.allclose(pruned.module.norm.running_mean, mean[stands], rtol=1e-5)  # type: ignore[union-attr, index, arg-type]
    assert torch.allclose(pruned.module.norm.running_var, variance[stands], rtol=1e-5)  # type: ignore[union-attr, index, arg-type]


def test_a_channel_that_pruning_silenced_has_its_mean_corrected_alone() -> None:
    dense, module, batches = seeded(Cnn), seeded(Cnn), image_batches()
    module.stem.weight.data[4] = 0  # type: ignore[union-attr, index, operator]
    reestimate_batchnorm(module, dense, batches)
    assert float(module.bn.running_var[4]) == pytest.approx(float(dense.bn.running_var[4]), rel=1e-6)  # type: ignore[union-attr, index]
    silent_channel, kept = leaves(module, "bn", batches)[0][4], leaves(dense, "bn", batches)[0][4]
    assert float(silent_channel) == pytest.approx(float(kept), abs=1e-5)


def test_re_estimation_leaves_both_modules_as_they_were_otherwise() -> None:
    dense, module = seeded(Cnn), pruned_cnn()
    dense.train()  # its statistics would move if it ran like that
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    module.bn2.training = True  # type: ignore[union-attr]
    reestimate_batchnorm(module, dense, image_batches())
    assert (module.bn.training, module.bn2.training, dense.bn.training) == (False, True, True)  # type: ignore[union-attr]
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert not any(layer._forward_pre_hooks for both in (dense, module) for layer in both.modules())


def test_a_module_without_batchnorm_is_left_alone() -> None:
    module = seeded(Mlp)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert reestimate_batchnorm(module, seeded(Mlp), mlp_batches()) == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_statistics_that_are_not_finite_are_named() -> None:
    with pytest.raises(CalibrationError, match=r"BatchNorm 'bn'.*not finite"):
        reestimate_batchnorm(pruned_cnn(), seeded(Cnn), [torch.full((2, 3, 16, 16), torch.nan)])


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
