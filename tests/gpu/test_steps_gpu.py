"""Every step of a recipe on a GPU: the choices of the CPU, wherever model and data lie, in both precisions; resumed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
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


class Attending(nn.Module):
    """A causal language model of one attention block; windows of 256 tokens are several blocks of CUDA's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(40, 32), nn.Linear(32, 40)
        self.qkv, self.o, self.up, self.down = (nn.Linear(*sizes) for sizes in ((32, 96), (32, 32), (32, 48), (48, 32)))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        return self.head(x + self.down(nn.functional.silu(self.up(x))))


def windows() -> list[Tensor]:
    return [torch.randint(0, 40, (2, 256), generator=torch.Generator().manual_seed(seed)) for seed in range(6)]


def compiled(
    kind: type[nn.Module], device: str, precision: Precision, home: str = "cpu", data: str = "cpu"
) -> tuple[Report, dict[str, Tensor], dict[str, Tensor]]:
    """Take every step with the module at `home` and the batches at `data`.

    Return the report, and the states before and after, on the CPU.
    """
    module = seeded(kind).to(home)
    batches = [batch.to(data) for batch in (tokens() if kind is Gated else images())]
    asked = recipe("*.down", ("*.up", "*.gate")) if kind is Gated else recipe("grouped", ("point", "fc"))
    options = sc.Options(onnx=False, tokens=(1,), device=device, precision=precision)
    found, report = sc.compile(module, batches, recipe=asked, options=options)
    assert isinstance(found, nn.Module)
    assert {tensor.device.type for tensor in module.state_dict().values()} == {home}
    before, after = (
        {name: tensor.cpu() for name, tensor in each.state_dict().items() if isinstance(tensor, Tensor)}
        for each in (module, found)
    )
    return report, before, after


def share_of_equal_choices(state: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    shared = [name for name in state if name in expected and expected[name].dim() > 1]
    same = sum(int(((state[name] != 0) == (expected[name] != 0)).sum()) for name in shared)
    return same / sum(expected[name].numel() for name in shared)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", [Gated, Convolutions])
def test_every_step_makes_the_choices_that_it_makes_on_the_cpu(kind: type[nn.Module], precision: Precision) -> None:
    report, before, state = compiled(kind, DEVICE, precision)
    check(report, 6 if kind is Gated else 3)
    assert all(torch.equal(tensor, seeded(kind).state_dict()[name]) for name, tensor in before.items())
    other, _, expected = compiled(kind, "cpu", precision)
    # Sums in another order move scores by a few roundings: of a few thousand entries those at a border may change
    # sides, and with products of eight bits many more of them.
    assert share_of_equal_choices(state, expected) > (0.98 if precision == "float32" else 0.9)
    last, wanted = report.steps[-1].heldout, other.steps[-1].heldout
    assert last is not None
    assert last == pytest.approx(wanted, rel=0.1 if precision == "float32" else 0.3)


@pytest.mark.parametrize(("home", "data"), [(DEVICE, "cpu"), ("cpu", DEVICE), (DEVICE, DEVICE)])
@pytest.mark.parametrize("kind", [Gated, Convolutions])
def test_model_and_data_may_lie_on_either_side(kind: type[nn.Module], home: str, data: str) -> None:
    report, before, state = compiled(kind, DEVICE, "float32", home, data)
    check(report, 6 if kind is Gated else 3)
    assert all(torch.equal(tensor, seeded(kind).state_dict()[name]) for name, tensor in before.items())
    expected = compiled(kind, DEVICE, "float32")[2]
    # The same products in the same place; means that were taken where a weight lies may round otherwise.
    assert share_of_equal_choices(state, expected) > 0.98


@pytest.mark.parametrize(("home", "data"), [(DEVICE, "cpu"), ("cpu", DEVICE)])
def test_a_gpu_holds_model_or_data_and_the_cpu_prunes(home: str, data: str) -> None:
    report, _, state = compiled(Gated, "cpu", "float32", home, data)
    check(report, 6)
    assert share_of_equal_choices(state, compiled(Gated, "cpu", "float32")[2]) > 0.98


@pytest.mark.parametrize("kind", [Gated, Attending])
def test_a_distillation_stopped_on_the_gpu_goes_on_to_where_it_would_have_ended(
    tmp_path: Path, kind: type[nn.Module]
) -> None:
    rule = sc.make_rule("*up", sc.Unstructured(), sc.Magnitude(), 0.5)
    asked = sc.Recipe((rule,), distill=Distill(4, 1e-2, 1, reselect=2))

    def run(name: str, stop: int = -1, resume: bool = False) -> dict[str, Tensor]:
        def progress(stage: str, done: int, total: int) -> None:
            if stage.startswith("distill, ") and done == stop:
                raise KeyboardInterrupt

        options = sc.Options(tmp_path / name, device=DEVICE, onnx=False, tokens=(1,), resume=resume)
        data = tokens() if kind is Gated else windows()
        sc.compile(seeded(kind), data, recipe=asked, options=options, progress=progress)
        return load_file(tmp_path / name / "model.safetensors")

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", stop=15)  # the end of the third epoch of five batches
    resumed = run("cut", resume=True)
    assert resumed.keys() == whole.keys()
    if kind is Gated:
        assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items())
    else:
        # Attention's backward adds up in no fixed order on a GPU. Adam makes of a gradient near zero, whose sign that
        # may decide, a step of up to 0.01, and where such a weight is at the border another one is pruned.
        apart = torch.cat([(tensor - whole[name]).abs().flatten() for name, tensor in resumed.items()])
        assert float((apart > 0.01).float().mean()) < 0.01
