"""Every step of a recipe on a GPU: the same choices as on the CPU, in both precisions, and resumed to the same bits."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.export.report import Report
from sparsify_compiler.precision import Precision
from sparsify_compiler.steps import Distill
from tests.cpu.test_all_steps import Convolutions, Gated, check, images, recipe, tokens
from tests.models.small import seeded

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch.cuda.is_available() is False"),
]

DEVICE = "cuda"


def compiled(
    kind: type[nn.Module], device: str, precision: Precision
) -> tuple[Report, dict[str, Tensor], dict[str, Tensor]]:
    """Take every step; return the report, the state before and that after, on the CPU."""
    module = seeded(kind)
    batches = tokens() if kind is Gated else images()
    asked = recipe("*.down", ("*.up", "*.gate")) if kind is Gated else recipe("grouped", ("point", "fc"))
    options = sc.Options(onnx=False, tokens=(1,), device=device, precision=precision)
    found, report = sc.compile(module, batches, recipe=asked, options=options)
    assert isinstance(found, nn.Module)
    return report, module.state_dict(), {name: tensor.cpu() for name, tensor in found.state_dict().items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [Gated, Convolutions])
def test_every_step_makes_the_choices_that_it_makes_on_the_cpu(kind: type[nn.Module], precision: Precision) -> None:
    report, before, state = compiled(kind, DEVICE, precision)
    check(report, 6 if kind is Gated else 3)
    assert all(torch.equal(tensor, seeded(kind).state_dict()[name]) for name, tensor in before.items())
    other, _, expected = compiled(kind, "cpu", precision)
    shared = [name for name in state if name in expected and expected[name].dim() > 1]
    same = sum(int(((state[name] != 0) == (expected[name] != 0)).sum()) for name in shared)
    # Sums in another order move scores by a few roundings: of a few thousand entries those at a border may change
    # sides, and with products of eight bits many more of them.
    assert same / sum(expected[name].numel() for name in shared) > (0.98 if precision == "float32" else 0.9)
    last, wanted = report.steps[-1].heldout, other.steps[-1].heldout
    assert last is not None
    assert last == pytest.approx(wanted, rel=0.1 if precision == "float32" else 0.3)


def test_a_distillation_stopped_on_the_gpu_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    rule = sc.make_rule("*.up", sc.Unstructured(), sc.Magnitude(), 0.5)
    asked = sc.Recipe((rule,), distill=Distill(4, 1e-2, 1, reselect=2))

    def run(name: str, stop: int = -1, resume: bool = False) -> bytes:
        def progress(stage: str, done: int, total: int) -> None:
            if stage.startswith("distill, ") and done == stop:
                raise KeyboardInterrupt

        options = sc.Options(tmp_path / name, device=DEVICE, onnx=False, tokens=(1,), resume=resume)
        sc.compile(seeded(Gated), tokens(), recipe=asked, options=options, progress=progress)
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop=15)  # the end of the third epoch of five batches
    assert run("cut", resume=True) == whole
