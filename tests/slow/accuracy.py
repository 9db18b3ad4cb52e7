"""Prune SmolLM2-135M by the protocol of the public one-shot pruners and measure its perplexity.

    python tests/slow/accuracy.py TOKENS.npz OUT/ [--no-refit] [--pattern unstructured] [--sparsity 0.5] [--resume]

TOKENS.npz holds token ids: `calib_c4` (128, 2048), `eval_wikitext2` and `eval_c4` (windows, 2048). Layers are pruned
front to back through the pruned prefix in float32; the head and the embedding stay dense; every window is measured.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import sparsify_compiler as sc
from sparsify_compiler.batches import call
from sparsify_compiler.evaluate import perplexity
from sparsify_compiler.passes.prune import METHODS
from sparsify_compiler.sources.models import demo_model_path, load_model


def windows(ids: np.ndarray, count: int) -> list[dict[str, Tensor]]:
    """Take the first `count` windows, one a batch."""
    return [{"input_ids": torch.from_numpy(window[None]).long()} for window in ids[:count]]


def show(stage: str, done: int, total: int) -> None:
    """Say where the run is, a line a step."""
    print(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total}", flush=True)


def main() -> None:
    """Compile, measure, print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--method", default="sparsegpt", choices=sorted(METHODS))
    parser.add_argument("--pattern", default="unstructured")
    parser.add_argument("--sparsity", type=float, default=None)
    parser.add_argument("--no-refit", action="store_true")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--windows", type=int, default=128)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--measure", type=int, default=10**6, help="windows to measure on, all by default")
    parser.add_argument("--sets", nargs="+", default=["eval_wikitext2"])
    chosen = parser.parse_args()
    ids = np.load(chosen.tokens)
    model = load_model(str(demo_model_path())).module
    assert model is not None
    pattern = sc.parse_pattern(chosen.pattern)
    sparsity = chosen.sparsity if chosen.sparsity is not None or pattern.fixed_sparsity() is not None else 0.5
    rule = sc.make_rule("*", pattern, METHODS[chosen.method](), sparsity, refit=not chosen.no_refit)
    options = sc.Options(output=chosen.output, onnx=False, tokens=(1,), resume=chosen.resume, overwrite=True)
    start = time.perf_counter()
    calibration = windows(ids["calib_c4"][:, : chosen.length], chosen.windows)
    heldout = sc.Heldout(windows(ids["eval_wikitext2"][:, :64], 1))  # the figures that count follow below
    compiled, report = sc.compile(
        model, calibration, recipe=sc.Recipe((rule,)), options=options, heldout=heldout, progress=show
    )
    assert isinstance(compiled, torch.nn.Module)
    found = {"seconds": time.perf_counter() - start, "peak_memory_bytes": report.peak_memory_bytes}
    for name in chosen.sets:
        batches = windows(ids[name][:, : chosen.length], chosen.measure)
        found[name] = perplexity(lambda batch: call(compiled, batch), batches, show)
    print(json.dumps({**found, **{key: str(value) for key, value in vars(chosen).items()}, **report.environment}))


if __name__ == "__main__":
    main()
