"""Who may start: a kernel's own word on a specification, then its self-test in a child process, new or known."""

from dataclasses import dataclass

from sparsify_compiler.kernel import Activation, Kernel, MatmulSpec
from sparsify_compiler.runtime.tuning.cache import DiskCache, outcome_key
from sparsify_compiler.runtime.tuning.selftest import Outcome, Tester, case_for


@dataclass(frozen=True)
class Gate:
    """Asks kernels about one specification. `tester` None trusts them; `cache` gives and keeps what it finds."""

    spec: MatmulSpec
    bias: bool
    activation: Activation | None
    tester: Tester | None = None
    cache: DiskCache | None = None

    def ask(self, kernel: Kernel) -> Outcome:
        """Let a kernel start, or say why not; one that may crash is never run here before its self-test."""
        if reason := kernel.rejects(self.spec):
            return Outcome(reason)
        if self.tester is None:
            return Outcome()
        key = outcome_key(case_for(kernel.name, self.spec, self.bias, self.activation))
        if self.cache and (known := self.cache.outcome(key)):
            return known
        outcome = self.tester.test(kernel.name, self.spec, self.bias, self.activation)
        if self.cache and outcome.lasting:
            self.cache.keep_outcome(key, outcome)
        return outcome
