"""Attention under a causal mask is run by the word `is_causal`, and any other mask as it is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.frontends.torch_causal import is_causal

IDS, WIDTH, HEADS = 50, 32, 2

Mask = Callable[[Tensor], Tensor]
"""Makes a mask from a tensor whose second axis is the tokens."""


def earlier(x: Tensor) -> Tensor:
    places = torch.arange(x.shape[1])
    return places[None, :] <= places[:, None]


def added(hidden: float) -> Mask:
    return lambda x: torch.where(earlier(x)[None, None], 0.0, hidden)


def near(x: Tensor) -> Tensor:
    """A sliding window: the last three places."""
    places = torch.arange(x.shape[1])
    return (places[None, :] <= places[:, None]) & (places[None, :] > places[:, None] - 3)


CAUSAL: dict[str, Mask] = {
    "bool": earlier,
    "bool, expanded over samples": lambda x: earlier(x)[None, None].expand(x.shape[0], 1, -1, -1),
    "minus infinity added": added(-torch.inf),
    "the least number added": added(torch.finfo(torch.float32).min),
}
OTHER: dict[str, Mask] = {
    "a window": near,
    "all is seen": lambda x: earlier(x) | True,
    "later places only discouraged": added(-10.0),
    "a bias for distance": lambda x: added(-torch.inf)(x) + earlier(x).cumsum(-1),
    "one sample sees all": lambda x: earlier(x)[None, None] | (torch.arange(x.shape[0]) == 1)[:, None, None, None],
}


class Attention(nn.Module):
    def __init__(self, mask: Mask, shown: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(IDS, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mask, self.shown = mask, shown

    def forward(self, ids: Tensor) -> Any:
        return self.attend(ids, self.mask(ids))

    def attend(self, ids: Tensor, mask: Tensor) -> Any:
        x = self.embed(ids)
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        y = self.out(functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))
        return (y, mask) if self.shown else y


class Attentions(TorchDispatchMode):
    """Notes for every attention kernel whether it was told `is_causal`, and whether it was given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[bool, bool]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if "scaled_dot_product" in str(func):
            names = [argument.name for argument in func._schema.arguments]
            given = {**dict(zip(names, args, strict=False)), **given}
            self.seen.append((bool(given.get("is_causal", False)), given.get("attn_mask") is not None))
        return func(*args, **(kwargs or {}))


def outputs(graph: TorchGraph, ids: Tensor) -> tuple[tuple[Tensor, ...], list[tuple[bool, bool]]]:
    values = graph.enter(ids)
    with torch.no_grad(), Attentions() as attentions:
        for segment in graph.segments:
            values = graph.run_segment(segment.index, values)
    return graph.outputs(values), attentions.seen


@pytest.mark.parametrize("mask", CAUSAL.values(), ids=CAUSAL)
def test_a_causal_mask_gives_way_to_the_word_and_the_outputs_stay(mask: Mask) -> None:
    torch.manual_seed(0)
    module = Attention(mask).eval()
    graph = trace_module(module, torch.randint(IDS, (2, 7)))
    for tokens in (7, 12):
        ids = torch.randint(IDS, (3, tokens))
        (found,), seen = outputs(graph, ids)
        assert seen == [(True, False)]
        torch.testing.assert_close(found, module(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", OTHER.values(), ids=OTHER)
def test_any_other_mask_is_used_as_it_is(mask: Mask) -> None:
    torch.manual_seed(0)
    module = Attention(mask).eval()
    ids = torch.randint(IDS, (2, 7))
    (found,), seen = outputs(trace_module(module, ids), ids)
    assert [word for word, _ in seen] == [False]
    torch.testing.assert_close(found, module(ids), rtol=1e-5, atol=1e-6)


def test_a_causal_mask_that_the_model_also_returns_stays_a_tensor() -> None:
    torch.manual_seed(0)
    module = Attention(earlier, shown=True).eval()
    ids = torch.randint(IDS, (2, 7))
    (found, mask), seen = outputs(trace_module(module, ids), ids)
    assert seen == [(False, True)]
    assert torch.equal(mask, earlier(ids))
    torch.testing.assert_close(found, module(ids)[0], rtol=1e-5, atol=1e-6)


def test_a_mask_that_comes_with_the_data_stays_a_tensor_though_it_is_causal() -> None:
    class Given(Attention):
        def forward(self, ids: Tensor, mask: Tensor) -> Any:
            return self.attend(ids, mask)

    torch.manual_seed(0)
    module = Given(earlier).eval()
    ids = torch.randint(IDS, (2, 7))
    batch = {"ids": ids, "mask": earlier(ids)}
    graph = trace_module(module, batch)
    values = graph.enter(batch)
    with torch.no_grad(), Attentions() as attentions:
        for segment in graph.segments:
            values = graph.run_segment(segment.index, values)
    assert attentions.seen == [(False, True)]


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.bfloat16])
def test_one_entry_that_differs_makes_a_mask_not_causal(dtype: torch.dtype) -> None:
    places = torch.ones(5, 5, dtype=torch.bool).tril()
    mask = places if dtype == torch.bool else torch.zeros(5, 5, dtype=dtype).masked_fill(~places, -torch.inf)
    assert is_causal(mask)
    for row in range(5):
        for column in range(5):
            other = mask.clone()
            other[row, column] = ~mask[row, column] if dtype == torch.bool else -1.0
            assert not is_causal(other), (row, column)


@pytest.mark.parametrize(
    "value", [None, 3, torch.ones(4, dtype=torch.bool), torch.ones(4, 5, dtype=torch.bool).tril(), torch.eye(3).long()]
)
def test_what_is_no_square_mask_of_a_known_dtype_is_not_causal(value: object) -> None:
    assert not is_causal(value)
