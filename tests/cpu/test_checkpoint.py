"""Checkpoints and the output folder: whole or absent, and only resumed by the run that began them."""

from pathlib import Path

import pytest
import torch

from sparsify_compiler import checkpoint as module
from sparsify_compiler.checkpoint import Checkpoint, SavedSite, digest, durable_write
from sparsify_compiler.errors import DataError, ExportError
from sparsify_compiler.pipeline.workspace import Workspace


def site() -> SavedSite:
    return SavedSite(torch.randn(1, 2, 3), torch.rand(1, 2, 3) > 0.5, {"tokens": 5, "problems": {"a": {"loss": 0.1}}})


def test_a_segment_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    saved = site()
    Checkpoint(tmp_path, "run", resume=False).write(3, {"a": saved})
    found = Checkpoint(tmp_path, "run", resume=True).read(3)
    assert found is not None
    assert torch.equal(found["a"].weight, saved.weight)
    assert torch.equal(found["a"].keep, saved.keep)
    assert found["a"].record == saved.record


def test_a_segment_that_the_manifest_does_not_name_is_not_finished(tmp_path: Path) -> None:
    begun = Checkpoint(tmp_path, "run", resume=False)
    begun.write(0, {"a": site()})
    (tmp_path / "segment-0001.safetensors").write_bytes(b"half a file")
    resumed = Checkpoint(tmp_path, "run", resume=True)
    assert resumed.read(0) is not None
    assert resumed.read(1) is None


def test_another_run_cannot_be_resumed(tmp_path: Path) -> None:
    Checkpoint(tmp_path, "run", resume=False)
    with pytest.raises(DataError, match="another model, data, recipe"):
        Checkpoint(tmp_path, "other", resume=True)


def test_a_damaged_segment_is_said_to_be(tmp_path: Path) -> None:
    begun = Checkpoint(tmp_path, "run", resume=False)
    begun.write(0, {"a": site()})
    path = tmp_path / "segment-0000.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(DataError, match="damaged"):
        begun.read(0)


def test_a_full_disk_leaves_the_old_file_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    durable_write(target, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(ExportError, match="No space left"):
        durable_write(target, b"new")
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_digest_sees_values_shapes_and_order() -> None:
    a, b = torch.arange(6.0), torch.arange(6.0).reshape(2, 3)
    assert digest([a]) == digest([a.clone()])
    parts: list[list[object]] = [[a], [b], [a + 1], ["x", a], [a, "x"], [a.double()]]
    assert len({digest(each) for each in parts}) == 6


def test_an_output_folder_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "out"
    work = Workspace(output)
    work.start()
    (work.files / "report.json").write_text("{}")
    assert not output.exists()
    work.commit()
    assert [path.name for path in output.iterdir()] == ["report.json"]
    assert not work.root.exists()


def test_an_existing_folder_is_refused_without_overwrite_and_replaced_with_it(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "report.json").write_text("old")
    with pytest.raises(ExportError, match="--overwrite"):
        Workspace(output)
    work = Workspace(output, overwrite=True)
    work.start()
    (work.files / "report.json").write_text("new")
    work.commit()
    assert (output / "report.json").read_text() == "new"


def test_a_folder_that_compile_did_not_write_is_never_replaced(tmp_path: Path) -> None:
    output = tmp_path / "precious"
    output.mkdir()
    (output / "thesis.tex").write_text("years")
    with pytest.raises(ExportError, match="did not write"):
        Workspace(output, overwrite=True)


def test_an_abandoned_run_keeps_finished_segments_and_nothing_else(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "out")
    work.start()
    assert work.abandon() is False
    assert not work.root.exists()
    work.start()
    Checkpoint(work.segments, "run", resume=False).write(0, {"a": site()})
    assert work.abandon() is True
    assert work.segments.exists()
    assert not work.files.exists()


def test_finished_work_is_refused_kept_or_dropped_as_asked(tmp_path: Path) -> None:
    work = Workspace(tmp_path / "out")
    work.start()
    Checkpoint(work.segments, "run", resume=False).write(0, {"a": site()})
    assert work.abandon() is True
    with pytest.raises(ExportError, match=r"out\.partial holds the finished segments .* --resume, or .* --overwrite"):
        Workspace(tmp_path / "out")
    for overwrite in (False, True):
        resumed = Workspace(tmp_path / "out", overwrite, resume=True)
        resumed.start()
        assert resumed.has_segments()
    dropped = Workspace(tmp_path / "out", overwrite=True)
    assert dropped.has_segments()  # nothing is dropped before the run starts
    dropped.start()
    assert not dropped.has_segments()


@pytest.mark.parametrize("damage", ["cut", "lost", "manifest"])
def test_what_a_broken_disk_leaves_is_named(tmp_path: Path, damage: str) -> None:
    Checkpoint(tmp_path, "run", resume=False).write(0, {"a": site()})
    segment = tmp_path / "segment-0000.safetensors"
    if damage == "cut":
        segment.write_bytes(segment.read_bytes()[:20])
    elif damage == "lost":
        segment.unlink()
    else:
        (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        Checkpoint(tmp_path, "run", resume=True).read(0)
