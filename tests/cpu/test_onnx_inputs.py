"""ONNX inputs: what a batch must hold, what is wrong with one, and batches made up."""

import re
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx_build import FLOAT, INT64, STRING, array, load, model, node

from sparsify_compiler.errors import DataError
from sparsify_compiler.frontends.onnx_generate import generate_inputs
from sparsify_compiler.frontends.onnx_inputs import Input


def lookup() -> onnx.ModelProto:
    """Token ids through an embedding of 7 rows and a mask."""
    nodes = [
        node("Gather", ["table", "input_ids"], ["e"]),
        node("Cast", ["attention_mask"], ["m"], to=FLOAT),
        node("Unsqueeze", ["m", "last"], ["w"]),
        node("Mul", ["e", "w"], ["p"]),
        node("MatMul", ["p", "weight"], ["y"]),
    ]
    infos = [("input_ids", INT64, ("batch", "sequence")), ("attention_mask", INT64, ("batch", "sequence"))]
    weights = {"table": array(7, 4), "last": np.array([2]), "weight": array(4, 3)}
    return model(nodes, infos, [("y", FLOAT, None)], weights)


IDS = torch.zeros(2, 3, dtype=torch.int64)


def test_the_inputs_say_name_dtype_and_shape() -> None:
    assert load(lookup()).inputs == (
        Input("input_ids", torch.int64, "int64", ("batch", "sequence")),
        Input("attention_mask", torch.int64, "int64", ("batch", "sequence")),
    )


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": IDS, "attention_mask": IDS},
        (IDS, IDS),
        [IDS.numpy(), IDS.numpy()],
        {"attention_mask": IDS.numpy(), "input_ids": IDS},
    ],
)
def test_a_batch_may_be_named_or_in_order_of_torch_or_numpy(batch: Any) -> None:
    values = load(lookup()).enter(batch)
    assert list(values) == ["input_ids", "attention_mask"]
    assert all(torch.equal(value, IDS) for value in values.values())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": IDS}, "lacks input 'attention_mask'; the model asks for input_ids: int64[batch, sequence]"),
        ({"input_ids": IDS, "attention_mask": IDS, "extra": IDS}, "has 'extra', which the model does not ask for"),
        ((IDS,), "the batch has 1 tensors, the model asks for 2"),
        (IDS, "the batch has 1 tensors"),
        ((IDS.int(), IDS), "input 'input_ids': asked for int64, found int32; convert the data"),
        ((IDS[0], IDS), "found shape (3,): another rank"),
        ((IDS.tolist(), IDS), "asked for input_ids: int64[batch, sequence], found a list"),
    ],
)
def test_a_batch_that_does_not_fit_says_what_was_asked_and_found(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        load(lookup()).enter(batch)


def test_a_fixed_size_must_be_met() -> None:
    proto = model([node("Relu", ["x"], ["y"])], [("x", FLOAT, (None, 3))], [("y", FLOAT, None)])
    with pytest.raises(DataError, match=r"x: float\[\?, 3\], found shape \(2, 4\): axis 1 must be 3"):
        load(proto).enter(torch.ones(2, 4))


def test_a_weight_that_is_also_an_input_is_not_asked_for() -> None:
    proto = model(
        [node("MatMul", ["x", "w"], ["y"])],
        [("x", FLOAT, (2, 4))],
        [("y", FLOAT, None)],
        {"w": array(4, 4)},
        ir_version=3,
    )
    graph = load(proto)
    assert [each.name for each in graph.inputs] == ["x"]
    assert graph.sites[0].refusal is None
    with pytest.raises(DataError, match="has 'w', which the model does not ask for"):
        graph.enter({"x": torch.ones(2, 4), "w": torch.ones(4, 4)})


def test_made_up_indices_stay_inside_the_table_and_masks_are_ones() -> None:
    batch = generate_inputs(load(lookup()), seed=0, batch=3, tokens=50)
    assert batch["input_ids"].shape == (3, 50)
    assert int(batch["input_ids"].min()) >= 0
    assert int(batch["input_ids"].max()) == 6, "150 draws from 7 reach the last row"
    assert torch.equal(batch["attention_mask"], torch.ones(3, 50, dtype=torch.int64))


def test_made_up_inputs_repeat_by_seed() -> None:
    graph = load(lookup())
    first, again, other = (generate_inputs(graph, seed)["input_ids"] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_unknown_sizes_are_tried_until_the_model_runs() -> None:
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("Relu", ["a"], ["y"])]
    proto = model(nodes, [("x", FLOAT, (1, None))], [("y", FLOAT, None)], {"w": array(512, 4)})
    assert generate_inputs(load(proto))["x"].shape == (1, 512)


def test_a_model_that_insists_on_one_row_gets_one() -> None:
    nodes = [node("Reshape", ["x", "s"], ["y"])]
    proto = model(nodes, [("x", FLOAT, ("batch", 4))], [("y", FLOAT, None)], {"s": np.array([4])})
    assert generate_inputs(load(proto))["x"].shape == (1, 4)


def test_images_are_made_large_enough_and_strings_are_words() -> None:
    nodes = [node("Conv", ["image", "w"], ["y"]), node("Identity", ["words"], ["z"])]
    infos = [("image", FLOAT, ("batch", 3, "height", "width")), ("words", STRING, ("batch",))]
    proto = model(nodes, infos, [("y", FLOAT, None), ("z", STRING, None)], {"w": array(2, 3, 3, 3)})
    made = generate_inputs(load(proto))
    assert made["image"].shape == (2, 3, 64, 64)
    assert list(made["words"]) == ["text", "text"]


def test_a_model_that_nothing_runs_through_asks_for_data() -> None:
    nodes = [node("MatMul", ["x", "w"], ["y"])]
    proto = model(nodes, [("x", FLOAT, (1, None))], [("y", FLOAT, None)], {"w": array(777, 4)})
    with pytest.raises(DataError, match="no made-up input runs through the model; give data"):
        generate_inputs(load(proto))
