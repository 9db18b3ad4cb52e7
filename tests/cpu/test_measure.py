"""What quality is measured: perplexity only where each token is predicted from those before it."""

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.batches import Batch, call, main_tensor
from sparsify_compiler.errors import DataError
from sparsify_compiler.export.onnx_model import write_torch_onnx
from sparsify_compiler.pipeline.forwards import forward_of
from sparsify_compiler.pipeline.quality import Heldout, measure
from sparsify_compiler.progress import silent
from sparsify_compiler.sources.models import load_model

SIZES = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "vocab_size": 64}

# transformers' own calls into torch.export warn about torch's internals.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")


def ids(length: int = 12) -> Tensor:
    return torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(0))


def measured(forward, batch: Batch) -> list[str]:
    with torch.no_grad():
        return [quality.measure for quality in measure(forward, forward, Heldout([batch]), silent)]


def bert(**sizes: int) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES | sizes)).eval()


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SIZES, bos_token_id=1, eos_token_id=2)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("length", [2, 12, 300])
def test_a_masked_language_model_has_no_perplexity(length: int) -> None:
    forward = partial(call, bert())
    assert measured(forward, {"input_ids": ids(length)}) == ["relative error", "cosine"]
    with pytest.raises(DataError, match="not a causal language model"):
        measure(None, forward, Heldout([ids(length)]), silent)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_causal_language_model_has_a_perplexity_whatever_its_padding(dtype: torch.dtype) -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, 8:] = 0
    mask[1, :5] = 0
    forward = partial(call, llama().to(dtype))
    assert measured(forward, ids()) == ["perplexity"]
    assert measured(forward, {"input_ids": ids(), "attention_mask": mask}) == ["perplexity"]


def test_padding_does_not_hide_that_a_model_looks_ahead() -> None:
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[:, 5:] = 0
    assert measured(partial(call, bert()), {"input_ids": ids(), "attention_mask": mask})[0] == "relative error"


@pytest.mark.parametrize("ahead", [False, True])
def test_a_plain_function_is_probed_at_its_own_sizes(ahead: bool) -> None:
    def forward(batch: Batch) -> tuple[Tensor, ...]:
        tokens = main_tensor(batch)
        assert tokens.shape == (2, 12)
        hot = nn.functional.one_hot(tokens, 64).float()
        return (hot.mean(1, keepdim=True).expand_as(hot) if ahead else hot.cumsum(1),)

    assert measured(forward, ids())[0] == ("relative error" if ahead else "perplexity")


@pytest.mark.parametrize(("make", "name"), [(bert, "relative error"), (llama, "perplexity")])
def test_an_onnx_file_is_probed_too(make, name: str, tmp_path: Path) -> None:
    write_torch_onnx(make(), {"input_ids": ids()}, tmp_path / "model.onnx", {})
    forward = forward_of(load_model(str(tmp_path / "model.onnx")), torch.device("cpu"))
    assert measured(forward, {"input_ids": ids()})[0] == name
