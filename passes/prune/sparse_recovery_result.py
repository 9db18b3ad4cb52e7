"""What the sparse recovery experiment measured: curves with quartiles, JSON, a plot, and the published figures."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sparsify_compiler.errors import DataError
from sparsify_compiler.figures import saved_figure

Prior = Literal["gaussian", "mnist"]
Scale = Literal["correct", "paper"]


@dataclass(frozen=True)
class Quartiles:
    """Over the runs, one entry an iterate θ_0, θ_1, …: the mean, the lower and the upper quartile."""

    mean: tuple[float, ...]
    lower: tuple[float, ...]
    upper: tuple[float, ...]


@dataclass(frozen=True)
class Curve:
    """One method: `loss` (the mean of squares in the paper's scale, else ½ ‖Xθ − y‖²) and `distance` ‖θ − θ*‖."""

    method: str
    loss: Quartiles
    distance: Quartiles


@dataclass(frozen=True)
class RecoveryResult:
    """The experiment and what came out."""

    prior: Prior
    scale: Scale
    runs: int
    seed: int
    steps: int
    curves: tuple[Curve, ...]

    def to_json(self) -> str:
        """Write everything as JSON; `from_json` is the inverse."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "RecoveryResult":
        """Read what `to_json` wrote.

        Raises:
            DataError: the text is something else.
        """
        try:
            table: dict[str, Any] = json.loads(text)
            curves = tuple(
                Curve(one["method"], _quartiles_from(one["loss"]), _quartiles_from(one["distance"]))
                for one in table.pop("curves")
            )
            return RecoveryResult(curves=curves, **table)
        except (ValueError, KeyError, TypeError, AttributeError):
            raise DataError("these are not the results of sparse recovery: write them with to_json") from None

    def curve(self, method: str) -> Curve:
        """Return the curve of `method`; KeyError where it was not run."""
        return {curve.method: curve for curve in self.curves}[method]

    def at(self, method: str, step: int) -> tuple[float, float]:
        """Return the mean loss and the mean distance at `step`.

        At the paper's scale as its code counts: the loss before step number `step` (from 0), the distance after it. At
        the correct scale both are of the iterate after `step` steps.
        """
        curve, later = self.curve(method), 1 if self.scale == "paper" else 0
        return curve.loss.mean[step], curve.distance.mean[step + later]


@dataclass(frozen=True)
class PublishedPoint:
    """Mean loss and distance over 20 runs at a step; None where no figure is known."""

    step: int
    loss: float | None
    distance: float | None


PUBLISHED: dict[tuple[Prior, Scale, str], tuple[PublishedPoint, ...]] = {
    ("gaussian", "paper", "Topk-I-OBS"): (
        PublishedPoint(0, 0.058529, 3.7792),
        PublishedPoint(100, 0.025302, 2.4699),
        PublishedPoint(200, 0.015076, 1.8953),
        PublishedPoint(400, 0.0019253, 0.69418),
        PublishedPoint(600, 1.0086e-4, 0.15877),
        PublishedPoint(749, 1.0066e-5, 0.05019),
    ),
    ("gaussian", "paper", "k-IHT"): (
        PublishedPoint(0, 0.058254, 3.785),
        PublishedPoint(100, 0.03354, 3.0956),
        PublishedPoint(200, 0.018294, 2.4886),
        PublishedPoint(400, 0.0067498, 1.7602),
        PublishedPoint(600, 0.0032082, 1.3495),
        PublishedPoint(749, 0.0020591, 1.1402),
    ),
    ("gaussian", "paper", "OBC mask"): (
        PublishedPoint(0, 0.057535, 3.7564),
        PublishedPoint(100, 0.031616, 2.7638),
        PublishedPoint(200, 0.024906, 2.4177),
        PublishedPoint(400, 0.022288, 2.2699),
        PublishedPoint(600, 0.021608, 2.2344),
        PublishedPoint(749, 0.021212, 2.2142),
    ),
    ("mnist", "paper", "Topk-I-OBS"): (
        PublishedPoint(0, 3577.6, 2320.8),
        PublishedPoint(500, 998.5, 1226.1),
        PublishedPoint(1000, 278.68, 647.75),
        PublishedPoint(2000, 21.706, 180.77),
        PublishedPoint(3000, 1.6904, 50.447),
        PublishedPoint(3999, 0.13198, 14.096),
    ),
    ("mnist", "paper", "k-IHT"): (
        PublishedPoint(0, 3577.5, 2322.7),
        PublishedPoint(500, 2053.7, 1900.4),
        PublishedPoint(1000, 1269.7, 1602.3),
        PublishedPoint(2000, 593.0, 1216.3),
        PublishedPoint(3000, 332.08, 969.22),
        PublishedPoint(3999, 204.36, 790.81),
    ),
}
"""Means of the curves that the authors saved beside their code."""


def quartiles(values: Tensor) -> Quartiles:
    """Sum up `values` (iterates, runs)."""
    ends = torch.quantile(values, values.new_tensor([0.25, 0.75]), dim=1)
    return Quartiles(tuple(values.mean(dim=1).tolist()), tuple(ends[0].tolist()), tuple(ends[1].tolist()))


def plot_recovery(result: RecoveryResult, path: str | Path) -> None:
    """Draw the paper's Figure 1 to a .png or .svg file: loss and distance, log axes, quartiles shaded.

    Raises:
        DataError: matplotlib is not installed, another file type was asked, or the disk refused.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg"):
        raise DataError(f"cannot plot to {path.name}: choose a .png or .svg file")
    with saved_figure(path, (9, 3.6)) as figure:
        left, right = figure.subplots(1, 2)
        for axes, label in ((left, "loss"), (right, "distance to θ*")):
            for curve in result.curves:
                values = curve.loss if axes is left else curve.distance
                steps = range(len(values.mean))
                (line,) = axes.plot(steps, _positive(values.mean), label=curve.method)
                axes.fill_between(
                    steps,
                    _positive(values.lower),
                    _positive(values.upper),
                    color=line.get_color(),
                    alpha=0.25,
                    linewidth=0,
                )
            axes.set_yscale("log")
            axes.set_xlabel("steps")
            axes.set_ylabel(label)
        left.legend()
        figure.suptitle(f"Sparse recovery, {result.prior} prior, {result.scale} scale, {result.runs} runs")


def _positive(values: Sequence[float]) -> list[float]:
    # zero, which a full step can reach, has no place on a log axis
    return [max(value, 1e-34) for value in values]


def _quartiles_from(table: dict[str, list[float]]) -> Quartiles:
    return Quartiles(tuple(table["mean"]), tuple(table["lower"]), tuple(table["upper"]))
