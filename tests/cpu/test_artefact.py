"""A damaged artefact is refused by name: nothing but ModelError comes out of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from models.small import Cnn, Mlp, image_batches, mlp_batches, seeded
from torch import nn

import sparsify_compiler as sc
from sparsify_compiler.api import Options
from sparsify_compiler.errors import ModelError, SparsifyError
from sparsify_compiler.sources.describe import rebuild

RECIPE = sc.Recipe((sc.make_rule("*", sc.NM(2, 4), sc.Magnitude()),))
VALUES = (None, 0, -1, True, "?", [], [0], ["?"], {}, {"?": 0})
"""What a key is replaced by: at least one of every JSON type, and numbers that fit nothing."""


@pytest.fixture(scope="module", params=[Mlp, Cnn])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, type[nn.Module]]:
    folder = tmp_path_factory.mktemp("artefact") / "out"
    batches = mlp_batches(1) if request.param is Mlp else image_batches(1)
    sc.compile(seeded(request.param), batches, recipe=RECIPE, options=Options(output=folder, tokens=(1,), onnx=False))
    return folder, request.param


def damaged(folder: Path, into: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, into, dirs_exist_ok=True)
    table = json.loads((folder / "sparsify.json").read_text())
    change(table)
    (into / "sparsify.json").write_text(json.dumps(table))
    return into


def test_a_description_that_lacks_a_key_is_refused_with_its_name(written: Any, tmp_path: Path) -> None:
    folder, kind = written
    table = json.loads((folder / "sparsify.json").read_text())
    name, site = next(iter(table["sites"].items()))
    for key in set(table) - {"format", "version"}:
        with pytest.raises(ModelError, match=f"'{key}' is missing"):
            sc.load(damaged(folder, tmp_path, lambda t, key=key: t.pop(key)), into=seeded(kind))
    for key in set(site) - {"transposed"}:
        with pytest.raises(ModelError, match=f"site '{name}'.*'{key}' is missing"):
            sc.load(damaged(folder, tmp_path, lambda t, key=key: t["sites"][name].pop(key)), into=seeded(kind))


def test_no_value_of_a_wrong_kind_gets_past_reading(written: Any, tmp_path: Path) -> None:
    folder, kind = written
    table = json.loads((folder / "sparsify.json").read_text())
    name, site = next(iter(table["sites"].items()))

    def tried(change: Callable[[dict[str, Any]], None]) -> None:
        try:  # a value that happens to fit is no damage; only errors of ours may come out
            sc.load(damaged(folder, tmp_path, change), into=seeded(kind))
        except SparsifyError:
            return

    for value in VALUES:
        for key in table:
            tried(lambda t, key=key, value=value: t.update({key: value}))
        for key in site:
            tried(lambda t, key=key, value=value: t["sites"][name].update({key: value}))


def test_whoever_may_read_the_description_may_read_the_weights(written: Any) -> None:
    folder, _ = written
    modes = {(folder / name).stat().st_mode for name in ("model.safetensors", "sparsify.json", "report.json")}
    assert len(modes) == 1


@pytest.mark.parametrize("content", [b"[]", b"\xff\xfe", b"3", b'{"format": "sparsify-compiler", "version": true}'])
def test_a_file_that_is_no_description_is_refused(written: Any, tmp_path: Path, content: bytes) -> None:
    folder, kind = written
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "sparsify.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"damaged|not a description that compile wrote"):
        sc.load(tmp_path, into=seeded(kind))


@pytest.mark.parametrize("model", [{"kind": "transformers"}, {"kind": "factory"}, {}, {"kind": []}])
def test_a_description_of_no_model_is_refused(model: dict[str, Any]) -> None:
    with pytest.raises(ModelError):
        rebuild(model, Path("out"), lambda reference: pytest.fail("nothing may be imported"))
