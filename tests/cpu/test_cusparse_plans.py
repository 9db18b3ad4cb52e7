"""The plans of cuSPARSE products: made once, one a stream, kept by graphs, gone with the weights."""

import contextlib
import dataclasses
import gc
import sys
import threading

import numpy as np
import pytest
import torch
from cusparse_cases import CASES, CusparseKernel, fake_of, over, pack, spec_of
from fake_cusparse import FakeLibrary

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Prepared
from sparsify_compiler.pattern import Block, Pattern, Unstructured
from sparsify_compiler.runtime.cusparse.blocked_ell import CusparseBlockedEll
from sparsify_compiler.runtime.cusparse.bsr import CusparseBsr
from sparsify_compiler.runtime.cusparse.csr import CusparseCsr
from sparsify_compiler.runtime.formats import unpack
from sparsify_compiler.runtime.oracle import difference

LAUNCH = ["cusparseSetStream", "cusparseDnMatSetValues", "cusparseDnMatSetValues", "cusparseSpMM"]
DESCRIPTORS = ("csr", "bsr", "ell", "dense", "vector")


@pytest.mark.parametrize(("kind", "pattern"), CASES, ids=str)
def test_a_warmed_call_only_points_and_launches(kind: type[CusparseKernel], pattern: Pattern) -> None:
    kernel, packed = over(kind), pack(pattern, 64, 48)
    prepared, fake = kernel.prepare(packed, spec_of(packed)), fake_of(kernel)
    for tokens in (1, 5):
        kernel.run(prepared, torch.randn(tokens, 48), torch.randn(64))
        fake.calls.clear()
        kernel.run(prepared, torch.randn(tokens, 48))
        expected = [call.replace("Mat", "Vec").replace("MM", "MV") for call in LAUNCH]
        vector = tokens == 1 and kind is not CusparseBlockedEll
        assert fake.calls == (expected if vector else LAUNCH)


@pytest.mark.parametrize(("kind", "pattern"), CASES, ids=str)
def test_plans_die_with_the_weights(kind: type[CusparseKernel], pattern: Pattern) -> None:
    kernel, packed = over(kind), pack(pattern, 64, 48)
    fake, plans = fake_of(kernel), kernel.library.plans()
    prepared = kernel.prepare(packed, spec_of(packed))
    for tokens in (1, 2, 3):
        kernel.run(prepared, torch.randn(tokens, 48))
    assert len(plans) == 3
    assert fake.count(*DESCRIPTORS) == 9
    alias = prepared.tensors[0].detach()
    del prepared, packed
    gc.collect()
    assert len(plans) == 0  # one storage dead is enough, though an alias keeps another alive
    assert fake.count(*DESCRIPTORS) == 0
    del alias


def test_a_new_weight_at_an_old_address_gets_a_new_plan() -> None:
    kernel, packed = over(CusparseCsr), pack(Unstructured(), 16, 16)
    fake, x = fake_of(kernel), torch.randn(4, 16)
    memory = torch.zeros(4096, dtype=torch.uint8).numpy()
    source = kernel.prepare(packed, spec_of(packed)).tensors

    def placed() -> Prepared:
        tensors, at = [], 0
        for tensor in source:
            data = tensor.contiguous().numpy().view(np.uint8).reshape(-1)
            memory[at : at + data.size] = data
            tensors.append(torch.from_numpy(memory[at : at + data.size]).view(tensor.dtype))
            at += -(-data.size // 16) * 16
        return Prepared(kernel.name, packed.shape, tuple(tensors))

    first = placed()
    kernel.run(first, x)
    addresses = [t.data_ptr() for t in first.tensors]
    del first
    second = placed()
    assert [t.data_ptr() for t in second.tensors] == addresses
    fake.calls.clear()
    kernel.run(second, x)
    assert fake.calls.count("cusparseCreateCsr") == 1
    assert fake.count("csr") == 1


def test_aliases_of_a_weight_share_its_plan() -> None:
    kernel, packed = over(CusparseCsr), pack(Unstructured(), 16, 16)
    prepared, x = kernel.prepare(packed, spec_of(packed)), torch.randn(4, 16)
    kernel.run(prepared, x)
    for _ in range(3):
        kernel.run(dataclasses.replace(prepared, tensors=tuple(t.detach() for t in prepared.tensors)), x)
    assert len(kernel.library.plans()) == 1
    assert fake_of(kernel).calls.count("cusparseCreateCsr") == 1


def test_a_refusal_leaves_nothing_behind_and_names_the_call() -> None:
    for refused in ("cusparseSpMM_bufferSize", "cusparseSpMM_preprocess", "cusparseCreateDnMat", "cusparseCreateBsr"):
        kind, pattern = (CusparseBsr, Block(4, 4)) if "Bsr" in refused else (CusparseCsr, Unstructured())
        kernel, packed = over(kind, FakeLibrary(refused=frozenset({refused}))), pack(pattern, 16, 16)
        with pytest.raises(KernelError, match=f"{refused}: CUSPARSE_STATUS_NOT_SUPPORTED"):
            kernel.run(kernel.prepare(packed, spec_of(packed)), torch.randn(4, 16))
        assert fake_of(kernel).count(*DESCRIPTORS) == 0
        assert len(kernel.library.plans()) == 0


def test_only_so_many_products_are_kept_and_the_oldest_goes_first() -> None:
    kernel, packed = over(CusparseCsr, most=3), pack(Unstructured(), 16, 16)
    prepared, fake = kernel.prepare(packed, spec_of(packed)), fake_of(kernel)
    for tokens in (2, 3, 4, 2, 5):
        kernel.run(prepared, torch.randn(tokens, 16))
    assert len(kernel.library.plans()) == 3
    assert fake.count("csr") == 3
    fake.calls.clear()
    for tokens in (2, 4, 5):
        kernel.run(prepared, torch.randn(tokens, 16))
    assert "cusparseCreateCsr" not in fake.calls
    kernel.run(prepared, torch.randn(3, 16))
    assert fake.calls.count("cusparseCreateCsr") == 1


@dataclasses.dataclass
class Where:
    """A stream that a test chooses, as `current_stream` would say it."""

    stream: int = 7
    captured: bool = False

    def __call__(self, device: torch.device) -> tuple[int, bool]:
        return self.stream, self.captured


def test_every_stream_has_its_own_workspace_and_the_launch_is_put_on_it() -> None:
    where = Where()
    kernel, packed = over(CusparseCsr, where=where), pack(Unstructured(), 16, 16)
    prepared, fake = kernel.prepare(packed, spec_of(packed)), fake_of(kernel)
    for where.stream in (7, 9, 7):
        kernel.run(prepared, torch.randn(4, 16))
    assert fake.streams == [7, 9, 7]
    assert fake.count("csr") == 2


def test_a_captured_graph_takes_the_warmed_plan_and_keeps_it() -> None:
    where = Where()
    kernel, packed = over(CusparseCsr, where=where, most=2), pack(Unstructured(), 16, 16)
    prepared, fake, x = kernel.prepare(packed, spec_of(packed)), fake_of(kernel), torch.randn(4, 16)
    kernel.run(prepared, x)
    where.stream, where.captured = 9, True
    fake.calls.clear()
    for _ in range(2):
        kernel.run(prepared, x)
    assert fake.calls == 2 * LAUNCH
    assert fake.count("csr") == 1
    where.stream, where.captured = 7, False
    kernel.run(prepared, x)  # a replay may run beside this call: it needs a workspace of its own
    assert fake.count("csr") == 2
    for tokens in (5, 6, 7, 8):
        kernel.run(prepared, torch.randn(tokens, 16))
    where.stream, where.captured = 9, True
    fake.calls.clear()
    kernel.run(prepared, x)
    assert fake.calls == LAUNCH  # never evicted: the graph holds the workspace's address


def test_a_cold_capture_is_right_and_leaves_the_analysis_out() -> None:
    where = Where(captured=True)
    kernel, packed = over(CusparseCsr, where=where), pack(Unstructured(), 16, 16)
    prepared, fake, x = kernel.prepare(packed, spec_of(packed)), fake_of(kernel), torch.randn(4, 16)
    assert difference(kernel.run(prepared, x), x, unpack(packed)) is None
    assert "cusparseSpMM_preprocess" not in fake.calls


def test_threads_do_not_mix_their_calls() -> None:
    kernel, packed = over(CusparseCsr), pack(Unstructured(), 24, 24)
    prepared, failures, interval = kernel.prepare(packed, spec_of(packed)), [], sys.getswitchinterval()

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(25):
            x = torch.randn(3, 24, generator=generator)
            failures.append(difference(kernel.run(prepared, x), x, unpack(packed)))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    sys.setswitchinterval(1e-5)
    with contextlib.ExitStack() as stack:
        stack.callback(sys.setswitchinterval, interval)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == [None] * 100
