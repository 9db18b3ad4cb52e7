"""Channels whose order is free, found in traced models: reordering changes what is pruned, not what is computed."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sparsify_compiler as sc
from sparsify_compiler.batches import Batch
from sparsify_compiler.channels import ChannelMap
from sparsify_compiler.evaluate import fidelity
from sparsify_compiler.frontends.torch import TorchGraph, trace_module
from sparsify_compiler.passes import permute
from sparsify_compiler.passes.channel_order import ColumnOrder
from sparsify_compiler.passes.permute import Permuted, permute_channels
from sparsify_compiler.passes.prune import METHODS
from sparsify_compiler.pipeline.rounds import forward_of_graph
from sparsify_compiler.plan import decide
from sparsify_compiler.steps import Permute
from tests.models.small import seeded


class GatedMlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(8, 24), nn.Linear(8, 24, bias=False), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return hidden


class Residual(nn.Module):
    """An embedding, a stream that two blocks write to and read from, and a head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(2))
        self.ins = nn.ModuleList(nn.Linear(16, 12) for _ in range(2))
        self.outs = nn.ModuleList(nn.Linear(12, 16) for _ in range(2))
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for norm, first, second in zip(self.norms, self.ins, self.outs, strict=True):
            x = x + second(F.gelu(first(norm(x))))
        logits: Tensor = self.head(x)
        return logits


class Attention(nn.Module):
    """Grouped-query attention: four heads of queries read two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 32), nn.Linear(16, 16), nn.Linear(16, 16)
        self.o = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length = x.shape[:2]
        q = self.q(x).view(batch, length, 4, 8).transpose(1, 2)
        k, v = (part(x).view(batch, length, 2, 8).transpose(1, 2) for part in (self.k, self.v))
        k, v = (part[:, :, None].expand(-1, -1, 2, -1, -1).reshape(batch, 4, length, 8) for part in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.o(mixed.transpose(1, 2).reshape(batch, length, 32))
        return result


class Separable(nn.Module):
    """conv, norm, relu, pool, depthwise conv, 1x1 conv, grouped conv, 1x1 conv, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.depth, self.point = nn.Conv2d(16, 16, 3, groups=16, padding=1), nn.Conv2d(16, 16, 1)
        self.grouped, self.last = nn.Conv2d(16, 16, 3, groups=2, padding=1), nn.Conv2d(16, 8, 1)
        self.flat = nn.Linear(8 * 4, 5)
        for value in (self.norm.running_mean, self.norm.weight, self.norm.bias):
            nn.init.normal_(value)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)
        x = self.last(self.grouped(self.point(F.hardswish(self.depth(x)))))
        scores: Tensor = self.flat(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return scores


class Between(nn.Module):
    """Two linear layers, and between them what `name` says."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 4)
        self.scale = nn.Parameter(torch.rand(12) + 1)
        self.register_buffer("lost", torch.rand(12) + 1, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.name == "parameter":
            x = x * self.scale
        elif self.name == "constant":
            x = x * self.lost
        elif self.name == "ramp":
            x = x + torch.arange(12)
        elif self.name == "cumulative sum":
            x = x.cumsum(-1)
        elif self.name == "slice":
            x = torch.cat([x[:, 5:], x[:, :5]], dim=1)
        elif self.name == "halves":
            left, right = x.chunk(2, dim=1)
            x = torch.cat([left * right, left], dim=1)
        elif self.name == "input":
            x = x * x.flip(1)
        elif self.name == "softmax":
            x = x.softmax(-1)
        elif self.name == "norm":
            x = F.layer_norm(x, (12,)) * x.pow(2).mean(-1, keepdim=True).rsqrt()
        y: Tensor = self.b(x)
        return y


ROWS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
CASES: dict[str, tuple[type[nn.Module], Batch]] = {
    "gated": (GatedMlp, ROWS),
    "residual": (Residual, torch.arange(24).reshape(3, 8)),
    "attention": (Attention, torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))),
    "separable": (Separable, torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2))),
}


def found_in(module: nn.Module, batch: Batch) -> tuple[TorchGraph, dict[str, tuple[int, int]], dict[str, str]]:
    """Trace, and return per site (blocks, size) of its free channels, and the reasons for the others."""
    graph = trace_module(module.eval(), batch)
    channels = graph.channels()
    free = {name: (each.blocks, each.size) for each in channels.free for name in each.sites}
    return graph, free, dict(channels.fixed)


def permuted(graph: TorchGraph, batch: Batch, *rules: sc.Rule, sweeps: int = 10) -> Permuted:
    # Every site is named outright, so that output heads are pruned as well.
    rules = rules or tuple(
        sc.make_rule(site.name, sc.NM(2, 4), sc.Wanda())
        for site in graph.sites
        if site.refusal is None and site.run > 3
    )
    return permute_channels(graph, decide(sc.Recipe(rules), graph.sites), [batch], batch, sweeps)


@pytest.mark.parametrize(
    ("case", "free"),
    [
        ("gated", {"down": (1, 24)}),
        ("residual", {"ins.0": (1, 16), "ins.1": (1, 16), "head": (1, 16), "outs.0": (1, 12), "outs.1": (1, 12)}),
        ("attention", {"o": (2, 8)}),
        ("separable", {"point": (1, 16), "grouped": (2, 8), "last": (2, 8)}),
    ],
)
def test_the_channels_between_sites_are_free_and_heads_are_blocks(case: str, free: dict[str, tuple[int, int]]) -> None:
    kind, batch = CASES[case]
    _, found, fixed = found_in(seeded(kind), batch)
    assert found == free
    assert not found.keys() & fixed.keys()


@pytest.mark.parametrize("case", CASES)
def test_any_order_of_free_channels_leaves_the_function_as_it_was(case: str) -> None:
    kind, batch = CASES[case]
    module = seeded(kind)
    graph, _, _ = found_in(module, batch)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    dense = forward_of_graph(trace_module(module, batch))
    generator = torch.Generator().manual_seed(5)
    for channels in graph.channels().free:
        orders = torch.stack([torch.randperm(channels.size, generator=generator) for _ in range(channels.blocks)])
        graph.reorder(channels, orders)
    moved = graph.module.state_dict()
    assert any(not torch.equal(moved[name], value) for name, value in before.items())
    assert all(moved[name].shape == value.shape for name, value in before.items())
    # float32 sums in another order: 1e-7 of each sum, squared
    assert fidelity(dense, forward_of_graph(graph), [batch]).relative_error < 1e-11
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("name", ["", "parameter", "softmax", "norm"])
def test_operations_that_treat_all_channels_alike_are_looked_through(name: str) -> None:
    graph, free, _ = found_in(seeded(lambda: Between(name)), ROWS)
    assert free == {"b": (1, 12)}
    dense = forward_of_graph(graph)([ROWS][0])[0]
    graph.reorder(graph.channels().free[0], torch.arange(12).flip(0)[None])
    torch.testing.assert_close(forward_of_graph(graph)(ROWS)[0], dense, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("constant", "a constant that is not in the model's state lies along it"),
        ("ramp", "arange"),
        ("cumulative sum", "cumsum follows"),
        ("slice", "it is joined with others"),
        ("halves", "it is joined with others"),
        ("input", "flip follows"),
    ],
)
def test_operations_that_tell_channels_apart_keep_them_in_order(name: str, reason: str) -> None:
    graph, free, fixed = found_in(seeded(lambda: Between(name)), ROWS)
    assert "b" not in free
    assert reason in fixed["b"]
    weights = [graph.weight(site) for site in graph.sites]
    done = permuted(graph, ROWS)
    assert all(torch.equal(graph.weight(site), old) for site, old in zip(graph.sites, weights, strict=True))
    notes = {decision.site.name: decision.notes for decision in done.decisions}
    assert "stay in order" in notes["b"][0]
    assert reason in notes["b"][0]


@pytest.mark.parametrize("case", CASES)
def test_reordering_keeps_the_function_and_more_of_the_weights(case: str) -> None:
    kind, batch = CASES[case]
    graph, free, _ = found_in(seeded(kind), batch)
    dense = forward_of_graph(trace_module(seeded(kind), batch))
    done = permuted(graph, batch)
    assert fidelity(dense, forward_of_graph(graph), [batch]).relative_error < 1e-11
    notes = {decision.site.name: decision.notes for decision in done.decisions if decision.notes}
    assert any("input channels reordered" in note for name in free for note in notes.get(name, ()))
    assert "another order" in done.notes[0]


class Shared(nn.Module):
    """Two layers read the same channels; `inputs` and `second` scale the channels and the second layer's weights."""

    def __init__(self, inputs: float, second: float) -> None:
        super().__init__()
        self.inner, self.one, self.two = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(16, 8)
        for parameter in self.inner.parameters():
            parameter.data *= inputs
        self.two.weight.data *= second

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x).relu()
        result: Tensor = self.one(hidden) + self.two(hidden)
        return result


@pytest.mark.parametrize("other", [sc.Wanda(), sc.Magnitude()], ids=lambda method: method.name)
def test_sites_that_share_an_order_count_alike_whatever_their_methods_and_scales(
    other: sc.Wanda | sc.Magnitude,
) -> None:
    found = []
    # powers of two: no product is rounded otherwise
    for inputs, second in ((1.0, 1.0), (2.0**-10, 1.0), (2.0**10, 1.0), (1.0, 2.0**-10), (1.0, 2.0**10)):
        graph = trace_module(seeded(Shared, inputs=inputs, second=second), ROWS)
        rules = sc.make_rule("one", sc.NM(2, 4), sc.Wanda()), sc.make_rule("two", sc.NM(2, 4), other)
        done = permuted(graph, ROWS, *rules)
        notes = {d.site.name: d.notes for d in done.decisions}
        found.append((graph.weight(graph.sites[1]), notes["one"]))
    assert "input channels reordered" in found[0][1][0]
    assert "in one order for 2 sites" in found[0][1][0]
    for weight, notes in found[1:]:
        assert torch.equal(weight, found[0][0])
        assert notes == found[0][1]


def test_a_method_without_data_orders_by_its_own_weights_and_others_by_what_inputs_do() -> None:
    for method, expected in ((sc.Magnitude(), [0, 1, 4, 5]), (sc.Wanda(), [0, 1, 2, 3])):
        module = seeded(lambda: nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 1)))
        module[0].weight.data = torch.eye(8) * torch.tensor([1.0, 1, 9, 9, 1, 1, 1, 1])[:, None]  # type: ignore[index, union-attr]
        module[1].weight.data = torch.tensor([[3.0, 3, 1, 1, 2, 2, 0.1, 0.1]])  # type: ignore[index, union-attr]
        graph = trace_module(module, torch.eye(8))
        permuted(graph, torch.eye(8), sc.make_rule("1", sc.NM(2, 4), method))
        reordered = graph.weight(graph.sites[1])[0, 0].tolist()
        groups = [reordered[:4], reordered[4:]]
        large = [[3.0, 3, 1, 1, 2, 2, 0.1, 0.1][at] for at in expected]
        # the four that count most are two a group, so that all of them stay
        assert all(sum(value in each for value in large) == 2 for each in groups)


def test_blocks_and_other_patterns_along_the_channels_are_refused() -> None:
    graph, _, _ = found_in(seeded(GatedMlp), ROWS)
    nm = sc.make_rule("down", sc.NM(2, 4), sc.Magnitude())
    done = permuted(graph, ROWS, nm, sc.make_rule("up", sc.Block(4, 4), sc.Magnitude(), 0.5))
    assert "up is pruned in blocks along them" in done.notes[0]
    ids = CASES["residual"][1]
    graph, _, _ = found_in(seeded(Residual), ids)
    done = permuted(
        graph, ids, sc.make_rule("ins.0", sc.NM(2, 4), sc.Wanda()), sc.make_rule("ins.1", sc.NM(4, 8), sc.Wanda())
    )
    assert "sites of several patterns read them (2:4, 4:8)" in done.notes[0]


def test_groups_that_would_cross_heads_are_refused() -> None:
    batch = CASES["attention"][1]
    graph, _, _ = found_in(seeded(Attention), batch)
    done = permuted(graph, batch, sc.make_rule("o", sc.NM(2, 3), sc.Wanda()))
    assert "groups of 2:3 cross from one 8 of them into the next" in done.notes[0]
    done = permuted(graph, batch, sc.make_rule("o", sc.NM(4, 8), sc.Wanda()))
    assert "8 of them are one group of 4:8" in done.notes[0]


def test_an_order_that_changes_the_outputs_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, _, _ = found_in(seeded(GatedMlp), ROWS)
    before = {site.name: graph.weight(site) for site in graph.sites}
    whole = graph.channels()
    part = type(whole)(
        tuple(type(c)(c.size, c.blocks, c.members[1:], c.sites) for c in whole.free), whole.fixed
    )  # one producer's rows are forgotten
    monkeypatch.setattr(graph, "channels", lambda: part)
    done = permuted(graph, ROWS)
    assert "was undone" in done.notes[0]
    assert all(torch.equal(graph.weight(site), before[site.name]) for site in graph.sites)


class Faint(nn.Module):
    """A stream that the hidden layer adds a little to, of half precision all through."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.a.weight.dtype)
        result: Tensor = x + 0.02 * self.b(F.gelu(self.a(x)))
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_wrong_order_is_told_from_a_right_one_in_every_precision(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = trace_module(seeded(Faint).to(dtype), ROWS)
    assert "read their inputs in another order" in permuted(graph, ROWS).notes[0]  # a right order is kept
    before = {site.name: graph.weight(site) for site in graph.sites}
    ((channels,), fixed) = (graph.channels().free, graph.channels().fixed)
    wrong = type(channels)(channels.size, 1, channels.members[1:], channels.sites)  # rows of one parameter stay
    monkeypatch.setattr(graph, "channels", lambda: ChannelMap((wrong,), fixed))
    native = forward_of_graph(graph)(ROWS)[0].double()
    swap = torch.arange(12)[None].clone()
    swap[0, :2] = torch.tensor([1, 0])
    graph.reorder(wrong, swap)
    changed = (forward_of_graph(graph)(ROWS)[0].double() - native).norm() / native.norm()
    graph.reorder(wrong, swap)
    assert changed < 0.02  # which bfloat16, of a precision of 0.008, may also do by rounding
    monkeypatch.setattr(permute, "order_columns", lambda *_: ColumnOrder(swap[0], 1.0, 0.0))
    done = permuted(graph, ROWS)
    assert "times what rounding may, and was undone" in done.notes[0]
    assert all(torch.equal(graph.weight(site), before[site.name]) for site in graph.sites)


def test_a_right_order_is_kept_where_float32_products_end_in_float64() -> None:
    class Widened(GatedMlp):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).double()

    assert "read their inputs in another order" in permuted(trace_module(seeded(Widened), ROWS), ROWS).notes[0]


def test_the_whole_pipeline_reorders_and_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    batches = [torch.randn(32, 8, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    text = 'permute = { sweeps = 5 }\n[[rule]]\nsites = "down"\npattern = "2:4"\nmethod = "wanda"\n'
    recipe = sc.parse_recipe(text, METHODS)
    assert recipe.permute == Permute(5)

    def run(name: str, resume: bool = False, stop: str = "") -> bytes:
        def progress(stage: str, done: int, total: int) -> None:
            if stop and stage.startswith(stop):
                raise KeyboardInterrupt

        module = seeded(GatedMlp)
        options = sc.Options(output=tmp_path / name, onnx=False, tokens=(1,), resume=resume)
        compiled, report = sc.compile(module, batches, recipe=recipe, options=options, progress=progress)
        assert isinstance(compiled, GatedMlp)
        assert torch.equal(module.up.weight, seeded(GatedMlp).up.weight)
        assert not torch.equal(compiled.gate.bias, module.gate.bias)
        assert torch.equal(compiled.gate.bias.sort().values, module.gate.bias.sort().values)
        assert any("N:M sites read their inputs in another order" in note for note in report.notes)
        return (tmp_path / name / "model.safetensors").read_bytes()

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("killed", stop="tune")
    assert run("killed", resume=True) == whole
