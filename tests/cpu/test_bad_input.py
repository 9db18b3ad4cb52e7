"""What a user may get wrong around kernels is refused in words, with what was found and what to do."""

import dataclasses
import importlib.util
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from scripted import Fake, packed

from sparsify_compiler.errors import DataError, KernelError
from sparsify_compiler.kernel import MatmulSpec
from sparsify_compiler.pattern import NM, Block, Unstructured
from sparsify_compiler.pipeline.options import Options
from sparsify_compiler.runtime import launch as launch_module
from sparsify_compiler.runtime.cpu.csr import TorchCsr
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.kernels import kernels, spec_for
from sparsify_compiler.runtime.launch import CupyLauncher
from sparsify_compiler.runtime.layers.modules import SparseLinear
from sparsify_compiler.runtime.tuning.tune import tune


@pytest.fixture
def forgetful() -> Iterator[None]:
    """Let the launcher look again for its library, and once more after the test."""
    launch_module._missing.cache_clear()
    yield
    launch_module._missing.cache_clear()


@pytest.mark.usefixtures("forgetful")
def test_a_missing_cupy_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "cupy" else found(name))
    assert "CuPy is not installed: pip install 'sparsify-compiler[cuda]'" in (CupyLauncher().unavailable() or "")


@pytest.mark.usefixtures("forgetful")
def test_a_missing_nvrtc_is_named_with_its_install_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def version() -> None:
        raise RuntimeError("libnvrtc.so.13: cannot open shared object file\nmore")

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(launch_module.importlib, "import_module", lambda name: SimpleNamespace(getVersion=version))
    reason = CupyLauncher().unavailable() or ""
    assert (
        "CuPy finds no NVRTC (libnvrtc.so.13: cannot open shared object file): pip install nvidia-cuda-nvrtc" in reason
    )


@pytest.mark.parametrize("capability", [(5, 0), (7, 0), (7, 5)])
def test_every_sparse_kernel_refuses_an_old_gpu_in_words(capability: tuple[int, int]) -> None:
    for pattern in (NM(2, 4), NM(16, 32), Unstructured(), Block(64, 64)):
        spec = MatmulSpec(256, 256, torch.bfloat16, pattern, 0.5, (1,), torch.device("cuda", 0), capability)
        for kernel in kernels():
            reason = kernel.rejects(spec)
            assert kernel.name == "dense" or (reason and len(reason) > 10), kernel.name


def test_a_weight_that_breaks_its_pattern_is_refused_with_the_count() -> None:
    weight = torch.ones(4, 16)
    for pattern, message in (
        (NM(2, 4), "1 of 16 groups do not keep 2"),
        (Block(2, 2), "1 of 16 tiles are kept in part"),
    ):
        keep = torch.tensor([1, 1, 0, 0] * 4).bool().repeat(4, 1)
        keep[0, 0] = False
        with pytest.raises(KernelError, match=message):
            format_for(pattern).pack(weight, keep, pattern)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_with_the_count(value: float) -> None:
    weight = torch.ones(4, 16)
    weight[1, 3] = value
    with pytest.raises(KernelError, match=r"1 entries are NaN or infinite in torch\.float32"):
        SparseLinear.from_dense(weight, torch.ones(4, 16, dtype=torch.bool), Unstructured())


def test_a_wrong_dtype_is_named() -> None:
    layer = SparseLinear(packed())
    with pytest.raises(KernelError, match=r"torch.float64"):
        layer(torch.ones(2, 16, dtype=torch.float64))


def test_more_entries_than_int32_counts_are_refused_before_anything_is_made() -> None:
    spec = MatmulSpec(2**17, 2**16, torch.float32, Unstructured(), 0.5, (1,), torch.device("cpu"))
    assert "do not fit int32" in (TorchCsr().rejects(spec) or "")


def test_no_tokens_or_none_at_all_are_refused() -> None:
    for tokens in ((), (0,), (4, 0)):
        with pytest.raises(KernelError, match="token counts of at least 1"):
            tune(packed(), dataclasses.replace(spec_for(packed(), (1,)), tokens=tokens), (Fake("dense"),))
    with pytest.raises(DataError, match="at least one count"):
        Options(tokens=(0,))


def test_a_cuda_device_has_its_number_and_one_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    found = [str(Options(device=word).torch_device()) for word in ("auto", "cuda", "cuda:0", "cpu")]
    assert found == ["cuda:1", "cuda:1", "cuda:0", "cpu"]
    with pytest.raises(DataError, match=r"'cuda:2'.*2 CUDA devices"):
        Options(device="cuda:2").torch_device()
