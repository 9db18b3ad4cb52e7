"""A run that is killed outright goes on with --resume, and its result equals an uninterrupted run bit for bit."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sparsify_compiler as sc
from sparsify_compiler.errors import DataError, ExportError
from tests.models.small import Mlp, mlp_batches, seeded

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import os, signal, sys
from pathlib import Path
import sparsify_compiler as sc
from tests.models.small import Mlp, mlp_batches, seeded

output, moment, resume = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "resume"

def progress(stage, done, total):
    if stage == moment:
        os.kill(os.getpid(), signal.SIGKILL)

recipe = sc.Recipe((sc.make_rule("*", sc.NM(2, 4), sc.SparseGPT()),))
options = sc.Options(output=output, onnx=False, tokens=(1,), resume=resume)
sc.compile(seeded(Mlp), mlp_batches(), recipe=recipe, options=options, progress=progress)
"""


def compile_in_a_process(output: Path, moment: str = "", resume: str = "") -> int:
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(output), moment, resume]
    return subprocess.run(command, cwd=ROOT, check=False, timeout=300).returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("resume") / "whole"
    assert compile_in_a_process(output) == 0
    return output


@pytest.mark.parametrize("moment", ["prune blocks.2", "tune"])
def test_a_killed_run_resumes_to_the_same_bytes(tmp_path: Path, whole: Path, moment: str) -> None:
    assert compile_in_a_process(tmp_path / "killed", moment) == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    finished = {path.name for path in (tmp_path / "killed.partial" / "segments").glob("*.safetensors")}
    assert len(finished) == (2 if moment == "prune blocks.2" else 4)
    assert compile_in_a_process(tmp_path / "killed", resume="resume") == 0
    weights = (folder / "model.safetensors" for folder in (whole, tmp_path / "killed"))
    assert next(weights).read_bytes() == next(weights).read_bytes()
    assert not (tmp_path / "killed.partial").exists()


def test_a_model_that_differs_only_outside_its_sites_is_not_resumed(tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise Killed

    recipe = sc.Recipe((sc.make_rule("*", sc.NM(2, 4), sc.Magnitude()),))
    module = seeded(Mlp)
    options = sc.Options(output=tmp_path / "out", onnx=False, tokens=(1,))
    with pytest.raises(Killed):
        sc.compile(module, mlp_batches(), recipe=recipe, options=options, progress=kill)
    with pytest.raises(ExportError, match="finished segments of a run that was stopped"):
        sc.compile(module, mlp_batches(), recipe=recipe, options=options)
    with torch.no_grad():
        module.get_submodule("blocks.0.norm").bias += 1.0  # type: ignore[operator]
    with pytest.raises(DataError, match="another model, data, recipe"):
        sc.compile(module, mlp_batches(), recipe=recipe, options=replace(options, resume=True))
