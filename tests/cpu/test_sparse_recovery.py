"""The I-OBS paper's synthetic experiment: its published curves, the one-step recovery behind them, and the verb."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from sparsify_compiler.cli.reproduce_recovery import recovery_verb
from sparsify_compiler.errors import DataError
from sparsify_compiler.passes.prune.sparse_recovery import (
    gaussian_prior,
    mnist_prior,
    obc_mask_variant,
    read_images,
    sparse_recovery,
)
from sparsify_compiler.passes.prune.sparse_recovery_result import (
    PUBLISHED,
    RecoveryResult,
    Scale,
    plot_recovery,
    quartiles,
)


@pytest.fixture(scope="module")
def paper() -> RecoveryResult:
    return sparse_recovery()


@pytest.fixture(scope="module")
def correct() -> RecoveryResult:
    return sparse_recovery(scale="correct")


@pytest.fixture(scope="module")
def small() -> RecoveryResult:
    return sparse_recovery(runs=2, steps=3)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 6, 6)) * (np.arange(36).reshape(6, 6) % 4 == 1)
    np.savez(tmp_path / "digits.npz", x_train=pixels.astype(np.uint8), y_train=np.zeros(30))
    return tmp_path / "digits.npz"


def run(*arguments: str) -> tuple[int, str]:
    app = typer.Typer()
    app.command("sparse-recovery")(recovery_verb)
    app.callback()(lambda: None)
    result = CliRunner().invoke(app, ["sparse-recovery", *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize("method", ["Topk-I-OBS", "k-IHT"])
def test_the_papers_scale_gives_the_authors_own_curves(paper: RecoveryResult, method: str) -> None:
    # The same draws in the same order; theirs ran in float32 and are given to five digits.
    for point in PUBLISHED["gaussian", "paper", method]:
        loss, distance = paper.at(method, point.step)
        assert loss == pytest.approx(point.loss, rel=2e-4)
        assert distance == pytest.approx(point.distance, rel=2e-4)


def test_at_the_correct_scale_one_step_recovers_the_vector(correct: RecoveryResult) -> None:
    for method in ("Topk-I-OBS", "I-OBS"):
        curve = correct.curve(method)
        assert curve.distance.mean[0] > 3.7
        assert max(curve.distance.mean[1:]) <= 1e-12  # rounding of a regression of size 4, condition number 30
        assert max(curve.loss.mean[1:]) <= 1e-25


def test_at_the_correct_scale_k_iht_takes_a_hundred_steps(correct: RecoveryResult) -> None:
    # Replicated once with other draws, so within the spread of 20 runs.
    expected = {1: 2.22, 10: 0.663, 20: 0.258, 50: 0.0269, 100: 0.001}
    for step, distance in expected.items():
        assert correct.at("k-IHT", step)[1] == pytest.approx(distance, rel=0.2)


def test_topk_steps_are_the_two_lines_that_a_noiseless_quadratic_makes_of_them(paper: RecoveryResult) -> None:
    drawn = gaussian_prior()
    weight, share = drawn.starts[0].numpy().copy(), 2 / 256
    truth = drawn.truth.numpy()
    for _ in range(300):
        weight = (1 - share) * weight + share * truth
        weight[np.arange(20)[:, None], np.argsort(-np.abs(weight), axis=1)[:, 64:]] = 0.0
    expected = np.linalg.norm(weight - truth, axis=1).mean()
    # one run in which rounding orders two almost equal entries otherwise would show at 1e-5
    assert paper.curve("Topk-I-OBS").distance.mean[300] == pytest.approx(expected, rel=1e-6)


def test_the_obc_mask_variant_starts_as_published() -> None:
    # Rounding decides among what its inexact removals leave, so only the first steps repeat to five digits.
    losses, distances = obc_mask_variant(gaussian_prior(), 11)
    assert float(losses[0].mean()) * 2 / 256 == pytest.approx(0.057535, rel=1e-4)
    assert float(distances[1].mean()) == pytest.approx(3.7564, rel=1e-4)
    assert float(distances[11].mean()) == pytest.approx(3.6101, rel=2e-3)


def test_the_draws_repeat_and_the_seed_changes_them() -> None:
    first, again, other = gaussian_prior(2), gaussian_prior(2), gaussian_prior(2, seed=1)
    assert torch.equal(first.problem.matrix, again.problem.matrix)
    assert torch.equal(first.starts, again.starts)
    assert not torch.equal(first.truth, other.truth)
    assert (first.truth != 0).sum(dim=1).tolist() == [16, 16]
    assert first.kept.tolist() == [64, 64]
    assert float(first.starts.abs().max()) <= 128**-0.5
    assert torch.equal(gaussian_prior(3).truth[:2], first.truth)  # more runs do not change the first ones


def test_the_mnist_prior_keeps_twice_the_ink_of_raw_images(images: Path) -> None:
    pixels = read_images(images)
    drawn = mnist_prior(pixels, 4)
    assert drawn.truth.shape == (4, 36)
    assert drawn.rows == 72
    assert all(any(torch.equal(truth, image.flatten().double()) for image in pixels) for truth in drawn.truth)
    assert drawn.kept.tolist() == [2 * int((truth != 0).sum()) for truth in drawn.truth]
    result = sparse_recovery("mnist", "correct", runs=4, steps=1, images=pixels)
    assert result.curve("Topk-I-OBS").distance.mean[1] <= 1e-10  # of vectors of length 500


def test_the_first_mnist_problems_are_the_authors_own(shared: Path) -> None:
    result = sparse_recovery("mnist", "paper", runs=1, steps=2, images=read_images(shared / "mnist.npz"))
    # From the curves saved beside the authors' code, first run.
    assert result.at("Topk-I-OBS", 0) == pytest.approx((3018.77, 2219.105), rel=1e-5)
    assert result.at("k-IHT", 0) == pytest.approx((3018.645, 2220.954), rel=1e-5)


def test_results_come_back_from_json(small: RecoveryResult) -> None:
    assert RecoveryResult.from_json(small.to_json()) == small
    for text in ("{", "[]", "{}", json.dumps({"curves": [{"method": "x"}]})):
        with pytest.raises(DataError, match="not the results of sparse recovery"):
            RecoveryResult.from_json(text)


def test_quartiles_are_taken_over_the_runs() -> None:
    found = quartiles(torch.tensor([[4.0, 1.0, 2.0, 3.0, 5.0], [0.0, 0.0, 0.0, 0.0, 10.0]]).double())
    assert (found.mean, found.lower, found.upper) == ((3.0, 2.0), (2.0, 0.0), (4.0, 0.0))


def test_the_plot_has_both_panels_and_every_method(small: RecoveryResult, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plot_recovery(small, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    for word in ("loss", "distance to", "steps", "Topk-I-OBS", "k-IHT", "gaussian prior, paper scale, 2 runs"):
        assert word in text


def test_the_plot_refuses_other_files_a_missing_folder_and_no_matplotlib(
    small: RecoveryResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"choose a \.png or \.svg"):
        plot_recovery(small, tmp_path / "figure.pdf")
    pytest.importorskip("matplotlib")
    with pytest.raises(DataError, match="cannot write the plot"):
        plot_recovery(small, tmp_path / "absent" / "figure.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(DataError, match=r"sparsify-compiler\[plot\]"):
        plot_recovery(small, tmp_path / "figure.png")


def test_bad_requests_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="needs images"):
        sparse_recovery("mnist")
    for scale, prior in (("correct", "gaussian"), ("paper", "mnist")):
        with pytest.raises(DataError, match="OBC-mask variant was published for"):
            sparse_recovery(prior, scale, images=read_images(images), obc_mask=True)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="0 runs of None steps"):
        sparse_recovery(runs=0)
    with pytest.raises(DataError, match="cannot read images"):
        read_images(tmp_path / "absent.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(DataError, match="cannot read images"):
        read_images(tmp_path / "text.npz")
    np.savez(tmp_path / "flat.npz", a=np.zeros(4))
    with pytest.raises(DataError, match="holds 0 stacks"):
        read_images(tmp_path / "flat.npz")


def test_the_only_stack_of_a_file_needs_no_name(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", digits=np.ones((2, 3, 3), np.uint8))
    assert read_images(tmp_path / "one.npz").shape == (2, 3, 3)


@pytest.mark.parametrize("scale", ["paper", "correct"])
def test_the_verb_prints_its_figures_beside_the_published_ones(scale: Scale, tmp_path: Path) -> None:
    target = tmp_path / "recovery.json"
    status, text = run("--scale", scale, "--runs", "2", "--steps", "120", "--json", str(target), "--device", "cpu")
    assert status == 0
    assert f"k-IHT: gaussian prior, {scale} scale, 2 runs" in text
    assert ("published" in text) == (scale == "paper")
    assert ("0.0253" in text) == (scale == "paper")
    result = RecoveryResult.from_json(target.read_text(encoding="utf-8"))
    assert (result.scale, result.runs, result.steps) == (scale, 2, 120)
    assert f"{result.at('k-IHT', 100)[1]:.4g}" in text


def test_the_verb_runs_the_mnist_prior_from_a_file_and_draws(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    figure = tmp_path / "figure.png"
    given = ("--prior", "mnist", "--data", str(images), "--runs", "2", "--steps", "4", "--plot", str(figure))
    status, text = run(*given)
    assert status == 0
    assert "Topk-I-OBS: mnist prior, paper scale, 2 runs" in text
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prior", "mnist"), "give --data mnist.npz"),
        (("--data", "x.npz"), "leave one out"),
        (("--plot", "x.pdf"), "choose a .png or .svg"),
        (("--prior", "mnist", "--data", "absent.npz"), "cannot read images"),
        (("--obc-mask", "--scale", "correct"), "OBC-mask variant was published"),
    ],
)
def test_the_verb_says_in_one_sentence_what_is_wrong(arguments: tuple[str, ...], message: str) -> None:
    status, text = run(*arguments)
    assert status == 2
    assert message in text
