"""The operator and the layer at work: variants, saved programs, threads, transforms, who must see the operator."""

import io
import pickle
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from kernels import skip_without_mkl
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from sparsify_compiler.errors import KernelError
from sparsify_compiler.kernel import Activation, MatmulSpec, Packed, Prepared
from sparsify_compiler.pattern import NM, Unstructured
from sparsify_compiler.runtime import kernels as release
from sparsify_compiler.runtime.dense import Dense
from sparsify_compiler.runtime.epilogue import activate
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.kernels import kernel_named, spec_for
from sparsify_compiler.runtime.layers.custom_op import opaque, sparse_linear
from sparsify_compiler.runtime.layers.modules import Running, SparseLinear
from sparsify_compiler.runtime.oracle import difference


def packed(out: int = 24, in_: int = 16, dtype: torch.dtype = torch.float32) -> Packed:
    weight = torch.randn(out, in_, generator=torch.Generator().manual_seed(0)).to(dtype)
    return format_for(NM(2, 4)).pack(weight, NM(2, 4).select(weight.abs(), 0.5), NM(2, 4))


@dataclass(frozen=True)
class Recording(Dense):
    """Dense under another name, which writes down the variants it is run with; refuses float64."""

    name: str = "recording"
    seen: tuple[list[str], ...] = ()

    def rejects(self, spec: MatmulSpec) -> str | None:
        return "no float64 here" if spec.dtype == torch.float64 else None

    def prepare(self, packed: Packed, spec: MatmulSpec) -> Prepared:
        if spec.dtype == torch.float16:
            raise KernelError("the compiler is missing")
        return Prepared(self.name, packed.shape, super().prepare(packed, spec).tensors)

    def run(
        self, prepared: Prepared, x: Tensor, bias: Tensor | None = None, activation: Activation | None = None
    ) -> Tensor:
        self.seen[0].append(prepared.variants)
        return super().run(prepared, x, bias, activation)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The variants that the kernel "recording" was run with."""
    variants: list[str] = []
    monkeypatch.setattr(release, "kernels", lambda: (Dense(), Recording(seen=(variants,))))
    kernel_named.cache_clear()
    yield variants
    kernel_named.cache_clear()


def test_the_variants_reach_the_kernel_by_both_ways(seen: list[str]) -> None:
    sparse = SparseLinear(packed(), None, "recording", (1, 64), variants="1=a;64=b")
    x = torch.randn(3, 16)
    with torch.no_grad():
        plain = sparse(x)
    assert torch.equal(sparse(x.requires_grad_()), plain)
    assert seen == ["1=a;64=b"] * 2


def test_a_program_saved_before_there_were_variants_still_runs() -> None:
    kernel, weight = Dense(), packed()
    tensors = list(kernel.prepare(weight, spec_for(weight, (1,))).tensors)
    x = torch.randn(3, 16)
    short = sparse_linear(x, tensors, None, "dense", 24, None)
    assert torch.equal(short, sparse_linear(x, tensors, None, "dense", 24, None, "1=a"))
    argument = sparse_linear._opoverload._schema.arguments[-1]
    assert (argument.name, argument.default_value) == ("variants", "")


@pytest.mark.parametrize("variants", ["", "1=a"])
def test_the_operator_passes_pytorchs_own_checks_with_and_without_variants(variants: str) -> None:
    weight = packed()
    tensors = list(Dense().prepare(weight, spec_for(weight, (1,))).tensors)
    x = torch.randn(2, 3, 16, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    torch.library.opcheck(sparse_linear, (x, tensors, bias, "dense", 24, "silu", variants))


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # PyTorch calls its own deprecated class
def test_an_exported_program_is_decomposed_saved_loaded_and_run() -> None:
    sparse = SparseLinear(packed(), torch.randn(24), "dense", (1,), variants="1=a", activation="relu")
    net = nn.Sequential(nn.LayerNorm(16), sparse).eval()
    batch = torch.export.Dim.DYNAMIC
    program = torch.export.export(net, (torch.randn(2, 16),), dynamic_shapes=({0: batch},)).run_decompositions()
    assert "sparsify.linear.default" in [str(node.target) for node in program.graph.nodes]
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(7, 16)
    assert torch.equal(torch.export.load(file).module()(x), net(x))


@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_a_layer_applies_its_activation_with_and_without_gradients(activation: Activation) -> None:
    plain = SparseLinear(packed(), torch.randn(24))
    fused = SparseLinear(packed(), plain.bias.detach(), activation=activation)
    x = torch.randn(5, 16)
    with torch.no_grad():
        assert torch.equal(fused(x), activate(plain(x), activation))
    (found,) = torch.autograd.grad(fused(x.requires_grad_()).sum(), x)
    (expected,) = torch.autograd.grad(activate(plain(x), activation).sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)  # 24 float32 terms of size 1
    assert f"activation={activation}" in repr(fused)
    with pytest.raises(KernelError, match="activation 'tanh': choose"):
        SparseLinear(packed(), None, activation="tanh")  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
def test_second_derivatives_agree_with_finite_differences(activation: Activation | None) -> None:
    weight = packed(6, 4, torch.float64)
    tensors = list(Dense().prepare(weight, spec_for(weight, (1,))).tensors)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)

    def layer(x: Tensor) -> Tensor:
        return sparse_linear(x, tensors, None, "dense", 6, activation)

    assert torch.autograd.gradgradcheck(layer, (x,))


def test_vmap_maps_over_the_input_and_refuses_the_weight_in_words() -> None:
    sparse = SparseLinear(packed(), torch.randn(24))
    x = torch.randn(5, 3, 16)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            torch.testing.assert_close(torch.vmap(sparse)(x), sparse(x), rtol=0, atol=1e-5)  # other row counts
            assert torch.vmap(sparse, in_dims=1, out_dims=1)(x).shape == (5, 3, 24)
    tensors = list(Dense().prepare(packed(), spec_for(packed(), (1,))).tensors)
    with pytest.raises(KernelError, match="vmap over the weight or bias"):
        torch.vmap(lambda b: sparse_linear(x[0], tensors, b, "dense", 24, None))(torch.randn(2, 24))


def test_a_functional_call_with_other_buffers_uses_them() -> None:
    sparse = SparseLinear(packed())
    zeros = {name: torch.zeros_like(buffer) for name, buffer in sparse.named_buffers() if name.startswith("prepared")}
    with torch.no_grad():
        assert not torch.func.functional_call(sparse, zeros, (torch.randn(2, 16),)).any()


def test_plain_inference_skips_the_operator_and_everyone_who_looks_on_sees_it() -> None:
    x, frozen = torch.randn(2, 16), SparseLinear(packed(), torch.randn(24).requires_grad_(False))
    assert not opaque(x, frozen.bias)
    assert opaque(x.clone().requires_grad_(), None)
    assert opaque(x, nn.Parameter(torch.randn(24)))
    with torch.no_grad():
        assert not opaque(x, nn.Parameter(torch.randn(24)))
        graph = make_fx(frozen)(x).graph
    assert "sparsify.linear.default" in [str(node.target) for node in graph.nodes]


def test_threads_that_did_not_load_the_layer_run_it_together() -> None:
    kernel = "torch_csr" if torch.backends.mkl.is_available() else "dense"
    sparse = SparseLinear(packed(), torch.randn(24).requires_grad_(False), kernel)
    inputs = [torch.randn(1 + n, 16) for n in range(4)]
    expected = [sparse(x) for x in inputs]
    found: dict[int, list[Tensor]] = {n: [] for n in range(4)}

    def work(number: int) -> None:
        for _ in range(20):
            found[number].append(sparse(inputs[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(found[n]) == 20 and all(torch.equal(y, expected[n]) for y in found[n]) for n in range(4))


def test_a_pickled_layer_runs_as_before() -> None:
    sparse = SparseLinear(packed(), torch.randn(24), "dense", (1, 8), "1=a", "gelu")
    again = pickle.loads(pickle.dumps(sparse))
    x = torch.randn(3, 16)
    assert torch.equal(again(x), sparse(x))
    assert (again.variants, again.tokens, again.running) == ("1=a", (1, 8), Running("dense"))


def test_a_layer_built_on_the_meta_device_takes_its_data_from_safetensors(tmp_path: Path) -> None:
    source = SparseLinear(packed(), torch.randn(24))
    save_file(source.state_dict(), tmp_path / "layer.safetensors")
    nothing = {name: tensor.to("meta") for name, tensor in source.packed.tensors.items()}
    empty = SparseLinear(Packed("nm", NM(2, 4), (24, 16), nothing), torch.empty(24, device="meta"))
    assert empty.running.kernel == ""
    with pytest.raises(KernelError, match="no data yet"):
        empty(torch.randn(1, 16))
    with pytest.raises(KernelError, match="no data yet"):
        empty(torch.randn(1, 16, device="meta"))
    empty.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    x = torch.randn(3, 16)
    assert torch.equal(empty(x), source(x))


def test_a_kernel_that_fails_to_prepare_after_a_move_gives_way_to_dense(seen: list[str]) -> None:
    sparse = SparseLinear(packed(), None, "recording")
    for move, reason in ((torch.float64, "no float64 here"), (torch.float16, "the compiler is missing")):
        with pytest.warns(UserWarning, match=reason):
            sparse = sparse.to(move)
        assert sparse.running.kernel == "dense"
        x = torch.randn(2, 16).to(move)
        assert difference(sparse(x), x, sparse.weight) is None
    assert seen == []
    with pytest.raises(KernelError, match="no float64 here"):
        SparseLinear(packed(dtype=torch.float64), None, "recording")


def test_the_kernels_of_one_name_are_one_object() -> None:
    assert kernel_named("dense") is kernel_named("dense")


def test_an_input_on_another_device_is_refused_before_its_address_is_used() -> None:
    with pytest.raises(KernelError, match=r"found \(2, 16\) torch.float32 on meta, the weight on cpu"):
        SparseLinear(packed())(torch.randn(2, 16, device="meta"))


def test_a_layer_carries_the_run_its_weight_was_packed_with() -> None:
    weight = torch.randn(8, 12)
    keep = NM(2, 4).select(weight.abs(), 0.5, run=6)
    spec = MatmulSpec(8, 12, torch.float32, NM(2, 4), 0.6, (3,), torch.device("cpu"), None, 6)
    sparse = SparseLinear.from_dense(weight, keep, NM(2, 4), None, "dense", spec)
    assert sparse.run == 6
    assert spec_for(sparse.packed, (3,), run=6).run == 6
    x = torch.randn(2, 12)
    assert difference(sparse(x), x, weight * keep) is None
    assert spec_for(format_for(Unstructured()).pack(weight, keep, Unstructured()), (1,)).run is None


def test_a_compiled_layer_follows_a_new_state_and_a_fallback() -> None:
    skip_without_mkl("torch_csr")
    torch._dynamo.reset()
    first, second = (SparseLinear(packed(), torch.randn(24), "torch_csr") for _ in range(2))
    second.values.mul_(2)
    second.prepare()
    run = torch.compile(first, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16)
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            assert torch.equal(run(x), first(x))
            first.load_state_dict(second.state_dict(), assign=not grad)
            assert torch.equal(run(x), first(x))
            assert torch.equal(first(x), second(x))
    with pytest.warns(UserWarning, match="it runs dense until"):
        first.half()
    assert torch.equal(run(x.half()), first(x.half()))
    torch._dynamo.reset()


def test_a_routed_name_finds_the_route_over_its_kernels() -> None:
    skip_without_mkl("torch_csr")
    routed = kernel_named("torch_csr@4+dense")
    assert routed.name == "torch_csr@4+dense"
    sparse = SparseLinear(packed(), torch.randn(24), "torch_csr@4+dense")
    dense = SparseLinear(packed(), sparse.bias.detach())
    for tokens in (1, 4, 5, 0):
        x = torch.randn(tokens, 16)
        torch.testing.assert_close(sparse(x), dense(x), rtol=0, atol=1e-5)  # 8 float32 terms of size 1
    with pytest.raises(KernelError, match="kernel 'nothing'"):
        kernel_named("nothing@4+dense")
