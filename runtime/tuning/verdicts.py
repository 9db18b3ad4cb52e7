"""From measured rounds to a verdict: pure arithmetic, no clock and no kernel.

One weight copy serves all token counts, so the kernel with the greatest mean gain over the counts that were asked wins
(the geometric mean of its ratios to dense), when that gain exceeds the spread and no count loses more than a tenth.
Where another kernel is faster at some counts beyond the spread, a routed kernel that keeps both orders of the weight is
weighed against it in the same way.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from sparsify_compiler.runtime.routed import MOST_PARTS, routed_name
from sparsify_compiler.runtime.tuning.timing import Comparison, compare_pairs, spread

DENSE = "dense"
LEAST_SPEEDUP = 0.9
"""The least ratio to dense that a chosen kernel may have at any token count that was asked."""
LEAST_GAIN = 1.02
"""What a route must gain over the best single kernel to be worth the memory of a second order of the weight."""
MOST_SPREAD = 0.5
"""Of a candidate's own times (interquartile range / median): beyond, something else ran on the machine."""

Times = Mapping[str, Mapping[int, Sequence[float]]]
"""By kernel and token count, the microseconds of every round; a candidate given up early has the first rounds only."""

Parts = tuple[tuple[int | None, str], ...]
"""A routed kernel by the names of its components; see runtime/routed.py."""


@dataclass(frozen=True)
class Timing:
    """One candidate at one token count: medians in microseconds over the rounds.

    `speedup` is the median over the rounds of dense time / this kernel's time, `spread` that ratio's interquartile
    range over its median, `verdict` who won, in words. `variant` is the one measured, "" the kernel's own choice.
    """

    kernel: str
    tokens: int
    time_us: float
    dense_us: float
    spread: float
    speedup: float
    verdict: str
    variant: str = ""


@dataclass(frozen=True)
class Verdict:
    """The kernel to run, why in words, what was measured, and each refused kernel with its reason.

    `rounds` is the number of measurements of dense, and of every candidate that was not given up early. `variants`
    goes into `Prepared.variants`. `size_bytes` are the bytes that each candidate keeps for the weight.
    `busy` says that the times of dense or of the best rival were scattered by more than MOST_SPREAD; the reason too.
    """

    kernel: str
    reason: str
    timings: tuple[Timing, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)
    rounds: int = 0
    variants: str = ""
    size_bytes: Mapping[str, int] = field(default_factory=dict)
    busy: bool = False


@dataclass(frozen=True)
class Measured:
    """All that was found of the candidates of one weight, dense among them. `notes` are words for the reader."""

    times: Times
    variants: Mapping[str, Mapping[int, str]]
    size_bytes: Mapping[str, int]
    notes: Mapping[str, str]

    @property
    def tokens(self) -> tuple[int, ...]:
        """The token counts, each once, in the order they were asked."""
        return tuple(self.times[DENSE])

    def totals(self, parts: Parts) -> list[float]:
        """Return a route's microseconds, round by round, as far as all its parts went: the geometric mean over counts.

        So a ratio of two routes is the mean of their ratios at each token count, all of the same weight. A sum would
        let the largest count decide alone, and a layer be slower wherever it decodes.
        """
        rows = zip(*(self.times[runs(parts, n)][n] for n in self.tokens), strict=False)
        return [statistics.geometric_mean(row) for row in rows]

    def compare(self, first: Parts, second: Parts) -> Comparison:
        """Compare two routes over all token counts in the rounds that both were measured in."""
        a, b = self.totals(first), self.totals(second)
        common = min(len(a), len(b))
        return compare_pairs(a[:common], b[:common])


@dataclass(frozen=True)
class Choice:
    """A route (one part where a single kernel runs it all) and why; `busy` as in `Verdict`."""

    parts: Parts
    reason: str
    busy: bool = False

    @property
    def name(self) -> str:
        """The kernel's name, a routed one's where it has several parts."""
        return routed_name(self.parts)


def single(name: str) -> Parts:
    """Return the route that runs one kernel at every token count."""
    return ((None, name),)


def runs(parts: Parts, tokens: int) -> str:
    """Name the kernel that a route runs at `tokens` rows."""
    return next(name for bound, name in parts if bound is None or tokens <= bound)


def choose(measured: Measured, dense_copy: bool = False, routes: bool = True) -> Choice:
    """Choose by the rules above. `dense_copy` lets dense be a part of a route, `routes` any route at all."""
    choice = _choose(measured, dense_copy, routes)
    scatter = _scatter(measured)
    busy = f"; measured on a busy machine (spread {scatter:.0%}): measure again" if scatter > MOST_SPREAD else ""
    return Choice(choice.parts, choice.reason + _notes(measured) + busy, bool(busy))


def _scatter(measured: Measured) -> float:
    """Return the largest spread, over the token counts, of the times of dense and of the best sparse kernel."""
    sparse = [name for name in measured.times if name != DENSE]
    best = max(sparse, key=lambda name: measured.compare(single(DENSE), single(name)).speedup)
    return max(spread(measured.times[name][n]) for name in (DENSE, best) for n in measured.tokens)


def _choose(measured: Measured, dense_copy: bool, routes: bool) -> Choice:
    sparse = [name for name in measured.times if name != DENSE]
    gains = {name: measured.compare(single(DENSE), single(name)) for name in sparse}
    leader = max(sparse, key=lambda name: gains[name].speedup)
    winners = [name for name in sparse if gains[name].words() == "faster" and _bearable(single(name), measured)]
    if winners:
        best = max(winners, key=lambda name: gains[name].speedup)
        choice = Choice(single(best), _won(best, measured))
    else:
        choice = Choice(single(DENSE), _kept(sorted(sparse, key=lambda name: -gains[name].speedup), measured))
    if not routes:
        return choice
    route = _route(best if winners else leader, sparse, measured)
    if _gains(choice.parts, route, measured):
        choice = Choice(route, _words(route, choice.parts, measured))
    with_dense = _route(runs(choice.parts, measured.tokens[0]), [DENSE, *sparse], measured)
    if DENSE in {name for _, name in with_dense} and _gains(choice.parts, with_dense, measured):
        words = _words(with_dense, choice.parts, measured)
        if dense_copy:
            return Choice(with_dense, words)
        return Choice(choice.parts, f"{choice.reason}; not taken unless a dense copy is allowed (dense_copy): {words}")
    return choice


def _won(name: str, measured: Measured) -> str:
    """Say what the winner gains, and where it loses a little."""
    gain = measured.compare(single(DENSE), single(name))
    words = f"{name}: {_figure(gain)} over {_list(measured.tokens)} tokens"
    if lost := _lost(name, measured):
        words += f", slower at {lost}"
    return words


def _kept(names: Sequence[str], measured: Measured) -> str:
    """Say why dense stays: one figure a rival, the best first, and what stands against it where it is no loss."""
    rivals = []
    for name in names:
        gain, rounds = measured.compare(single(DENSE), single(name)), len(measured.totals(single(name)))
        why = []
        if gain.words() == "faster":
            why.append(f"slower at {_lost(name, measured)}, {LEAST_SPEEDUP}x is the least that is taken")
        elif gain.words() != "slower":
            why.append("too noisy to tell" if gain.words() == "too noisy to tell" else "within the spread")
        if rounds < len(measured.totals(single(DENSE))):
            why.append(f"given up after {rounds} rounds")
        rivals.append(f"{name} {_figure(gain)}" + (f" ({', '.join(why)})" if why else ""))
    return f"dense: kept over {_list(measured.tokens)} tokens against {', '.join(rivals)}"


def _figure(gain: Comparison) -> str:
    return f"{gain.speedup:.2f}x ±{gain.spread:.2f}"


def _lost(name: str, measured: Measured) -> str:
    """Name the token counts at which a kernel is slower beyond the spread, or slower than is taken."""
    rows = [timing(name, n, measured) for n in measured.tokens]
    lost = [row for row in rows if row.verdict.startswith("slower") or row.speedup < LEAST_SPEEDUP]
    return ", ".join(f"{row.tokens} ({row.speedup:.2f}x)" for row in lost)


def _notes(measured: Measured) -> str:
    """Say each note of the measurements once, with the kernels that it is about."""
    about: dict[str, list[str]] = {}
    for name, note in measured.notes.items():
        if note:
            about.setdefault(note, []).append(name)
    return "".join(f"; {', '.join(each)}: {note}" for note, each in about.items())


def by_reason(refused: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Gather (kernel, reason) pairs by reason, for a reader; what was found is left out where it is not one thing.

    >>> by_reason([("a", "runs on cuda; found cpu"), ("b", "runs 2:4; found 4:8"), ("c", "runs on cuda; found cpu")])
    {'runs on cuda; found cpu': ['a', 'c'], 'runs 2:4; found 4:8': ['b']}
    >>> by_reason([("a", "runs 2:4; found 4:8"), ("b", "runs 2:4; found 16x16")])
    {'runs 2:4': ['a', 'b']}
    """
    names: dict[str, list[str]] = {}
    whole: dict[str, set[str]] = {}
    for kernel, reason in refused:
        stem = without_found(reason)
        whole.setdefault(stem, set()).add(reason)
        if kernel not in names.setdefault(stem, []):
            names[stem].append(kernel)
    return {whole[stem].pop() if len(whole[stem]) == 1 else stem: each for stem, each in names.items()}


def without_found(reason: str) -> str:
    """Cut what was found from a refusal, as kernels write it: "runs on cuda; found cpu" is "runs on cuda"."""
    return reason.partition("; found ")[0]


def timing(name: str, tokens: int, measured: Measured, shown: str = "") -> Timing:
    """Sum up one candidate at one token count, under the name `shown` where given."""
    sparse = measured.times[name][tokens]
    dense = measured.times[DENSE][tokens][: len(sparse)]
    pair = compare_pairs(dense, sparse)
    return Timing(
        kernel=shown or name,
        tokens=tokens,
        time_us=statistics.median(sparse),
        dense_us=statistics.median(dense),
        spread=pair.spread,
        speedup=pair.speedup,
        verdict=f"{pair.words()}: {pair.speedup:.2f}x, spread {pair.spread:.0%}",
        variant=measured.variants.get(name, {}).get(tokens, ""),
    )


def _route(start: str, names: Sequence[str], measured: Measured) -> Parts:
    """Let `start` run everything but the counts where another of `names` is faster beyond the spread."""
    winners = {n: _fastest(start, names, n, measured) for n in sorted(measured.tokens)}
    parts: list[tuple[int | None, str]] = []
    for tokens, name in winners.items():
        if parts and parts[-1][1] == name:
            parts.pop()
        parts.append((tokens, name))
    if len(parts) > MOST_PARTS:
        return single(start)
    return (*parts[:-1], (None, parts[-1][1]))


def _fastest(start: str, names: Sequence[str], tokens: int, measured: Measured) -> str:
    best, best_speedup = start, 1.0
    for name in names:
        a, b = measured.times[start][tokens], measured.times[name][tokens]
        common = min(len(a), len(b))
        pair = compare_pairs(a[:common], b[:common])
        if pair.words() == "faster" and pair.speedup > best_speedup:
            best, best_speedup = name, pair.speedup
    return best


def _gains(old: Parts, new: Parts, measured: Measured) -> bool:
    """Say whether a route is faster than dense beyond the spread, and than the choice so far by LEAST_GAIN as well."""
    against_both = (measured.compare(other, new).words() == "faster" for other in (old, single(DENSE)))
    gain = measured.compare(old, new).speedup
    return len(new) > 1 and all(against_both) and gain >= LEAST_GAIN and _bearable(new, measured)


def _bearable(parts: Parts, measured: Measured) -> bool:
    """Say whether a route loses no more than LEAST_SPEEDUP allows at any token count."""
    return all(timing(runs(parts, n), n, measured).speedup >= LEAST_SPEEDUP for n in measured.tokens)


def _words(route: Parts, instead: Parts, measured: Measured) -> str:
    name = routed_name(route)
    gain, over = measured.compare(single(DENSE), route), measured.compare(instead, route)
    each = {component for _, component in route}
    memory = sum(measured.size_bytes.get(component, 0) for component in each) / max(measured.size_bytes[DENSE], 1)
    beside = "" if instead == single(DENSE) else f", {over.speedup:.2f}x over {routed_name(instead)} alone"
    words = f"{name}: {_figure(gain)} over {_list(measured.tokens)} tokens{beside}"
    return f"{words}, keeping at most {memory:.2f}x the dense weight's bytes"


def _list(tokens: tuple[int, ...]) -> str:
    return ", ".join(str(n) for n in tokens)
