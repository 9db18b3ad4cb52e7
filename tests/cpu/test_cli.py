"""The command line: what it accepts, what it says when it fails, and its exit status. Models are not touched here."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

import sparsify_compiler as sc
from sparsify_compiler.api import Inspection, SiteInspection
from sparsify_compiler.cli import compile as cli_compile
from sparsify_compiler.cli import guard as cli_guard
from sparsify_compiler.cli import jobs as cli_jobs
from sparsify_compiler.cli import measure as cli_measure
from sparsify_compiler.cli.guard import guard, sentence
from sparsify_compiler.cli.jobs import read_npz
from sparsify_compiler.cli.main import VERBS, build_app
from sparsify_compiler.cli.options import token_counts
from sparsify_compiler.cli.progress import _Lines, draw_progress
from sparsify_compiler.cli.requests import (
    CompileRequest,
    ExportRequest,
    RecipeChoice,
    check_output,
)
from sparsify_compiler.cli.tables import draw_evaluation
from sparsify_compiler.errors import DataError, ExportError, PatternError, RecipeError
from sparsify_compiler.export.onnx_model import WrittenOnnx
from sparsify_compiler.export.report import FileReport, Quality, Report, SiteReport, Verification
from sparsify_compiler.graph import Site
from sparsify_compiler.pattern import NM, Unstructured
from sparsify_compiler.pipeline.environment import command, environment
from sparsify_compiler.progress import Progress
from sparsify_compiler.recipe import format_recipe

ROOT = Path(__file__).resolve().parents[2]
NAMES = [verb[0] for verb in VERBS]
REPORT = Report(
    model="tiny",
    command="",
    created="",
    environment={},
    recipe="",
    sites=(SiteReport("fc", "Linear", (4, 4), 1, "pruned", pattern="2:4", method="sparsegpt", sparsity=0.5),),
    files=(FileReport("model.onnx", 10),),
)


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Run the program in this process: its status, what it said on stdout, and on stderr."""
    result = CliRunner().invoke(build_app(), list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def asked(monkeypatch: pytest.MonkeyPatch) -> list[CompileRequest]:
    """Collect the requests that `compile` makes instead of carrying them out."""
    requests: list[CompileRequest] = []

    def take(request: CompileRequest, progress: Progress) -> Report:
        requests.append(request)
        return REPORT

    monkeypatch.setattr(cli_compile, "compile_model", take)
    return requests


@pytest.mark.parametrize("verb", NAMES)
def test_the_help_of_every_verb_has_an_example(verb: str) -> None:
    status, said, _ = invoke(*verb.split(), "--help")
    assert status == 0
    assert "Example" in said
    assert f"sparsify-compiler {verb}" in said
    assert "--debug" in said


@pytest.mark.parametrize("verb", VERBS, ids=NAMES)
def test_the_examples_in_the_help_can_be_parsed(verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    command = typer.main.get_command(build_app())
    for word in verb[0].split():
        command = command.commands[word]  # type: ignore[attr-defined]
    for example in verb[2:]:
        said, _, options = example.partition(f"{verb[0]} ")
        assert said == "sparsify-compiler "
        assert command.make_context(verb[0], options.split()).params["debug"] is False


def test_the_version_is_printed() -> None:
    status, said, _ = invoke("--version")
    assert (status, said) == (0, f"sparsify-compiler {sc.__version__}\n")


def test_the_version_is_that_of_the_source_where_the_metadata_are_of_an_older_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "0.0.1")  # an editable install that was not made anew
    assert invoke("--version")[1] == f"sparsify-compiler {sc.__version__}\n"
    assert environment(torch.device("cpu"))["sparsify-compiler"] == sc.__version__ != "0.0.1"


def test_compile_prunes_to_2_4_with_sparsegpt_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requests = asked(monkeypatch)
    status, said, _ = invoke("compile", "m.onnx", "-o", str(tmp_path / "out"))
    assert status == 0
    (rule,) = requests[0].recipe.rules
    assert (rule.sites, rule.pattern, rule.sparsity, rule.method.name) == ("*", NM(2, 4), 0.5, "sparsegpt")
    assert rule.refit
    options = requests[0].options
    assert (options.dtype, options.device, options.tokens) == ("float32", "auto", (1, 16, 2048))
    assert options.onnx
    assert options.onnx_flavour == "packed"
    assert "model.onnx" in said


def test_the_demo_is_a_compile_of_its_own_model_and_text(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requests = asked(monkeypatch)
    monkeypatch.setattr(cli_jobs, "demo_model_path", lambda: tmp_path / "smollm2.gguf")
    assert invoke("demo", "-o", str(tmp_path / "out"))[0] == 0
    (request,) = requests
    (rule,) = request.recipe.rules
    assert (request.model, str(rule.pattern), rule.method.name) == (str(tmp_path / "smollm2.gguf"), "2:4", "sparsegpt")
    assert (request.choice.windows, request.choice.sequence_length) == (16, 1024)
    for text in (request.calibration, request.heldout):
        assert text is not None
        assert Path(text).is_file()


def test_every_option_of_compile_reaches_the_request(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requests = asked(monkeypatch)
    out = tmp_path / "out"
    words = f"compile hf/ -o {out} --calibration a.txt --heldout b.txt --method magnitude --pattern unstructured"
    words += " --sparsity 0.7 --keep-dense *head --keep-dense *embed --dtype bfloat16 --device cpu --tokens 4,8,4"
    words += " --windows 3 --sequence-length 64 --batch-size 2 --seed 5 --resume --require-sparse --onnx-flavour trt"
    words += " --kv-cache --no-refit --trust --preprocess size=32"
    status, _, _ = invoke(*words.split())
    assert status == 0
    (request,) = requests
    (rule,) = request.recipe.rules
    assert (rule.pattern, rule.sparsity, rule.method.name, rule.refit) == (Unstructured(), 0.7, "magnitude", False)
    assert request.recipe.keep_dense == ("*head", "*embed")
    assert (request.model, request.calibration, request.heldout, request.trust) == ("hf/", "a.txt", "b.txt", True)
    options, choice = request.options, request.choice
    assert (options.output, options.dtype, options.device, options.tokens) == (out, "bfloat16", "cpu", (4, 8))
    assert (options.resume, options.require_sparse, options.kv_cache, options.overwrite) == (True, True, True, False)
    assert (options.onnx_flavour, options.seed) == ("trt", 5)
    assert (choice.windows, choice.sequence_length, choice.batch_size, choice.seed) == (3, 64, 2, 5)
    assert choice.preprocess == "size=32"


def test_a_recipe_file_is_read_and_keep_dense_adds_to_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requests = asked(monkeypatch)
    written = RecipeChoice(pattern="4:8", keep_dense=("a",)).recipe()
    (tmp_path / "r.toml").write_text(format_recipe(written), encoding="utf-8")
    arguments = ["compile", "m", "-o", str(tmp_path / "out"), "--recipe", str(tmp_path / "r.toml")]
    assert invoke(*arguments, "--keep-dense", "b")[0] == 0
    assert requests[0].recipe.rules == written.rules
    assert requests[0].recipe.keep_dense == ("a", "b")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--pattern", "2:q"], "pattern '2:q': write unstructured, kept:of as in 2:4"),
        (["--method", "magic"], "--method 'magic': unknown; choose one of"),
        (["--pattern", "unstructured"], "needs a sparsity"),
        (["--pattern", "unstructured", "--sparsity", "1"], "sparsity 1.0 must lie in [0, 1)"),
        (["--pattern", "unstructured", "--sparsity", "-0.1"], "must lie in [0, 1)"),
        (["--pattern", "unstructured", "--sparsity", "nan"], "must lie in [0, 1)"),
        (["--sparsity", "0.7"], "pattern 2:4 removes 0.5 of the weights, sparsity 0.7 was asked"),
        (["--recipe", "r.toml", "--method", "wanda"], "--recipe and --method were both given"),
        (["--recipe", "r.toml", "--no-refit"], "--recipe and --no-refit were both given"),
        (["--recipe", "r.toml", "--refit"], "--recipe and --refit were both given"),
        (["--recipe", "r.toml", "--swaps", "0"], "--recipe and --swaps were both given"),
        (["--recipe", "r.toml", "--step", "distill"], "--recipe and --step were both given"),
        (["--step", "polish"], "--step 'polish': unknown; choose one of allocate, permute, finetune"),
        (
            ["--share-batches"],
            "--share-batches gives every round all calibration batches, and nothing is pruned in more",
        ),
        (["--share-batches", "--rounds", "1"], "ask for more (--rounds 3,"),
        (["--step", "finetune"], "finetune stands between rounds, and there is one"),
        (["--recipe", "absent.toml"], "--recipe 'absent.toml': cannot be read (No such file or directory)"),
    ],
)
def test_bad_usage_is_one_sentence_and_status_2(
    arguments: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requests = asked(monkeypatch)
    status, said, complaint = invoke("compile", "m", "-o", str(tmp_path / "out"), *arguments)
    assert (status, said, requests) == (2, "", [])
    assert sentence in complaint
    assert complaint.count("\n") == 1
    assert "Traceback" not in complaint


@pytest.mark.parametrize("text", ["", "1,,2", "0", "1.5", "-1", "a", "1;2", "²"])
def test_token_counts_are_whole_numbers(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="whole numbers"):
        token_counts(text)


def test_token_counts_keep_their_order_and_lose_repeats() -> None:
    assert token_counts(" 16, 1,16") == (16, 1)


def test_a_file_that_is_there_is_only_replaced_when_asked(tmp_path: Path) -> None:
    file = tmp_path / "y.npz"
    check_output(file, overwrite=False)
    file.write_text("kept", encoding="utf-8")
    check_output(file, overwrite=True)
    with pytest.raises(ExportError, match="exists already"):
        check_output(file, overwrite=False)
    with pytest.raises(ExportError, match="is a folder"):
        check_output(tmp_path, overwrite=True)
    with pytest.raises(ExportError, match="there is no folder"):
        check_output(tmp_path / "absent" / "y.npz", overwrite=True)


def test_an_output_folder_that_is_taken_is_refused_before_the_model_is_read(tmp_path: Path) -> None:
    status, _, complaint = invoke("compile", str(tmp_path / "absent.onnx"), "-o", str(tmp_path))
    assert status == 2
    assert "exists" in complaint
    assert "absent" not in complaint


def fail(error: BaseException) -> object:
    def job(*arguments: object) -> None:
        raise error

    return job


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (PatternError("layer 'a':\n does not tile"), 2, "error: layer 'a': does not tile\n"),
        (OSError(28, "No space left on device", "OUT/x"), 2, "cannot read or write 'OUT/x': No space left on device"),
        (MemoryError(), 2, "out of memory"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_failing_compile_says_one_sentence(
    error: BaseException, status: int, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli_compile, "compile_model", fail(error))
    found, said, complaint = invoke("compile", "m", "-o", str(tmp_path / "out"))
    assert (found, said, complaint.count("\n")) == (status, "", 1)
    assert words in complaint


def test_an_interruption_offers_to_resume_only_where_a_segment_was_finished(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(cli_compile, "compile_model", fail(KeyboardInterrupt()))
    assert "--resume" not in invoke("compile", "m", "-o", str(tmp_path / "out"))[2]

    def stopped(request: CompileRequest, progress: Progress) -> Report:
        (tmp_path / "out.partial" / "segments").mkdir(parents=True)
        (tmp_path / "out.partial" / "segments" / "segment-0000.safetensors").touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(cli_compile, "compile_model", stopped)
    status, _, complaint = invoke("compile", "m", "-o", str(tmp_path / "out"))
    assert status == 130
    assert "--resume to go on" in complaint


@pytest.mark.parametrize("verb", [("compile", "m"), ("demo",)])
def test_what_a_stopped_run_finished_is_neither_dropped_nor_taken_unasked(
    verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requests = asked(monkeypatch)
    monkeypatch.setattr(cli_jobs, "demo_model_path", lambda: tmp_path / "smollm2.gguf")
    segment = tmp_path / "out.partial" / "segments" / "segment-0000.safetensors"
    segment.parent.mkdir(parents=True)
    segment.touch()
    arguments = (*verb, "-o", str(tmp_path / "out"))
    status, _, complaint = invoke(*arguments)
    assert (status, requests, segment.exists()) == (2, [], True)
    assert "out.partial holds the finished segments of a run that was stopped" in complaint
    assert "--resume" in complaint
    assert "--overwrite" in complaint
    assert invoke(*arguments, "--resume")[0] == invoke(*arguments, "--overwrite")[0] == 0
    assert [(r.options.resume, r.options.overwrite) for r in requests] == [(True, False), (False, True)]


def test_text_given_to_run_is_called_no_npz_without_advice_from_numpy(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("some text", encoding="utf-8")
    with pytest.raises(DataError, match=r"not an \.npz") as caught:
        read_npz(tmp_path / "train.txt")
    assert "pickle" not in str(caught.value)


def test_debug_shows_the_traceback_before_the_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_compile, "compile_model", fail(DataError("no such data")))
    status, _, complaint = invoke("compile", "m", "-o", str(tmp_path / "out"), "--debug")
    assert status == 2
    assert "Traceback" in complaint
    assert complaint.endswith("error: no such data\n")


def test_our_own_bugs_and_closed_pipes_pass_through_the_guard() -> None:
    for error in (ZeroDivisionError("ours"), BrokenPipeError()):
        with pytest.raises(type(error)), guard(debug=False):
            raise error


def test_control_characters_in_a_message_are_not_sent_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), guard(debug=False):
        raise RecipeError("site '\x1b[31m[bold]'")
    assert capfd.readouterr().err == "error: site '\\x1b[31m[bold]'\n"


def run_program(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `main` in a process of its own after `code`."""
    imports = "import sys\nfrom sparsify_compiler import cli\nfrom sparsify_compiler.cli import compile as cli_compile"
    program = f"{imports}\n{code}\ncli.main()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "200", **environment},
        check=False,
    )


BUG = "def job(*a):\n    raise ZeroDivisionError('ours')\ncli_compile.compile_model = job"


def test_a_bug_of_ours_is_one_line_and_status_1(tmp_path: Path) -> None:
    done = run_program(BUG, "compile", "m", "-o", str(tmp_path / "out"))
    assert done.returncode == 1
    assert done.stderr == "internal error: ZeroDivisionError: ours; run again with --debug for the traceback\n"


def test_a_bug_of_ours_shows_its_traceback_with_debug(tmp_path: Path) -> None:
    done = run_program(BUG, "compile", "m", "-o", str(tmp_path / "out"), "--debug")
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.rstrip().endswith("ZeroDivisionError: ours")


def test_the_process_leaves_with_the_status_of_the_verb(tmp_path: Path) -> None:
    done = run_program("", "compile", str(tmp_path / "absent.onnx"), "-o", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "absent.onnx" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_python_m_is_the_command_with_its_status_and_its_name_in_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["inspect", str(tmp_path / "absent.onnx")]
    words = [sys.executable, "-m", "sparsify_compiler", *arguments]
    done = subprocess.run(words, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith(f"error: model '{tmp_path}/absent.onnx': no such")
    for program in ("bin/sparsify-compiler", str(ROOT / "sparsify_compiler" / "__main__.py")):
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        assert command() == f"sparsify-compiler inspect {tmp_path}/absent.onnx"
    monkeypatch.setattr(sys, "argv", ["their_package/__main__.py"])
    assert command("inspect") == "sparsify_compiler.inspect(...)"


def test_run_reads_and_writes_named_arrays(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy"]
    graph = onnx.helper.make_graph([node], "double", value[:1], value[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    np.savez(tmp_path / "x.npz", x=np.array([1, 2], dtype=np.float32))
    arguments = ["run", str(tmp_path / "m.onnx"), "--input", str(tmp_path / "x.npz"), "-o", str(tmp_path / "y.out")]
    status, said, _ = invoke(*arguments)
    assert (status, said) == (0, "y float32 (2,)\n")
    assert np.load(tmp_path / "y.out")["y"].tolist() == [2.0, 4.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.onnx", "x.npz", "y.out"]
    assert invoke(*arguments)[0] == 2  # y.out is there already


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut short", b"\x93NUMPY"])
def test_run_names_inputs_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"not an \.npz"):
        read_npz(tmp_path / "x.npz")
    with pytest.raises(DataError, match="no such file"):
        read_npz(tmp_path / "absent.npz")


def test_inputs_that_hold_pickles_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.array([{}], dtype=object))
    with pytest.raises(DataError, match="plain arrays"):
        read_npz(tmp_path / "x.npz")


def test_inspect_draws_every_site_and_reason_and_writes_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    sites = [
        Site(
            f"layers.{i}.fc",
            "Linear",
            "w",
            (64, 32),
            64,
            32,
            1,
            32,
            None,
            "x",
            0,
            refusal=None if i else "is used twice",
        )
        for i in range(40)
    ]
    rows = tuple(SiteInspection(site, 512, {"2:4": None, "64x64": "does not tile"}, {"dense": None}) for site in sites)
    inspection = Inspection(rows, 2**20, 75.0, ("a remark",))
    monkeypatch.setattr(cli_measure, "inspect_model", lambda request, progress: inspection)
    status, said, _ = invoke("inspect", "m.onnx")
    assert status == 0
    for words in (
        "m.onnx: 40 sites in 2 rows",
        "layers.{1-39}.fc",
        "cannot be pruned: is used twice (layers.0.fc)",
        "pattern 64x64: does not tile (layers.{1-39}.fc)",
        "1.0 MiB",
        "1 min 15 s",
        "a remark",
    ):
        assert words in said, words
    table = json.loads(invoke("inspect", "m.onnx", "--json")[1])
    assert [row["site"]["name"] for row in table["rows"]] == [site.name for site in sites]
    assert table["rows"][0]["patterns"]["64x64"] == "does not tile"


def test_report_shows_a_saved_report_and_names_a_missing_or_damaged_one(tmp_path: Path) -> None:
    status, _, complaint = invoke("report", str(tmp_path))
    assert (status, "has no report.json" in complaint) == (2, True)
    (tmp_path / "report.json").write_text('{"sites": 3}', encoding="utf-8")
    status, _, complaint = invoke("report", str(tmp_path))
    assert (status, "is damaged" in complaint) == (2, True)
    (tmp_path / "report.json").write_text(REPORT.to_json(), encoding="utf-8")
    status, said, _ = invoke("report", str(tmp_path))
    assert (status, "1 pruned" in said) == (0, True)
    assert "not:" not in said
    (tmp_path / "sparsify.json").write_text("{}", encoding="utf-8")
    status, said, _ = invoke("report", str(tmp_path))
    assert status == 0
    assert "the model beside it is not: " in said
    assert "no model.safetensors" in said


def test_export_writes_beside_the_artefact_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requests: list[ExportRequest] = []

    def take(request: ExportRequest) -> WrittenOnnx:
        requests.append(request)
        checked = Verification(True, 1e-6, 1e-4, "CPUExecutionProvider")
        return WrittenOnnx((FileReport("model.onnx", 2048),), checked, {}, ("a note",))

    monkeypatch.setattr(cli_compile, "export_artefact", take)
    status, said, _ = invoke("export", str(tmp_path), "--onnx-flavour", "dense", "--kv-cache")
    assert status == 0
    assert said.splitlines()[0] == f"written: {tmp_path / 'model.onnx'}, 2.0 KiB"
    assert said.splitlines()[1].startswith("passed in CPUExecutionProvider")
    assert said.splitlines()[2] == "a note"
    assert requests == [ExportRequest(tmp_path, tmp_path / "model.onnx", "dense", kv_cache=True)]
    (tmp_path / "model.onnx").write_bytes(b"kept")
    assert invoke("export", str(tmp_path))[0] == 2


def drawn(renderable: object, width: int = 100) -> str:
    console = Console(file=StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def test_an_evaluation_shows_the_dense_value_only_where_there_is_one() -> None:
    alone = drawn(draw_evaluation("m", (Quality("perplexity", None, 30.0, "text"),), 100))
    beside = drawn(draw_evaluation("m", (Quality("perplexity", 20.0, 30.0, "text"),), 100))
    assert "dense" not in alone
    assert beside.splitlines()[-1].split()[:4] == ["perplexity", "20", "30", "1.50x"]


def test_without_a_terminal_progress_is_a_line_a_stage_and_one_every_ten_seconds() -> None:
    now = 0.0
    console = Console(file=StringIO(), width=200, force_terminal=False)
    lines = _Lines(console, lambda: now)
    with console.capture() as capture:
        for done in range(31):
            lines("calibrate layers.[red]" if done < 30 else "calibrate", done, 30)
            now += 1.0
        lines("export", 0, 2)
    assert capture.get().splitlines() == [
        "calibrate layers.[red]: 0 of 30, 0.0 s",
        "calibrate layers.[red]: 10 of 30, 10 s, about 20 s left",
        "calibrate layers.[red]: 20 of 30, 20 s, about 10 s left",
        "calibrate: 30 of 30, 30 s",
        "export: 0 of 2, 0.0 s",
    ]


def test_on_a_terminal_every_stage_is_a_bar_and_a_stage_that_begins_anew_another() -> None:
    console = Console(file=StringIO(), width=100, force_terminal=True, color_system=None)
    with console.capture() as capture, draw_progress(console) as progress:
        for stage, done, total in (
            ("prune layers.0", 0, 2),
            ("prune", 2, 2),
            ("perplexity", 0, 1),
            ("perplexity", 1, 1),
        ):
            progress(stage, done, total)
        progress("perplexity", 0, 1)
        progress("nothing", 0, 0)
    # Rich draws all bars again and again, from a thread of its own too: the last frame is the last four lines.
    drawn = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capture.get()).replace("\r", "\n").splitlines()
    last = [line for line in drawn if line.strip()][-4:]
    assert [line.split()[0] for line in last] == ["prune", "perplexity", "perplexity", "nothing"]
    assert "2/2" in last[0]


def test_the_sentence_of_an_error_is_one_line() -> None:
    assert sentence(DataError("two\nlines  here")) == "two lines here"
    assert sentence(OSError("odd")) == "cannot read or write: odd; check the path, the rights and the free space"
    assert cli_guard.BAD_INPUT == 2


@pytest.mark.parametrize(
    ("words", "refit"),
    [
        ("--method sparsegpt", True),
        ("--method sparsegpt --no-refit", False),
        ("--method iobs", True),
        ("--method iobs --rounds 2", False),
        ("--method iobs --rounds 2 --refit", True),
        ("--method woodtaylor", False),
        ("--method woodtaylor --refit", True),
    ],
)
def test_the_resolve_is_left_out_where_it_undoes_the_methods_step_unless_asked(
    words: str, refit: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    requests = asked(monkeypatch)
    status, _, _ = invoke("compile", "hf/", "-o", str(tmp_path / "out"), "--calibration", "a.txt", *words.split())
    assert status == 0
    assert [rule.refit for rule in requests[0].recipe.rules] == [refit]
