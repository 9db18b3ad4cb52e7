"""The report: its data, its drawing for a terminal, as a picture and as a page. Oracles are read off by hand."""

import dataclasses
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.text import Text

from sparsify_compiler.export.report import (
    FileReport,
    Quality,
    Report,
    SiteReport,
    StepReport,
    Timing,
    Verification,
    report_from_json,
)
from sparsify_compiler.export.report_charts import HEIGHT, error_charts, speed_charts
from sparsify_compiler.export.report_html import report_html, save_html
from sparsify_compiler.export.report_rows import (
    best_timings,
    duration,
    error_selected,
    fold,
    fold_names,
    printable,
    recipe_words,
    size,
    weights_removed,
)
from sparsify_compiler.export.report_table import Column, table
from sparsify_compiler.export.report_text import report_text, save_svg

RECIPE = """keep_dense = ["*head"]

[[rule]]
sites = "*"
pattern = "2:4"
method = "sparsegpt"
options = { damp = 0.01 }
"""
HOSTILE = '<script>alert("x")</script>[red]\x1b[31m'


def make_site(name: str, error: float | None = 0.25, kernel: str = "dense", **changes: object) -> SiteReport:
    site = SiteReport(
        name=name,
        kind="Linear",
        shape=(64, 32),
        groups=1,
        status="pruned",
        pattern="2:4",
        method="sparsegpt",
        sparsity=0.5,
        tokens=16384,
        loss_selected=None if error is None else 3.0 * error,
        loss=None if error is None else 2.0 * error,
        relative_error=error,
        damp=0.01,
        seconds=1.5,
        kernel=kernel,
        reason=f"{kernel} won on {name}",
        refused_kernels={"nm_mma": "needs a CUDA GPU; found a CPU"},
        timings=(
            Timing("torch_csr", 1, 50.0, 100.0, 0.02, 2.0 if kernel != "dense" else 0.5, "measured"),
            Timing("torch_csr", 16, 50.0, 60.0, 0.04, 1.2 if kernel != "dense" else 0.4, "measured"),
        ),
        dense_bytes=8192,
        packed_bytes=4608,
        onnx="ai.sparsify::NMLinear",
    )
    return dataclasses.replace(site, **changes)  # type: ignore[arg-type]


def make_report(sites: tuple[SiteReport, ...], **changes: object) -> Report:
    report = Report(
        model="tiny model",
        command="sparsify-compiler compile tiny -o OUT",
        created="2026-01-02T03:04:05",
        environment={"torch": "2.13.0"},
        recipe=RECIPE,
        sites=sites,
        quality=(Quality("perplexity", 20.0, 30.0, "held-out text"),),
        files=(FileReport("model.onnx", 1536, 3072), FileReport("report.html", 100)),
        verification=Verification(True, 2e-6, 1e-4, "CPUExecutionProvider"),
        seconds={"trace": 4.0, "prune": 61.0},
        peak_memory_bytes=3 * 2**30,
        notes=("exported without a key-value cache",),
    )
    return dataclasses.replace(report, **changes)  # type: ignore[arg-type]


def deep_report(layers: int = 30) -> Report:
    """`layers` layers of two sites, one of them special, a head left dense and a refused convolution."""
    sites = []
    for layer in range(layers):
        sites.append(make_site(f"model.layers.{layer}.self_attn.q_proj", error=0.001 * (layer + 1)))
        fast = "dense" if layer == 3 else "torch_csr"
        sites.append(make_site(f"model.layers.{layer}.mlp.up_proj", error=0.5, kernel=fast))
    sites.append(SiteReport("lm_head", "Linear", (96, 32), 1, "dense", reason="the embedding reads it too"))
    sites.append(SiteReport("dw", "Conv1d", (32, 1, 3), 32, "refused", reason="a depthwise convolution"))
    return make_report(tuple(sites))


def trained_report(best: int, kept: bool) -> Report:
    """A segment that reconstruction `kept` or not, and three epochs of distillation of which `best` is kept."""
    data = "the calibration batches themselves, too few to keep one aside"
    epochs = [
        StepReport("distill", f"epoch {n}", "relative error", None, 0.1 if n else None, 0.2, n == best, data)
        for n in range(3)
    ]
    segment = StepReport("reconstruct", "blocks.0", "relative error", 0.3, 0.2, None, kept)
    return make_report((make_site("fc"),), steps=(segment, *epochs), recipe=f"rounds = 2\n{RECIPE}")


@pytest.mark.parametrize(
    ("report", "words"),
    [
        (make_report((make_site("fc"),)), "as pruning left it"),
        (trained_report(0, False), "as pruning left it"),
        (trained_report(2, False), "as pruning left it, before distill moved the weights"),
        (trained_report(1, True), "as pruning left it, before reconstruct and distill moved the weights"),
    ],
)
def test_errors_of_sites_are_said_to_be_those_before_any_training(report: Report, words: str) -> None:
    assert f"over the calibration tokens, {words}." in " ".join(report_text(report, 200).split())
    assert f"</span>{words}</span>" in report_html(report)


def test_what_was_chosen_by_calibration_data_is_not_called_held_out() -> None:
    report = trained_report(1, True)
    report = dataclasses.replace(report, quality=())  # the user's own description of the data that quality is of
    for drawing in (report_text(report, 200), report_html(report)):
        assert "held" not in drawing
        assert "chosen by" in drawing
        assert "on the calibration batches themselves, too few to keep one aside is kept" in " ".join(drawing.split())


def test_a_report_survives_json() -> None:
    report = deep_report(2)
    assert report_from_json(report.to_json()) == report
    bare = make_report((), quality=(), files=(), verification=None, notes=())
    assert report_from_json(bare.to_json()) == bare


@pytest.mark.parametrize(
    ("names", "folded"),
    [
        (["a.0.x", "a.1.x", "a.3.x"], "a.{0-1,3}.x"),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0", "l.1.e.1"], "l.{0-1}.e.{0-1}"),
        (["l.0.e.0", "l.0.e.1", "l.1.e.0"], "l.0.e.{0-1}, l.1.e.0"),  # l.1.e.1 is absent and must not be claimed
        (["a.0.0", "a.0.0", "a.1.1", "a.0.1"], "a.0.0, a.0.0, a.0.1, a.1.1"),  # four names, but not the four of 2 x 2
        (["b", "a.1", "b"], "b, a.1, b"),
        (["conv1", "conv2", "head"], "conv{1-2}, head"),
        (["n.007", "n.008"], "n.{007,008}"),
        ([], ""),
    ],
)
def test_a_folded_name_claims_exactly_its_members(names: list[str], folded: str) -> None:
    assert sorted(fold_names(names).split(", ")) == sorted(folded.split(", "))


def test_folding_expands_back_to_the_same_names() -> None:
    names = [f"l.{i}.{part}.{j}" for i in range(5) for part in "qkv" for j in range(3) if (i, j) != (2, 1)]
    rows = fold(names, str, lambda item: 0)
    assert sorted(member for _, members in rows for member in members) == sorted(names)
    assert sorted(name for row, _ in rows for name in expand(row)) == sorted(names)


def expand(folded: str) -> list[str]:
    """Write a folded name out again, as a reader would."""
    braces = re.search(r"\{([^}]*)\}", folded)
    if braces is None:
        return [folded]
    written = []
    for part in braces[1].split(","):
        first, _, last = part.partition("-")
        for value in range(int(first), int(last or first) + 1):
            written += expand(folded[: braces.start()] + str(value) + folded[braces.end() :])
    return written


def test_items_that_were_decided_otherwise_are_not_folded() -> None:
    assert [row[0] for row in fold(["a.1", "a.2", "a.3"], str, lambda item: item == "a.2")] == ["a.{1,3}", "a.2"]


@pytest.mark.parametrize("width", [80, 100, 120, 160])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    report = deep_report()
    long = make_site("a." * 60 + "z", reason="", notes=("a note that is long " * 12,))
    report = dataclasses.replace(report, sites=(*report.sites, long), command="x" * 300)
    assert max(Text(line).cell_len for line in report_text(report, width).splitlines()) <= width


def test_the_text_says_all_that_was_found() -> None:
    text = report_text(deep_report(), 120)
    for words in (
        "tiny model",
        "every site: 2:4, sparsegpt (damp 0.01), kept weights re-solved",
        "dense: *head",
        "60 pruned, 1 dense, 1 refused",
        "perplexity 20 → 30  (1.50x, held-out text)",
        "1 min 05 s (trace 4.0 s, prune 1 min 01 s)",
        "3.0 GiB at the peak",
        "model.onnx  3.0 KiB dense → 1.5 KiB, 0.50x",
        "passed in CPUExecutionProvider: largest difference 2e-06",
        "the embedding reads it too",
        "a depthwise convolution",
        "Kernels not eligible at 60 sites\n • nm_mma: needs a CUDA GPU; found a CPU\n",
        "exported without a key-value cache",
    ):
        assert words in text, words


def test_many_sites_fold_with_the_range_of_their_errors() -> None:
    text = report_text(deep_report(), 120)
    row = next(line for line in text.splitlines() if line.startswith("model.layers.{0-29}.self_attn.q_proj"))
    assert "0.0010–0.0300" in row  # as it ended
    assert "0.0015–0.0450" in row  # before the re-solve, 3 / 2 of it
    assert "model.layers.{0-2,4-29}.mlp.up_proj" in text
    assert "model.layers.3.mlp.up_proj" in text
    assert "largest error: model.layers.0.mlp.up_proj, 0.5000" in text


def test_the_reasons_for_a_kernel_are_told_or_counted() -> None:
    few = report_text(make_report((make_site("a", kernel="torch_csr"), make_site("b", reason="same"))), 120)
    assert " • a: torch_csr won on a" in few
    assert " • b: same" in few
    assert "48 more reasons, each of fewer sites: see report.html." in report_text(deep_report(), 120)  # 60 less 12
    every = make_report((make_site("a", reason="same"), make_site("b", reason="same")))
    assert " • all 2 sites: same" in report_text(every, 120)


def test_a_reason_against_kernels_is_said_once_with_its_kernels_and_sites() -> None:
    both = {"a": "runs on cuda; found cpu", "b": "runs on cuda; found cpu", "c": "needs 2:4; found 64x64"}
    sites = (
        make_site("x", refused_kernels=both),
        make_site("y", refused_kernels={**both, "c": "needs 2:4; found 4:8"}),
    )
    text = report_text(make_report((*sites, make_site("z", refused_kernels={"c": "out of memory"}))), 120)
    lines = text.partition("Kernels not eligible at 3 sites\n")[2].splitlines()
    assert lines[:3] == [
        " • a, b: runs on cuda; found cpu (only at x, y)",
        " • c: needs 2:4 (only at x, y)",
        " • c: out of memory (only at z)",
    ]
    page = report_html(make_report(sites))
    assert "a, b: runs on cuda; found cpu; c: needs 2:4; found 64x64" in page


def test_few_sites_have_a_row_each() -> None:
    text = report_text(deep_report(2), 120)
    assert "{" not in text
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        assert name in text


def test_a_narrow_terminal_names_the_columns_it_drops() -> None:
    assert "Too narrow for packed" in report_text(deep_report(), 80)
    assert "Too narrow" not in report_text(deep_report(), 160)


def test_what_every_row_says_is_said_once() -> None:
    cells = [Text("same"), Text("same")]
    parts = list(table("t", [Column("name", [Text("a"), Text("b")]), Column("kind", cells, lift=True)], 80))
    assert len(parts) == 3  # heading, "every row: kind same", the table


def test_the_eligible_and_the_picked_kernels_are_two_lists() -> None:
    text = report_text(make_report((make_site("a", kernel="torch_csr"), make_site("b"))), 120)
    lines = [line.split() for line in text.splitlines()]
    assert "every row: eligible dense, torch_csr" in text
    assert ["a", "torch_csr", "2.00x", "1.20x", "±0.04"] in lines
    assert ["b", "dense", "0.50x", "0.40x", "±0.04"] in lines


def test_a_failed_or_missing_check_is_said() -> None:
    sites = (make_site("a"),)
    failed = Verification(True, 0.5, 1e-4, "CPUExecutionProvider")
    skipped = Verification(False, None, 1e-4, "", "no provider for bfloat16")
    assert "FAILED" in report_text(make_report(sites, verification=failed))
    assert "Failed" in report_html(make_report(sites, verification=failed))
    assert "not run: no provider for bfloat16" in report_text(make_report(sites, verification=skipped))
    assert "no provider for bfloat16" in report_html(make_report(sites, verification=skipped))


def test_a_report_without_data_or_measurements_is_drawn() -> None:
    site = make_site("only", error=None, timings=(), refused_kernels={}, damp=None)
    report = make_report((site,), quality=(Quality("cosine", None, 0.9, ""),), seconds={}, peak_memory_bytes=0)
    assert "no data" in report_text(report, 80)
    assert "no data" in report_html(report)
    assert error_charts(report) == () == speed_charts(report)
    assert "not measured → 0.9" in report_text(report, 80)


def test_terminal_escapes_and_markup_in_names_are_shown_as_text() -> None:
    text = report_text(make_report((make_site(HOSTILE),), model=HOSTILE), 160)
    assert "\x1b" not in text
    assert '<script>alert("x")</script>[red]\\x1b[31m' in text
    assert printable("a\nb\tc\u202e") == "a\nb\\x09c\\x202e"


class Page(HTMLParser):
    """Collect the tags, the attributes that could load something, and the text of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data", "xlink:href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def read(page: str) -> Page:
    parser = Page()
    parser.feed(page)
    parser.close()
    return parser


def test_the_page_has_every_site_and_loads_nothing() -> None:
    report = deep_report()
    page = report_html(report)
    parsed = read(page)
    assert parsed.loads == []
    assert not re.search(r"url\(|@import|https?:", page)
    assert not {"link", "img", "iframe", "object"} & set(parsed.tags)
    for site in report.sites:
        assert site.name in parsed.text
    for words in ("the embedding reads it too", "needs a CUDA GPU; found a CPU", "20 → 30", "0.50x", "Passed"):
        assert words in parsed.text, words


def test_names_from_a_model_are_never_markup_in_the_page() -> None:
    sites = (make_site(HOSTILE, notes=(HOSTILE,)), make_site("b", reason=HOSTILE, kind=HOSTILE, onnx=HOSTILE))
    changes = {"model": HOSTILE, "command": HOSTILE, "recipe": HOSTILE, "notes": (HOSTILE,), "created": HOSTILE}
    plain = read(report_html(make_report((make_site("a"), make_site("b")))))
    hostile = read(report_html(make_report(sites, environment={HOSTILE: HOSTILE}, **changes)))
    assert hostile.tags.count("script") == plain.tags.count("script") == 1
    assert 'alert("x")' in hostile.text
    assert "\x1b" not in hostile.text


def test_bars_are_as_high_as_what_they_stand_for() -> None:
    report = make_report(tuple(make_site(f"l.{i}.fc", error=error) for i, error in enumerate((0.1, 0.2, 0.4, 0.0))))
    (chart,) = error_charts(report)
    after = [bar.height for bar in chart.bars if bar.style == "after"]
    before = [bar.height for bar in chart.bars if bar.style == "before"]
    # heights are rounded to 0.01 units, so ratios hold to that
    assert after[1] == pytest.approx(2 * after[0], abs=0.02)
    assert after[2] == pytest.approx(4 * after[0], abs=0.04)
    assert before[0] == pytest.approx(1.5 * after[0], abs=0.02)
    assert after[3] == 0
    assert all(bar.y >= 0 and bar.y + bar.height <= HEIGHT for bar in chart.bars)
    assert [line.label for line in chart.grid] == ["0", "0.3", "0.6"]


def test_speed_charts_are_one_a_token_count_with_a_line_at_one() -> None:
    charts = speed_charts(make_report((make_site("a", kernel="torch_csr"), make_site("b"))))
    assert [chart.title for chart in charts] == ["1 token", "16 tokens"]
    even = next(line.y for line in charts[0].grid if line.style == "even")
    win, lose = charts[0].bars
    assert (win.style, lose.style) == ("win", "lose")
    assert win.y < even < lose.y


def test_the_timing_shown_is_the_picked_kernels() -> None:
    timings = (Timing("fast", 1, 1.0, 3.0, 0.0, 3.0, ""), Timing("picked", 1, 2.0, 3.0, 0.0, 1.5, ""))
    assert best_timings(make_site("a", kernel="picked", timings=timings))[1].kernel == "picked"
    assert best_timings(make_site("a", kernel="dense", timings=timings))[1].kernel == "fast"


def test_the_picture_and_the_page_are_written(tmp_path: Path) -> None:
    save_svg(deep_report(), tmp_path / "report.svg")
    save_html(deep_report(), tmp_path / "report.html")
    picture = (tmp_path / "report.svg").read_text(encoding="utf-8")
    assert picture.startswith("<svg")
    assert "@font-face" not in picture
    assert "q_proj" in picture
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == report_html(deep_report())


def test_numbers_are_written_for_readers() -> None:
    assert [size(value) for value in (0, 1023, 1536, 3 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "3.0 GiB"]
    assert [duration(value) for value in (0.04, 9.97, 59.7, 185, 7800)] == [
        "0.0 s", "10 s", "1 min 00 s", "3 min 05 s", "2 h 10 min",
    ]  # fmt: skip
    assert error_selected(make_site("a", error=0.2)) == pytest.approx(0.3)  # loss_selected / loss is 3 / 2
    assert weights_removed(make_report((make_site("a"), make_site("b", status="dense")))) == (1024, 4096)


def test_a_recipe_is_told_in_words() -> None:
    toml = '[[rule]]\nsites = "a.*"\npattern = "64x64"\nsparsity = 0.5\nmethod = "wanda"\nrefit = false\n'
    assert recipe_words(toml) == ("a.*: 64x64 at sparsity 0.5, wanda, no re-solve",)
    swapped = toml.replace("refit = false", "refit = false\nswaps = 3")
    assert swapped != toml
    assert recipe_words(swapped)[0].endswith("wanda, up to 3 rounds of swaps, kept weights re-solved")
    assert recipe_words("in words already") == ("in words already",)
