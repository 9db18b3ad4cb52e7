"""What was done to every layer and why: the report's data. `report_text` and `report_html` draw it."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from sparsify_compiler.runtime.tuning.verdicts import Timing

Status = Literal["pruned", "dense", "refused"]


@dataclass(frozen=True)
class SiteReport:
    """One site. `loss_*` are per token and None without a Gram matrix; `relative_error` is loss / ‖XWᵀ‖².

    Both are those of the weight that pruning left, before a step that trains moved it. `kernel` is what the torch
    module runs ("dense" where dense won); `refused_kernels` maps each other kernel to its reason; `variants` is what
    the kernel was told by token count and `kernel_bytes` what each candidate keeps for the weight; `asked_sparsity` is
    the recipe's where the site was given one of its own; `damp` is the largest ridge that was needed, as a share of the
    Gram's mean diagonal.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    groups: int
    status: Status
    reason: str = ""
    pattern: str = ""
    method: str = ""
    sparsity: float = 0.0
    tokens: int = 0
    loss_selected: float | None = None
    loss: float | None = None
    relative_error: float | None = None
    damp: float | None = None
    seconds: float = 0.0
    kernel: str = "dense"
    refused_kernels: Mapping[str, str] = field(default_factory=dict)
    timings: tuple[Timing, ...] = ()
    dense_bytes: int = 0
    packed_bytes: int = 0
    onnx: str = ""
    notes: tuple[str, ...] = ()
    variants: str = ""
    kernel_bytes: Mapping[str, int] = field(default_factory=dict)
    asked_sparsity: float | None = None


@dataclass(frozen=True)
class Quality:
    """A model-level measure before and after: perplexity, top-1 accuracy, relative error, cosine."""

    measure: str
    dense: float | None
    sparse: float
    data: str


@dataclass(frozen=True)
class RoundReport:
    """One round of pruning the whole network. Optional figures are None where they could not be had (a first round).

    `batches` says in words what it was calibrated on; `error` is the sum of the sites' relative errors there;
    `heldout` is the held-out loss `measure` (lower is better) on `data`; `changed` is the share of mask entries and
    `moved` the number of sites that differ from the round before; `differed` names what its problems had anew. The
    model has the weights of the one that is `chosen`.
    """

    number: int
    batches: str
    error: float | None
    measure: str
    heldout: float
    data: str
    changed: float | None
    moved: int | None
    differed: tuple[str, ...]
    chosen: bool


@dataclass(frozen=True)
class StepReport:
    """One part of a `step` of the recipe that trains weights: a segment of [reconstruct], an epoch of [distill].

    `measure` (lower is better) is `before` and `after` it on the calibration batches, and `heldout` on `data`, which
    are calibration batches too where there was nothing else to choose by; None where it was not measured. An epoch's
    `after` is the mean while it trained. Of several epochs the model has the weights of the one that is `kept`; a
    segment that is not kept has the weights that pruning left.
    """

    step: str
    part: str
    measure: str
    before: float | None
    after: float | None
    heldout: float | None
    kept: bool
    data: str = ""


@dataclass(frozen=True)
class FileReport:
    """One written file: its name in the output folder, its size, the size the dense one would have."""

    name: str
    size_bytes: int
    dense_bytes: int | None = None


@dataclass(frozen=True)
class Verification:
    """The exported file run in ONNX Runtime against the torch model (or the dense-zeros ONNX graph).

    `difference` is max |y − y'| / max |y'| over the outputs; the file fails above `tolerance`. `ran` False: `reason`.
    `inputs` names what it was run on, "" in reports of older versions.
    """

    ran: bool
    difference: float | None
    tolerance: float
    provider: str
    reason: str = ""
    inputs: str = ""


@dataclass(frozen=True)
class Report:
    """Everything `compile` did. `notes` are sentences a reader must not miss: fallbacks, generated inputs, no cache.

    `rounds` is empty where the network was pruned once, `steps` where nothing was trained.
    """

    model: str
    command: str
    created: str
    environment: Mapping[str, str]
    recipe: str
    sites: tuple[SiteReport, ...]
    quality: tuple[Quality, ...] = ()
    files: tuple[FileReport, ...] = ()
    verification: Verification | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    peak_memory_bytes: int = 0
    notes: tuple[str, ...] = ()
    version: int = 1
    rounds: tuple[RoundReport, ...] = ()
    steps: tuple[StepReport, ...] = ()

    def to_json(self) -> str:
        """Write the report as JSON; `report_from_json` is the inverse."""
        return json.dumps(dataclasses.asdict(self), indent=1, sort_keys=False)


def report_from_json(text: str) -> Report:
    """Read what `Report.to_json` wrote, by this version or an older one."""
    table: dict[str, Any] = json.loads(text)
    table["sites"] = tuple(_site(site) for site in table["sites"])
    table["quality"] = tuple(Quality(**quality) for quality in table["quality"])
    table["files"] = tuple(FileReport(**file) for file in table["files"])
    table["verification"] = Verification(**table["verification"]) if table["verification"] else None
    table["notes"] = tuple(table["notes"])
    table["rounds"] = tuple(_round(each) for each in table.get("rounds", ()))  # files from before rounds have none
    table["steps"] = tuple(StepReport(**each) for each in table.get("steps", ()))
    return Report(**table)


def _site(table: dict[str, Any]) -> SiteReport:
    table["timings"] = tuple(Timing(**timing) for timing in table["timings"])
    table["shape"] = tuple(table["shape"])
    table["notes"] = tuple(table["notes"])
    return SiteReport(**table)


def _round(table: dict[str, Any]) -> RoundReport:
    return RoundReport(**{**table, "differed": tuple(table["differed"])})
