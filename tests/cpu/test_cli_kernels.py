"""The verb kernels: who runs what here, why not, and what a self-test found."""

import json
from dataclasses import dataclass
from io import StringIO

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sparsify_compiler.cli.kernels import draw_survey
from sparsify_compiler.cli.main import build_app
from sparsify_compiler.kernel import Activation, MatmulSpec
from sparsify_compiler.pipeline.kernel_survey import WEIGHTS, Survey, survey
from sparsify_compiler.runtime.dense import Dense
from sparsify_compiler.runtime.tuning.selftest import Outcome

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Picky(Dense):
    name: str = "picky"

    def rejects(self, spec: MatmulSpec) -> str | None:
        return f"too [b]dense[/b]; found {spec.density}" if spec.density > 0.3 else None


class Failing:
    def test(self, kernel: str, spec: MatmulSpec, bias: bool, activation: Activation | None) -> Outcome:
        return Outcome("crashed (SIGSEGV)" if kernel == "picky" and str(spec.pattern) == "2:8" else None)


def drawn(found: Survey, width: int = 120) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(draw_survey(found, width))
    return capture.get()


def test_every_kernel_is_asked_about_every_weight_and_only_those_that_accept_are_tested() -> None:
    found = survey(CPU, Failing(), (Dense(), Picky()), (torch.float32,))
    assert len(found.rows) == 2 * len(WEIGHTS)
    refused = {row.pattern: row.refused for row in found.rows if row.kernel == "picky"}
    assert refused["2:4"] == "too [b]dense[/b]; found 0.5"
    assert refused["2:8"] == "self-test: crashed (SIGSEGV)"
    assert refused["128x128"] is None
    assert all(row.tested == (row.density <= 0.3) for row in found.rows if row.kernel == "picky")
    assert [ceilings.dtype for ceilings in found.ceilings] == ["float32"]


def test_the_table_names_what_runs_what_failed_and_why() -> None:
    text = drawn(survey(CPU, Failing(), (Dense(), Picky()), (torch.float32, torch.float16)))
    lines = text.splitlines()
    dense = next(line for line in lines if line.startswith("dense"))
    picky = next(line for line in lines if line.startswith("picky"))
    assert dense.split()[1:3] == ["every", "pattern"]
    assert "24 passed" in dense
    assert "2 of 14 failed" in picky
    assert "picky: too [b]dense[/b]; found 0.5" in text
    assert "picky: self-test: crashed (SIGSEGV)" in text


def test_without_self_tests_nothing_is_run_and_json_has_every_row() -> None:
    result = CliRunner().invoke(build_app(), ["kernels", "--no-selftest", "--json", "--device", "cpu"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert not any(row["tested"] for row in found["rows"])
    assert {row["kernel"] for row in found["rows"]} >= {"dense", "torch_csr"}
    assert found["machine"][0] == ["device", "cpu"]


@pytest.mark.parametrize("device", ["cuda:99", "tpu"])
def test_a_device_that_is_not_there_is_refused(device: str) -> None:
    assert CliRunner().invoke(build_app(), ["kernels", "--device", device]).exit_code == 2
