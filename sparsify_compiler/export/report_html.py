"""Draw a report as one HTML file that loads nothing from anywhere. Names from a model are text, never markup."""

import dataclasses
from pathlib import Path

from sparsify_compiler.errors import ExportError
from sparsify_compiler.export.page import page_template
from sparsify_compiler.export.report import FileReport, Report
from sparsify_compiler.export.report_charts import error_charts, speed_charts
from sparsify_compiler.export.report_rounds import ERRORS, anew, missing, share
from sparsify_compiler.export.report_rows import (
    best_timings,
    eligible_kernels,
    error_selected,
    quality_change,
    recipe_words,
    shape_words,
    weights_removed,
)
from sparsify_compiler.export.report_steps import CHOSEN_BY, by_step, decision, moment, trained
from sparsify_compiler.runtime.tuning.verdicts import by_reason


def report_html(report: Report) -> str:
    """Return the report as a page that stands alone: every site, every measurement, every reason."""
    page = page_template("report.html.jinja")
    removed, weights = weights_removed(report)
    dense_bytes = sum(site.dense_bytes for site in report.sites)
    return page.render(
        report=report,
        recipe_words=recipe_words(report.recipe),
        steps=by_step(report.steps),
        quality_change=quality_change,
        shape_words=shape_words,
        best_timings=best_timings,
        by_reason=by_reason,
        eligible_kernels=eligible_kernels,
        error_selected=error_selected,
        removed=removed,
        weights=weights,
        dense_bytes=dense_bytes,
        tokens=sorted({timing.tokens for site in report.sites for timing in site.timings}),
        counts={status: sum(s.status == status for s in report.sites) for status in ("pruned", "dense", "refused")},
        error_charts=error_charts(report),
        share=share,
        missing=missing,
        decision=decision,
        chosen_by=CHOSEN_BY,
        moment=moment(report),
        trained=trained,
        anew=anew,
        errors=ERRORS,
        speed_charts=speed_charts(report),
        highest_error=max((site.relative_error or 0.0 for site in report.sites), default=0.0) or 1.0,
    )


def save_html(report: Report, path: Path) -> None:
    """Write `report_html(report)` to `path` as UTF-8."""
    path.write_text(report_html(report), encoding="utf-8")


def write_report(report: Report, folder: Path) -> Report:
    """Write report.json and report.html into `folder`, listed in themselves. Raises ExportError."""
    names = (FileReport("report.json", 0), FileReport("report.html", 0))
    report = dataclasses.replace(report, files=(*report.files, *names))
    try:
        (folder / "report.html").write_text(report_html(report), encoding="utf-8")
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    except OSError as error:
        raise ExportError(f"cannot write the report: {error.strerror or error}; free some space") from None
    return report
