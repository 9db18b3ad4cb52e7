"""Calibration with products in bfloat16: what runs in it, what must not, and that every run says so."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.errors import DataError
from sparsify_compiler.frontends.torch import trace_module
from sparsify_compiler.pipeline.job import Job
from sparsify_compiler.pipeline.torch_prune import prune_torch
from sparsify_compiler.precision import Precision, products
from sparsify_compiler.progress import silent
from tests.models.small import Mlp, mlp_batches, seeded

RULE = sc.make_rule("*", sc.Unstructured(), sc.SparseGPT(), 0.5)


class Two(nn.Module):
    """Two products with nothing between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 32, bias=False), nn.Linear(32, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))  # type: ignore[no-any-return]


def test_products_run_in_bfloat16_and_who_watches_them_does_not() -> None:
    model, x = seeded(Two), torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    graph = trace_module(model, x, precision="bfloat16")
    seen: list[Tensor] = []

    def observe(key: str, read: Tensor) -> None:
        assert not torch.is_autocast_enabled("cpu")
        seen.append(read)

    values = graph.enter(x)
    for segment in graph.segments:
        values = graph.run_segment(segment.index, values, observe)
    first, second = (weight.bfloat16() for weight in (model.first.weight, model.second.weight))
    middle = x.bfloat16() @ first.T
    assert torch.equal(seen[0], x)
    assert torch.equal(seen[1], middle)
    assert torch.equal(graph.outputs(values)[0], middle @ second.T)


def test_float32_leaves_a_precision_that_holds_outside() -> None:
    model, x = seeded(Two), torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    graph = trace_module(model, x)
    with products("bfloat16", torch.device("cpu")), products("float32", torch.device("cpu")):
        values = graph.enter(x)
        for segment in graph.segments:
            values = graph.run_segment(segment.index, values)
    assert graph.outputs(values)[0].dtype == torch.bfloat16


def pruned_in(precision: Precision) -> tuple[Job, nn.Module, dict[str, float]]:
    options = sc.Options(precision=precision, device="cpu")
    job = Job("mlp", sc.Recipe((RULE,)), options, mlp_batches(), False, None, silent, None)
    found = prune_torch(job, seeded(Mlp))
    return job, found.module, {name: outcome.relative_error or 0.0 for name, outcome in found.outcomes.items()}


def test_weights_found_in_bfloat16_are_float32_and_about_as_good() -> None:
    (_, plain, errors), (job, module, rough) = pruned_in("float32"), pruned_in("bfloat16")
    assert all(tensor.dtype == torch.float32 for tensor in module.state_dict().values())
    assert any(not torch.equal(a, b) for a, b in zip(plain.parameters(), module.parameters(), strict=True))
    # Activations are off by 2^-9 of their size, errors by about twice that and by entries that changed sides.
    assert rough == pytest.approx(errors, rel=0.03)
    assert "products of the model ran in bfloat16 while it was calibrated and tuned" in job.notes


def test_a_run_in_one_precision_is_not_gone_on_with_in_another(tmp_path: Path) -> None:
    def stop(stage: str, done: int, total: int) -> None:
        if stage.startswith("tune"):
            raise KeyboardInterrupt

    def run(precision: Precision, resume: bool) -> None:
        options = sc.Options(output=tmp_path / "out", onnx=False, tokens=(1,), precision=precision, resume=resume)
        sc.compile(seeded(Mlp), mlp_batches(), recipe=sc.Recipe((RULE,)), options=options, progress=stop)

    with pytest.raises(KeyboardInterrupt):
        run("bfloat16", resume=False)
    with pytest.raises(DataError, match="another model, data, recipe"):
        run("float32", resume=True)


def test_weights_that_autocast_does_not_multiply_in_bfloat16_are_refused() -> None:
    job = Job("mlp", sc.Recipe((RULE,)), sc.Options(precision="bfloat16"), mlp_batches(), False, None, silent, None)
    with pytest.raises(DataError, match=r"precision 'bfloat16': the model has weights of torch.float64; leave it out"):
        prune_torch(job, seeded(Mlp).double())


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(DataError, match="precision 'float8': choose float32 or bfloat16"):
        sc.Options(precision="float8")  # type: ignore[arg-type]
