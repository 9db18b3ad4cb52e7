"""Sparsify trained models: the most accurate sparse model that really runs faster, measured layer by layer.

from sparsify_compiler import NM, Recipe, SparseGPT, compile, make_rule

recipe = Recipe((make_rule("*", NM(2, 4), SparseGPT()),))
compiled, report = compile(model, batches, recipe=recipe)
"""

from sparsify_compiler.api import Heldout, Options, compile, evaluate, export, inspect, load, run
from sparsify_compiler.api_bench import (
    BenchReport,
    DecodeChoice,
    RandomLayers,
    bench,
    bench_decoder,
    bench_layers,
    bench_sites,
    survey_kernels,
)
from sparsify_compiler.api_table import Draw, MethodTable, Trial, method_table, method_trials, recipe_trial
from sparsify_compiler.errors import SparsifyError
from sparsify_compiler.export.report import Report, report_from_json
from sparsify_compiler.passes.prune.alps import ALPS
from sparsify_compiler.passes.prune.iobs_layer import IOBS
from sparsify_compiler.passes.prune.magnitude import Magnitude
from sparsify_compiler.passes.prune.obc import OBC
from sparsify_compiler.passes.prune.sparsegpt import SparseGPT
from sparsify_compiler.passes.prune.wanda import Wanda
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.pattern import NM, Block, Unstructured, parse_pattern
from sparsify_compiler.recipe import Recipe, Rule, format_recipe, make_rule, parse_recipe
from sparsify_compiler.steps import Allocate, Distill, FineTune, Permute, Reconstruct
from sparsify_compiler.version import __version__

__all__ = [
    "ALPS",
    "IOBS",
    "NM",
    "OBC",
    "Allocate",
    "BenchReport",
    "Block",
    "DecodeChoice",
    "Distill",
    "Draw",
    "FineTune",
    "Heldout",
    "Magnitude",
    "MethodTable",
    "Options",
    "Permute",
    "RandomLayers",
    "Recipe",
    "Reconstruct",
    "Report",
    "Rule",
    "SparseGPT",
    "SparsifyError",
    "Trial",
    "Unstructured",
    "Wanda",
    "WoodTaylor",
    "__version__",
    "bench",
    "bench_decoder",
    "bench_layers",
    "bench_sites",
    "compile",
    "evaluate",
    "export",
    "format_recipe",
    "inspect",
    "load",
    "make_rule",
    "method_table",
    "method_trials",
    "parse_pattern",
    "parse_recipe",
    "recipe_trial",
    "report_from_json",
    "run",
    "survey_kernels",
]
