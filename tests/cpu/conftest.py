"""Fixtures of the CPU tests."""

import pytest

from sparsify_compiler.runtime.tuning.selftest import Outcome, SelfTest


@pytest.fixture(autouse=True)
def trusted_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare every compiled model a child process of seconds; tests of the self-test ask for `child_processes`."""
    if "child_processes" not in request.fixturenames:
        monkeypatch.setattr(SelfTest, "test", lambda *question, **more: Outcome())


@pytest.fixture
def child_processes() -> None:
    """Let self-tests run as they do for a user, in a child process."""
