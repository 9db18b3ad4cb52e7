"""Every step of a compile that sums statistics multiplies float32 in float32, whatever the program around chose."""

from collections import defaultdict

import torch

import sparsify_compiler as sc
from sparsify_compiler.passes.prune.woodtaylor import WoodTaylor
from sparsify_compiler.steps import Allocate
from tests.models.small import Tied, seeded


def test_allocation_and_gradients_too_run_in_whole_float32() -> None:
    seen: defaultdict[str, set[str]] = defaultdict(set)

    def watch(stage: str, done: int, total: int) -> None:
        seen[stage].add(torch.get_float32_matmul_precision())

    batches = [torch.randint(0, 50, (4, 6), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    rule = sc.make_rule("*", sc.Unstructured(), WoodTaylor(curvature="fisher"), 0.5, refit=False)
    recipe = sc.Recipe((rule,), rounds=2, allocate=Allocate("error-curve"))
    torch.set_float32_matmul_precision("medium")
    try:
        sc.compile(seeded(Tied), batches, recipe=recipe, options=sc.Options(tokens=(1,)), progress=watch)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    for step in ("allocate", "gradient", "round 1 of 2", "round 2 of 2"):
        stages = [stage for stage in seen if stage.startswith(step)]
        assert stages, f"no stage {step!r} in {sorted(seen)}"
        assert set().union(*(seen[stage] for stage in stages)) == {"highest"}, step
