"""Fixtures of the CPU tests."""

import functools

import pytest

from sparsify_compiler.pipeline import torch as pipeline
from sparsify_compiler.pipeline.tuning import Tuner
from sparsify_compiler.runtime.tuning.candidates import Budget
from sparsify_compiler.runtime.tuning.selftest import Outcome, SelfTest

QUICK = Budget(seconds=0.02, least_rounds=3, variant_seconds=0.1)


@pytest.fixture(autouse=True)
def quickly_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measure kernels of compiled models for a moment only: who wins here says nothing, and is asserted nowhere."""
    monkeypatch.setattr(pipeline, "Tuner", functools.partial(Tuner, budget=QUICK))


@pytest.fixture(autouse=True)
def trusted_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare every compiled model a child process of seconds; tests of the self-test ask for `child_processes`."""
    if "child_processes" not in request.fixturenames:
        monkeypatch.setattr(SelfTest, "test", lambda *question, **more: Outcome())


@pytest.fixture
def child_processes() -> None:
    """Let self-tests run as they do for a user, in a child process."""
