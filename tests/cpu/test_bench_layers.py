"""Single layers and whole decoders under the clock: limits by hand, checks that stop a wrong kernel."""

import dataclasses

import pytest
import torch

from sparsify_compiler.errors import KernelError, ModelError
from sparsify_compiler.kernel import MatmulSpec, Packed
from sparsify_compiler.pattern import NM, Block, Unstructured
from sparsify_compiler.runtime.benchmark import decode as decode_module
from sparsify_compiler.runtime.benchmark.ceilings import Ceilings, measure_ceilings, product_bytes
from sparsify_compiler.runtime.benchmark.decode import DecodeCase, bench_decode
from sparsify_compiler.runtime.benchmark.decoder import DecoderConfig
from sparsify_compiler.runtime.benchmark.layers import bench_layer, random_layer
from sparsify_compiler.runtime.formats import kept_entries, unpack
from sparsify_compiler.runtime.tuning.tune import Timing, Verdict

CPU = torch.device("cpu")
SMALL = DecoderConfig(32, 48, 2, 4, 2, 8, 50)


def dense_wins(packed: Packed, spec: MatmulSpec) -> Verdict:
    return Verdict("dense", "dense: always")


def test_the_limit_is_the_larger_of_bytes_and_operations_over_the_ceilings() -> None:
    ceilings = Ceilings("toy", "float32", bytes_per_s=1e9, flops_per_s=4e9)
    assert ceilings.limit_us(2000, 4000) == pytest.approx(2.0)
    assert ceilings.limit_us(2000, 16000) == pytest.approx(4.0)


def test_ceilings_of_this_machine_are_positive_and_possible() -> None:
    found = measure_ceilings(CPU, torch.float32, rounds=1)
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s < 1e15


def test_every_row_stands_beside_its_own_limit() -> None:
    packed = random_layer((64, 32), NM(2, 4), None, torch.float32, CPU)
    timings = tuple(Timing("fast", tokens, 2.0, 6.0, 0.01, 3.0, "faster: 3.00x, spread 1%") for tokens in (1, 64))

    def tune_one(packed: Packed, spec: MatmulSpec) -> Verdict:
        return Verdict("fast", "fast: faster", tuple(t for t in timings if t.tokens in spec.tokens), {"slow": "no GPU"})

    ceilings = Ceilings("toy", "float32", bytes_per_s=1e10, flops_per_s=1e11)
    found = bench_layer("mlp", packed, (1, 64), CPU, ceilings, tune_one)
    assert [(row.kernel, row.tokens) for row in found.rows] == [("dense", 1), ("fast", 1), ("dense", 64), ("fast", 64)]
    dense, fast, _, many = found.rows
    assert dense.limit_us == pytest.approx(1e6 * (64 * 32 * 4 + 96 * 4) / 1e10)
    assert fast.limit_us == pytest.approx(1e6 * product_bytes(packed, 1) / 1e10)
    assert fast.weight_bytes == 64 * 16 * 4 + 64 * 4 == packed.size_bytes()
    assert many.limit_us == pytest.approx(1e6 * max(product_bytes(packed, 64) / 1e10, 2 * 64 * 32 * 32 / 1e11))
    assert many.of_limit == pytest.approx(many.limit_us / 2.0)
    assert (found.chosen, found.refused) == ("1: fast, 64: fast", (("slow", "no GPU"),))


def test_random_layers_obey_the_pattern_and_repeat() -> None:
    for pattern, sparsity, kept in ((Unstructured(), 0.9, 205), (NM(8, 32), None, 512), (Block(16, 16), 0.75, 512)):
        first, second = (random_layer((64, 32), pattern, sparsity, torch.float16, CPU, seed=3) for _ in range(2))
        assert int(kept_entries(first)[0].sum()) == kept
        assert torch.equal(unpack(first), unpack(second))
    with pytest.raises(KernelError, match="give a sparsity"):
        random_layer((64, 32), Unstructured(), None, torch.float16, CPU)
    with pytest.raises(KernelError, match="48x20"):
        random_layer((48, 20), Block(32, 32), 0.5, torch.float16, CPU)


def case(**changes: object) -> DecodeCase:
    made = DecodeCase(SMALL, Unstructured(), 0.5, torch.float32, CPU, batch=2, context=8)
    return dataclasses.replace(made, **changes)


def test_a_decoder_is_measured_dense_and_sparse() -> None:
    found = bench_decode(case(), dense_wins, repeats=3)
    assert [row.label for row in found.rows] == ["dense", "sparse"]
    dense, sparse = found.rows
    assert dense.verdict == "base"
    assert dense.tokens_per_s == pytest.approx(2e3 / dense.median_ms)
    assert dense.case == sparse.case == "decode, batch 2, context 8, 2 layers"
    assert [name for name, _ in found.verdicts] == ["qkv", "o", "gate_up", "down"]
    assert bench_decode(case(layers=1), dense_wins, repeats=3).rows[0].size_bytes < dense.size_bytes


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="torch_csr needs a PyTorch with MKL")
def test_the_sparse_decoder_runs_the_kernel_that_was_chosen() -> None:
    asked = []

    def csr(packed: Packed, spec: MatmulSpec) -> Verdict:
        asked.append((packed.shape, spec.tokens))
        return Verdict("torch_csr", "torch_csr: for the test")

    found = bench_decode(case(), csr, repeats=3)
    assert asked == [((64, 32), (2,)), ((32, 32), (2,)), ((96, 32), (2,)), ((32, 48), (2,))]
    assert found.rows[1].label == "sparse"


def test_a_wrong_kernel_stops_the_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_module, "difference", lambda *_: "3 of 4 outputs differ")
    with pytest.raises(KernelError, match=r"\(64, 32\) unstructured is wrong: 3 of 4 outputs differ"):
        bench_decode(case(), dense_wins, repeats=3)


def test_models_that_do_not_fit_are_refused_with_how_many_layers_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**15, 2**36))
    with pytest.raises(ModelError, match=r"0\.0 GiB are free on cuda:0; measure fewer layers \(about \d+ fit\)"):
        bench_decode(case(device=torch.device("cuda:0")), dense_wins)
