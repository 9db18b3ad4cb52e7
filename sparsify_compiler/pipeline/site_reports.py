"""One report row per site from what each stage found."""

from collections.abc import Mapping, Sequence

from sparsify_compiler.export.report import SiteReport
from sparsify_compiler.kernel import Packed
from sparsify_compiler.passes.prune.layerwise import SiteOutcome
from sparsify_compiler.pipeline.options import Options
from sparsify_compiler.plan import Decision
from sparsify_compiler.recipe import Rule
from sparsify_compiler.runtime.tuning.verdicts import Verdict


def site_reports(
    decisions: Sequence[Decision],
    outcomes: Mapping[str, SiteOutcome],
    verdicts: Mapping[str, Verdict],
    why_dense: Mapping[str, str],
    packed: Mapping[str, Packed],
    forms: Mapping[str, str],
    options: Options,
) -> tuple[SiteReport, ...]:
    """Join decisions, outcomes and verdicts by site name, in the order of `decisions`."""
    element = options.torch_dtype().itemsize
    rows = []
    for decision in decisions:
        site = decision.site
        size = site.groups * site.out * site.in_ * element
        outcome, rule = outcomes.get(site.name), decision.rule
        if outcome is None or rule is None:
            rows.append(_unpruned(decision, size))
            continue
        verdict = verdicts.get(site.name)
        rows.append(
            SiteReport(
                name=site.name,
                kind=site.kind,
                shape=site.shape,
                groups=site.groups,
                status="pruned",
                reason=verdict.reason if verdict else why_dense.get(site.name, ""),
                pattern=str(rule.pattern),
                method=_steps(rule, outcome),
                sparsity=outcome.sparsity,
                asked_sparsity=decision.asked,
                tokens=outcome.tokens,
                loss_selected=outcome.loss_selected,
                loss=outcome.loss,
                relative_error=outcome.relative_error,
                damp=outcome.damp,
                seconds=outcome.seconds,
                kernel=verdict.kernel if verdict else "dense",
                refused_kernels=verdict.refused if verdict else {},
                timings=verdict.timings if verdict else (),
                dense_bytes=size,
                packed_bytes=packed[site.name].size_bytes() if site.name in packed else size,
                onnx=forms.get(site.name, ""),
                notes=(*decision.notes, *outcome.notes),
                variants=verdict.variants if verdict else "",
                kernel_bytes=verdict.size_bytes if verdict else {},
            )
        )
    return tuple(rows)


def _steps(rule: Rule, outcome: SiteOutcome) -> str:
    """Name the method and what came after it; swaps re-solve the weights themselves."""
    if rule.swaps:
        return f"{rule.method.name} + swaps"
    return f"{rule.method.name} + refit" if rule.refits and outcome.loss is not None else rule.method.name


def _unpruned(decision: Decision, size: int) -> SiteReport:
    site = decision.site
    return SiteReport(
        name=site.name,
        kind=site.kind,
        shape=site.shape,
        groups=site.groups,
        status="refused" if decision.refused else "dense",
        reason=decision.reason or "no token of the calibration data reached it",
        dense_bytes=size,
        packed_bytes=size,
    )
