"""A layer on a GPU holds its weight once: the packed tensors wait in host memory."""

import pytest
import torch
from kernels import choose

from sparsify_compiler.pattern import NM
from sparsify_compiler.runtime.formats import format_for
from sparsify_compiler.runtime.layers.modules import SparseLinear
from sparsify_compiler.runtime.oracle import difference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU; torch.cuda.is_available() is False"),
]


def test_an_offloaded_layer_takes_only_its_prepared_tensors_of_the_gpu() -> None:
    weight = torch.randn(1024, 1024, device="cuda", dtype=torch.float16)
    packed = format_for(NM(2, 4)).pack(weight, choose(NM(2, 4), weight), NM(2, 4))
    module = SparseLinear(packed, None, "dense", offload=True)
    assert module.values.device.type == "cpu"
    assert all(tensor.is_cuda for tensor in module.prepared)
    x = torch.randn(3, 1024, device="cuda", dtype=torch.float16)
    assert difference(module(x), x, module.weight) is None
    changed = module.bfloat16()
    assert (changed.values.device.type, changed.prepared[0].device.type) == ("cpu", "cuda")
    assert difference(changed(x.bfloat16()), x.bfloat16(), changed.weight) is None
    assert module.cpu()(x.cpu().bfloat16()).device.type == "cpu"
