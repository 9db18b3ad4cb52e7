"""Cutting a list of steps into segments."""

from sparsify_compiler.graph import Step, cut, number_blocks


def chain(*parameters: str | None, block: str | None = None) -> list[Step]:
    """Steps that each read the one before; step i writes v{i}."""
    return [
        Step(reads=(f"v{i - 1}",), writes=(f"v{i}",), parameter=parameter, block=block)
        for i, parameter in enumerate(parameters)
    ]


def test_an_unnamed_chain_is_cut_between_its_sites() -> None:
    assert cut(chain("a", None, "b", None, "c")) == [1, 3]


def test_a_graph_with_one_site_is_one_segment() -> None:
    assert cut(chain(None, "a", None)) == []
    assert cut(chain(None, None)) == []


def test_a_residual_block_is_not_cut_inside_when_modules_are_named() -> None:
    steps = []
    for layer in range(3):
        start, block = f"x{layer}", f"layers.{layer}"
        steps += [
            Step((start,), (f"h{layer}",), f"w{layer}.in", block),
            Step((f"h{layer}",), (f"o{layer}",), f"w{layer}.out", block),
            Step((f"o{layer}", start), (f"x{layer + 1}",), None, block),
        ]
    assert cut(steps) == [3, 6]


def test_values_from_before_the_first_site_do_not_count_as_crossing() -> None:
    masks = tuple(f"mask{i}" for i in range(5))
    steps = [
        Step((), masks, None),
        *(Step((f"x{i}", *masks), (f"x{i + 1}",), f"w{i}", f"layers.{i}") for i in range(3)),
    ]
    assert cut(steps) == [2, 3]


def test_a_weight_that_is_used_twice_never_has_a_cut_between_its_uses() -> None:
    assert cut(chain("a", None, "shared", None, "b", None, "shared", None, "c")) == [1, 7]


def test_many_live_values_forbid_a_cut() -> None:
    wide = tuple(f"y{i}" for i in range(4))
    steps = [Step(("x",), wide, "a", "0"), Step(wide, ("z",), "b", "1"), Step(("z",), ("o",), "c", "2")]
    assert cut(steps) == [2]


def test_blocks_are_named_by_the_first_number_of_their_path() -> None:
    paths = ["model.layers.0.attn.q", "model.layers.0.mlp", "model.layers.1.mlp", "model.norm", None]
    assert number_blocks(paths, [True, True, True, False, False]) == [
        "model.layers.0", "model.layers.0", "model.layers.1", None, None,
    ]  # fmt: skip


def test_a_wrapper_that_holds_every_site_is_looked_through() -> None:
    paths = ["0.encoder.layer.0.fc", "0.encoder.layer.1.fc", "0.encoder.layer.2.fc", "1"]
    assert number_blocks(paths, [True, True, True, False]) == [
        "0.encoder.layer.0", "0.encoder.layer.1", "0.encoder.layer.2", "1",
    ]  # fmt: skip


def test_a_weight_used_twice_and_nothing_else_is_one_segment() -> None:
    assert cut(chain(None, "a", None, "a", None)) == []
