"""What was measured is kept on disk: found again for the same question, never for another, never trusted blindly."""

import dataclasses
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from scripted import Fake, Script, packed

from sparsify_compiler.kernel import Activation, MatmulSpec
from sparsify_compiler.pattern import NM
from sparsify_compiler.pipeline.options import Options
from sparsify_compiler.runtime.kernels import spec_for
from sparsify_compiler.runtime.tuning import cache as cache_module
from sparsify_compiler.runtime.tuning.cache import (
    RUNTIME,
    DiskCache,
    default_folder,
    environment,
    float32_precision,
    layer_key,
    outcome_key,
    sources_hash,
    verdict_key,
)
from sparsify_compiler.runtime.tuning.selftest import Outcome, case_for
from sparsify_compiler.runtime.tuning.tune import Budget, Verdict, tune

TIMES = {("dense", 1): [10.0], ("sparse", 1): [5.0]}


@dataclass
class Judge:
    """A tester with one answer."""

    outcome: Outcome = Outcome()  # noqa: RUF009  # frozen
    asked: list[str] = field(default_factory=list)

    def test(self, kernel: str, spec: MatmulSpec, bias: bool, activation: Activation | None) -> Outcome:
        self.asked.append(kernel)
        return self.outcome


def measure(folder: Path, *fakes: Fake, judge: Judge | None = None, **more: object) -> tuple[Verdict, Script]:
    script = Script(TIMES)
    kernels = (Fake("dense"), *(fakes or (Fake("sparse"),)))
    spec = spec_for(packed(), (1,))
    verdict = tune(packed(), spec, kernels, stopwatch=script, cache=DiskCache(folder), tester=judge, **more)  # type: ignore[arg-type]
    return verdict, script


def entries(folder: Path, kind: str = "verdict") -> list[Path]:
    return sorted(folder.glob(f"{kind}-*.json"))


def test_a_verdict_is_measured_once_and_then_read_with_its_date(tmp_path: Path) -> None:
    first, _ = measure(tmp_path / "new" / "folder")
    again, script = measure(tmp_path / "new" / "folder")
    assert script.order == []
    assert again.reason.startswith(first.reason + " (measured on 20")
    assert again.reason.endswith(", from the cache)")
    assert dataclasses.replace(again, reason=first.reason) == first
    assert len(entries(tmp_path / "new" / "folder")) == 1
    assert not list((tmp_path / "new" / "folder").glob(".*"))


def test_what_a_busy_machine_measured_is_not_kept(tmp_path: Path) -> None:
    DiskCache(tmp_path).keep_verdict({"layer": 1}, Verdict("sparse", "sparse: 2.00x", busy=True))
    assert not entries(tmp_path)
    DiskCache(tmp_path).keep_verdict({"layer": 1}, Verdict("sparse", "sparse: 2.00x"))
    assert len(entries(tmp_path)) == 1


def test_another_question_is_measured_anew(tmp_path: Path) -> None:
    measure(tmp_path)
    for more in (
        {"bias": torch.ones(12)},
        {"budget": Budget(seconds=0.1)},
        {"dense_copy": True},
        {"activation": "relu"},
    ):
        if "activation" not in more:  # the fakes know none
            assert measure(tmp_path, **more)[1].order
    assert len(entries(tmp_path)) == 4


def test_everything_that_decides_a_verdict_is_in_its_key(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = spec_for(packed(), (1, 16))

    def key(
        spec: MatmulSpec = spec,
        names: tuple[str, ...] = ("dense",),
        bias: bool = False,
        activation: Activation | None = None,
        **how: object,
    ) -> str:
        layer, rivals = layer_key(spec, bias, activation), [Fake(name) for name in names]
        return json.dumps(verdict_key(layer, rivals, spec.device, how), sort_keys=True)

    changes = [
        {"out": 13},
        {"in_": 17},
        {"dtype": torch.float16},
        {"pattern": NM(4, 8)},
        {"density": 0.52},
        {"tokens": (1,)},
        {"run": 8},
    ]
    keys = {key(), key(names=("dense", "b")), key(bias=True), key(seconds=1)}
    keys |= {key(dataclasses.replace(spec, **change)) for change in changes}  # type: ignore[arg-type]
    keys.add(key(activation="relu"))
    monkeypatch.setattr(cache_module, "processor", lambda: "another processor")
    keys.add(key())
    monkeypatch.setattr(cache_module, "sources_hash", lambda: "another kernel")
    keys.add(key())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    keys.add(key())
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "medium")
    keys.add(key())
    assert len(keys) == 5 + len(changes) + 4
    assert key(dataclasses.replace(spec, density=0.502)) == key()


@pytest.mark.parametrize("name", ["nm/nm24.py", "cuda/ptx.cuh", "cuda/nm24.cu", "epilogue.py", "tuning/verdicts.py"])
def test_a_change_of_any_source_of_runtime_is_another_release(tmp_path: Path, name: str) -> None:
    changed = tmp_path / "runtime"
    shutil.copytree(RUNTIME, changed, ignore=shutil.ignore_patterns("__pycache__"))
    assert sources_hash(changed) == sources_hash(RUNTIME)
    sources_hash.cache_clear()
    (changed / name).write_bytes((changed / name).read_bytes() + b"\n")
    assert sources_hash(changed) != sources_hash(RUNTIME)


def test_a_precision_chosen_through_pytorchs_newer_settings_is_read() -> None:
    before = float32_precision()
    assert before == ["highest"]
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert float32_precision() != before
    finally:
        torch.set_float32_matmul_precision("highest")
    assert float32_precision() == before


def test_the_environment_names_versions_sources_and_the_machine() -> None:
    here = environment(torch.device("cpu"))
    assert here["libraries"]["torch"] == torch.__version__.partition("+")[0] or here["libraries"]["torch"]
    assert "sparsify-compiler" in here["libraries"]
    assert len(here["sources"]) == 32
    assert here["threads"] == torch.get_num_threads()
    json.dumps(here)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"{}",
        b'{"date": 3}',
        "entry: {}",
        "entry: null",
        'entry: {"kernel": 3, "reason": "", "timings": []}',
        'entry: {"kernel": "sparse", "reason": "", "timings": [{}]}',
        'entry: {"kernel": "sparse", "reason": "", "timings": [], "refused": []}',
        'entry: {"kernel": "sparse", "reason": "", "timings": [], "rounds": "many"}',
    ],
)
def test_a_corrupted_file_is_ignored_with_a_warning_and_written_again(tmp_path: Path, content: bytes | str) -> None:
    good, _ = measure(tmp_path)
    (file,) = entries(tmp_path)
    whole = file.read_bytes()
    if isinstance(content, str):
        table = json.loads(whole)
        table["entry"] = json.loads(content.removeprefix("entry: "))
        content = json.dumps(table).encode()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"ignoring the cache file .*verdict-.*; it is measured and written again"):
        again, script = measure(tmp_path)
    assert again == good
    assert script.order
    assert json.loads(file.read_bytes())["entry"] == json.loads(whole)["entry"]


def test_a_file_of_another_format_or_key_is_measured_again(tmp_path: Path) -> None:
    measure(tmp_path)
    (file,) = entries(tmp_path)
    for change in ({"format": 0}, {"key": {}}):
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
        assert measure(tmp_path)[1].order  # and no warning: warnings are errors here


def test_a_folder_that_cannot_be_written_is_said_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(UserWarning, match="cannot be kept in .*choose another cache folder"):
        verdict, _ = measure(tmp_path / "file" / "cache")
    assert verdict.kernel == "sparse"


def test_a_verdict_that_hangs_on_a_passing_lack_is_not_kept(tmp_path: Path) -> None:
    verdict, _ = measure(tmp_path, Fake("full", error=torch.OutOfMemoryError("9 GiB")), Fake("sparse"))
    assert verdict.kernel == "sparse"
    assert entries(tmp_path) == []
    judge = Judge(Outcome("its self-test hung for 60 s", lasting=False))
    measure(tmp_path, judge=judge)
    measure(tmp_path, judge=judge)
    assert judge.asked == ["sparse", "sparse"]
    assert entries(tmp_path) == entries(tmp_path, "selftest") == []


@pytest.mark.parametrize("outcome", [Outcome(), Outcome("its self-test crashed (SIGSEGV)"), Outcome(uncapturable="no")])
def test_a_self_test_is_asked_once(tmp_path: Path, outcome: Outcome) -> None:
    judge = Judge(outcome)
    first, _ = measure(tmp_path, judge=judge)
    again, _ = measure(tmp_path, judge=judge, budget=Budget(seconds=0.3))  # another verdict, the same self-test
    assert judge.asked == ["sparse"]
    assert again.kernel == first.kernel
    assert again.refused == first.refused


def test_a_corrupted_self_test_is_asked_again(tmp_path: Path) -> None:
    judge = Judge()
    measure(tmp_path, judge=judge)
    (file,) = entries(tmp_path, "selftest")
    (verdict,) = entries(tmp_path)
    for entry in ({"refused": 3}, {"other": None}, None):
        verdict.unlink()
        file.write_text(json.dumps(json.loads(file.read_text()) | {"entry": entry}))
        with pytest.warns(UserWarning, match="it holds no outcome"):
            measure(tmp_path, judge=judge)
    assert judge.asked == ["sparse"] * 4


def test_processes_and_threads_may_write_the_same_entry(tmp_path: Path) -> None:
    cache, key = DiskCache(tmp_path), outcome_key(case_for("a", spec_for(packed(), (1,)), False, None))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: cache.keep_outcome(key, Outcome(str(n))), range(200)))
        found = list(pool.map(lambda n: cache.outcome(key), range(50)))
    assert all(outcome is not None and outcome.refused is not None for outcome in found)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "sparsify_compiler"
    for elsewhere in ("", "not/absolute"):
        monkeypatch.setenv("XDG_CACHE_HOME", elsewhere)
        assert default_folder() == Path.home() / ".cache" / "sparsify_compiler"


def test_a_user_without_a_home_has_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # what Python does where nobody knows the home
    assert default_folder() is None
    assert Options().cache is None


def test_an_entry_that_can_be_neither_read_nor_written_is_said(tmp_path: Path) -> None:
    measure(tmp_path)
    (file,) = entries(tmp_path)
    file.unlink()
    file.mkdir()
    (file / "in the way").touch()
    with (
        pytest.warns(UserWarning, match="ignoring the cache file"),
        pytest.warns(UserWarning, match="what was measured cannot be kept"),
    ):
        assert measure(tmp_path)[0].kernel == "sparse"
    assert list(tmp_path.iterdir()) == [file]
