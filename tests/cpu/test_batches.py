import pytest
import torch
from torch import Tensor, nn

from sparsify_compiler.batches import (
    call,
    forward_inputs,
    home,
    main_tensor,
    named_tensors,
    output_tensors,
    sample_count,
    size_bytes,
    to_device,
)
from sparsify_compiler.errors import DataError, ModelError


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> dict[str, object]:
        return {"y": x if scale is None else x * scale, "none": None, "pair": (x + 1, [x + 2])}


class Cached(nn.Module):
    def forward(self, x: Tensor, use_cache: bool = True, **kwargs: object) -> tuple[Tensor, ...]:
        return (x, x) if use_cache else (x,)


def test_a_tensor_a_tuple_and_a_dict_give_the_same_call() -> None:
    x, scale = torch.arange(6.0).reshape(2, 3), torch.tensor(2.0)
    by_position = call(TwoInputs(), (x, scale))
    by_name = call(TwoInputs(), {"scale": scale, "x": x})
    assert all(torch.equal(a, b) for a, b in zip(by_position, by_name, strict=True))
    assert torch.equal(call(TwoInputs(), x)[0], x)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dict"])
def test_a_batch_is_brought_to_where_the_module_lies_and_stays_where_it_was(kind: str) -> None:
    x = torch.zeros(2, 3)
    batch = {"tensor": x, "tuple": (x,), "dict": {"input": x}}[kind]
    (y,) = call(nn.Linear(3, 4, device="meta"), batch)  # type: ignore[arg-type]
    assert y.device.type == "meta"
    assert x.device.type == "cpu"


def test_a_module_lies_where_its_first_parameter_or_else_its_first_buffer_is() -> None:
    assert home(nn.Linear(2, 2, device="meta")).type == "meta"
    assert home(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"
    assert home(nn.ReLU()).type == "cpu"
    assert home(nn.ReLU(), "meta").type == "meta"


def test_outputs_are_flattened_in_order_and_none_is_left_out() -> None:
    x = torch.zeros(2)
    assert [float(y[0]) for y in call(TwoInputs(), x)] == [0.0, 1.0, 2.0]


def test_no_cache_is_asked_of_a_forward_that_offers_one() -> None:
    assert len(call(Cached(), torch.zeros(1))) == 1


def test_a_name_that_a_keyword_catch_all_would_swallow_is_an_error() -> None:
    with pytest.raises(DataError, match="no input 'inputs_id'; it takes x, use_cache"):
        call(Cached(), {"x": torch.zeros(1), "inputs_id": torch.zeros(1)})


def test_an_output_that_is_no_tensor_is_an_error() -> None:
    with pytest.raises(ModelError, match="returned a str"):
        output_tensors(("text",))


def test_forward_inputs_lists_names_and_which_are_required() -> None:
    assert [(spec.name, spec.required) for spec in forward_inputs(TwoInputs())] == [("x", True), ("scale", False)]


def test_sizes_and_names_cover_the_three_kinds_of_batch() -> None:
    x, y = torch.zeros(4, 3), torch.zeros((), dtype=torch.int64)
    assert size_bytes((x, y)) == 4 * 3 * 4 + 8
    assert sample_count({"y": y, "x": x}) == 4
    assert [name for name, _ in named_tensors((x, y))] == ["input 0", "input 1"]
    assert main_tensor({"mask": x, "input_ids": x + 1})[0, 0] == 1
    assert isinstance(to_device((x, y), "cpu"), tuple)
    with pytest.raises(DataError, match="axis 0"):
        main_tensor(y)
