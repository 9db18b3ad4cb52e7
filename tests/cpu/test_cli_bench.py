"""The verb bench: what it accepts, draws and writes, and what it refuses."""

import dataclasses
import json
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from sparsify_compiler.api_bench import bench
from sparsify_compiler.cli import bench as cli_bench
from sparsify_compiler.cli.bench_tables import draw_bench
from sparsify_compiler.cli.main import build_app
from sparsify_compiler.cli.requests import BenchRequest
from sparsify_compiler.errors import DataError
from sparsify_compiler.export.bench_html import bench_html
from sparsify_compiler.progress import Progress
from sparsify_compiler.runtime.benchmark.ceilings import Ceilings
from sparsify_compiler.runtime.benchmark.layers import LayerBench, LayerRow
from sparsify_compiler.runtime.benchmark.models import BenchRow
from sparsify_compiler.runtime.benchmark.report import BenchReport, bench_report_from_json

ROWS = (
    BenchRow("dense.onnx", 2.0, 0.01, 1.0, 0.0, "base", 20, 100, 2048),
    BenchRow("sparse.onnx", 1.0, 0.02, 2.0, 0.03, "faster", 20, None, 1024),
)


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Run the program in this process: its status, what it said on stdout, and on stderr."""
    result = CliRunner().invoke(build_app(), list(arguments), env={"COLUMNS": "200", "TERM": "dumb"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_bench_draws_a_table_and_writes_json_and_a_plot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    requests: list[BenchRequest] = []

    def take(request: BenchRequest, progress: Progress) -> BenchReport:
        requests.append(request)
        return BenchReport(rows=ROWS)

    monkeypatch.setattr(cli_bench, "bench_models", take)
    files = (tmp_path / "times.json", tmp_path / "times.svg", tmp_path / "times.html")
    asked = ("--json", str(files[0]), "--plot", str(files[1]), "--html", str(files[2]))
    status, said, _ = invoke("bench", "a.onnx", "b.onnx", *asked, "--batch-size", "1,8", "--decode")
    assert status == 0
    assert (requests[0].models, requests[0].samples, requests[0].decode) == (("a.onnx", "b.onnx"), (1, 8), True)
    assert bench_report_from_json(files[0].read_text(encoding="utf-8")).rows == ROWS
    assert "<svg" in files[1].read_text(encoding="utf-8")
    assert "sparse.onnx: 2.00x" in files[2].read_text(encoding="utf-8")
    line = next(line for line in said.splitlines() if line.startswith("sparse.onnx"))
    assert line.split()[:5] == ["sparse.onnx", "1", "ms", "±0.02", "2.00x"]
    assert invoke("bench", "a", "--plot", "times.gif")[0] == 2


def test_bench_times_layers_with_random_weights(tmp_path: Path) -> None:
    asked = (
        "--pattern",
        "2:4,unstructured",
        "--sparsity",
        "0.9",
        "--tokens",
        "1,3",
        "--json",
        str(tmp_path / "b.json"),
    )
    status, said, _ = invoke("bench", "--layers", "64x32", *asked, "--device", "cpu")
    assert status == 0
    assert "random: 64x32 2:4, density 0.5, float32" in said
    found = bench_report_from_json((tmp_path / "b.json").read_text())
    assert [(layer.rows[0].pattern, {row.tokens for row in layer.rows}) for layer in found.layers] == [
        ("2:4", {1, 3}),
        ("unstructured", {1, 3}),
    ]
    assert found.ceilings is not None
    assert all(row.of_limit == pytest.approx(row.limit_us / row.time_us) for row in found.layers[0].rows)


def test_bench_times_a_decoder_with_random_weights(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**sizes, "vocab_size": 50}))
    status, said, _ = invoke(
        "bench", "--config", str(tmp_path), "--device", "cpu", "--repeats", "5", "--batch-size", "2"
    )
    assert status == 0
    assert "decode, batch 2, context 512, 2 layers" in said
    assert "gate_up: " in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "found none of them"),
        (("model.onnx", "--layers", "4x4"), "found MODEL and --layers"),
        (("--layers", "4x"), "write out x in"),
        (("--layers", "64x64", "--pattern", "unstructured", "--device", "cpu"), "give a sparsity"),
        (("--layers", "64x60", "--pattern", "32x32", "--sparsity", "0.5", "--device", "cpu"), "64x60"),
        (("--config", "llama-9"), "llama-3-8b"),
        (("model.onnx", "--batch-size", "0"), "whole numbers of at least 1"),
        (("model.onnx", "--json", "absent/times.json"), "there is no folder 'absent'"),
        (("--layers", "4x4", "--html", "."), "output '.' is a folder"),
        (("model.onnx", "--tokens", "4"), "--tokens does not go with MODEL, which reads --data, --batch-size"),
        (("--layers", "4x4", "--plot", "times.png"), "--plot does not go with --layers"),
        (("--config", "llama-3-8b", "--decode"), "--decode does not go with --config"),
        (("--config", "llama-3-8b", "--pattern", "2:4,16:32"), "one --pattern and one --batch-size a run"),
        (("--config", "llama-3-8b", "--batch-size", "1,8"), "one --pattern and one --batch-size a run"),
    ],
)
def test_bench_refuses_what_it_cannot_time(arguments: tuple[str, ...], said: str) -> None:
    status, _, complaint = invoke("bench", *arguments)
    assert status == 2
    assert said in complaint


def test_a_compiled_folder_that_lacks_its_weights_is_named(tmp_path: Path) -> None:
    (tmp_path / "sparsify.json").write_text("{}")
    status, _, complaint = invoke("bench", "--layers", str(tmp_path))
    assert status == 2
    assert "no model.safetensors; give a folder that compile wrote" in complaint


def test_a_sequence_longer_than_the_model_has_positions_is_refused_before_anything_runs() -> None:
    module = torch.nn.Linear(2, 2)
    module.config = SimpleNamespace(max_position_embeddings=32)  # type: ignore[assignment]
    with pytest.raises(DataError, match="33 tokens for 'Linear': its config says max_position_embeddings 32"):
        bench([module], torch.zeros(1, 4, dtype=torch.long), lengths=(8, 33))


@pytest.mark.parametrize("width", [80, 120, 200])
def test_a_table_of_any_width_keeps_the_spread_and_every_heading_whole(width: int) -> None:
    report = full_report()
    words = "no difference beyond the spread"
    rows = tuple(
        dataclasses.replace(report.rows[0], label=f"a-model-of-some-size-{i}", verdict=words, speedup_spread=0.21)
        for i in range(3)
    )
    layer = report.layers[0]
    slow = dataclasses.replace(layer.rows[1], kernel="cusparse_blocked_ell", time_us=12345.0, verdict=f"{words}: 1x")
    layer = dataclasses.replace(layer, rows=(*layer.rows, slow))
    console = Console(file=StringIO(), width=width, color_system=None)
    console.print(draw_bench(dataclasses.replace(report, rows=rows, layers=(layer,)), width))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, said.splitlines())) <= width
    for heading in ("median ±spread", "tokens", "kernel", "time", "verdict", "of limit"):
        assert heading in said
    assert said.count("speedup ") >= 2
    assert "2 ms ±0.10" in said
    assert "cusparse_blocked_ell" in said
    assert "…" not in said


def full_report() -> BenchReport:
    row = LayerRow("fc <b>", (8, 4), "2:4", 0.5, "float16", 1, "dense", 2.0, 1.0, 0.0, "base", 1.0, 0.5, 64)
    fast = LayerRow("fc <b>", (8, 4), "2:4", 0.5, "float16", 1, "fast", 1.0, 2.0, 0.1, "faster: 2.00x", 0.5, 0.5, 40)
    layer = LayerBench((row, fast), "1: fast", "1 tokens: faster", (("csr", "no <i> here"),))
    case = BenchRow("m", 2.0, 0.1, 1.0, 0.0, "base", 9, case="batch 1, 4 tokens", tokens=4)
    machine = (("device", "cuda:0"), ("GPU", "toy"))
    return BenchReport(machine, "random", Ceilings("toy", "float16", 1e12, 1e14), (case,), (layer,), ("m: no graph",))


def test_a_reason_against_kernels_is_said_once_for_all_layers() -> None:
    report = full_report()
    layer = dataclasses.replace(report.layers[0], refused=(("csr", "no <i> here"), ("ell", "no <i> here")))
    console = Console(file=StringIO(), width=120, color_system=None)
    console.print(draw_bench(dataclasses.replace(report, layers=(*report.layers, layer)), 120))
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("no <i> here") == 1
    assert "could not run: csr, ell: no <i> here" in said


def test_a_benchmark_file_round_trips_and_older_ones_are_read() -> None:
    report = full_report()
    assert bench_report_from_json(report.to_json()) == report
    assert json.loads(report.to_json())["rows"][0]["tokens_per_s"] == 2000
    old = {"label": "a", "median_ms": 1.0, "spread": 0.1, "speedup": 1.0, "speedup_spread": 0.0, "verdict": "faster"}
    read = bench_report_from_json(json.dumps([old | {"repeats": 5, "peak_memory_bytes": None, "size_bytes": 7}]))
    assert (read.rows[0].size_bytes, read.rows[0].case, read.machine) == (7, "", ())


@pytest.mark.parametrize("text", ["", "{}", "3", '{"format": 99}', '[{"label": 1}]', '{"format": 2, "machine": 3}'])
def test_what_is_no_benchmark_file_is_refused(text: str) -> None:
    with pytest.raises(DataError, match=r"not a benchmark file|update"):
        bench_report_from_json(text)


def test_the_page_shows_every_row_the_machine_and_reasons_as_text_never_as_markup() -> None:
    page = bench_html(full_report())
    for words in (
        "batch 1, 4 tokens",
        "fc &lt;b&gt;",
        "no &lt;i&gt; here",
        "GPU toy",
        "1,000 GB/s",
        "fast: 2.00x",
        "m: no graph",
    ):
        assert words in page
    assert "<i>" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_the_page_names_every_bar_and_is_green_only_where_something_is_faster() -> None:
    rows = tuple(
        BenchRow(f"model-{n}, CUDA graph", 2.0, 0.1, ratio, 0.0, verdict, 9)
        for n, (ratio, verdict) in enumerate(((1.0, "base"), (1.5, "faster"), (1.4, "too noisy to tell")))
    )
    page = bench_html(BenchReport(rows=rows, inputs="batch 1; batch 8"))
    assert "<h1>Benchmark: model-0, model-1, model-2</h1>" in page
    bars = page.split('class="ratio"')[1:]
    assert [f'class="who">model-{n}, CUDA graph<' in bar for n, bar in enumerate(bars)] == [True] * 3
    assert ["bar win" in bar for bar in bars] == [False, True, False]
    alone = bench_html(dataclasses.replace(full_report(), rows=()))
    assert "<h1>Benchmark: single layers</h1>" in alone
    both = dataclasses.replace(full_report(), layers=full_report().layers * 2)
    assert bench_html(both).count("no &lt;i&gt; here") == 1
