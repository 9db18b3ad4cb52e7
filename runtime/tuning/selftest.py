"""Try a kernel in a child process before it may touch the user's: a crash, a hang or a wrong result refuses it there.

The child draws its own weight of the same shape, pattern and density; the user's weight is never sent. One child tries
many kernels, one after the other, and is started again after one that took it down. Requests and answers are lines of
JSON through pipes; what a kernel prints goes elsewhere and is thrown away but for its end.
"""

import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections import deque
from dataclasses import dataclass
from typing import IO, Protocol

import torch

from sparsify_compiler.kernel import Activation, MatmulSpec

CHILD = "sparsify_compiler.runtime.tuning.selftest_child"
KERNELS = "sparsify_compiler.runtime.kernels:kernel_named"
PRINTED_LINES = 20


@dataclass(frozen=True)
class Case:
    """What the child is asked: one kernel at one specification, as plain values. `find` is "module:function"."""

    find: str
    kernel: str
    out: int
    in_: int
    dtype: str
    pattern: str
    density: float
    tokens: tuple[int, ...]
    device: str
    run: int | None = None
    bias: bool = False
    activation: Activation | None = None
    step_seconds: float = 60.0


@dataclass(frozen=True)
class Outcome:
    """What a self-test found: None in `refused`, or why the kernel may not run.

    `lasting` False: it may be otherwise next time (a timeout, memory that ran out). `uncapturable` says why the calls
    cannot be held by a CUDA graph; None where they can, and on a CPU.
    """

    refused: str | None = None
    lasting: bool = True
    uncapturable: str | None = None


class Tester(Protocol):
    """What the tuner asks before it runs a kernel."""

    def test(self, kernel: str, spec: MatmulSpec, bias: bool, activation: Activation | None) -> Outcome:
        """Try the kernel of that name at `spec`, with all its variants there."""
        ...


def case_for(
    kernel: str, spec: MatmulSpec, bias: bool, activation: Activation | None, find: str = KERNELS, seconds: float = 60.0
) -> Case:
    """Put a specification into plain values; the density is rounded to 1 %."""
    return Case(
        find=find,
        kernel=kernel,
        out=spec.out,
        in_=spec.in_,
        dtype=str(spec.dtype).removeprefix("torch."),
        pattern=str(spec.pattern),
        density=round(spec.density, 2),
        tokens=spec.tokens,
        device=str(spec.device) if spec.device.type != "cuda" else f"cuda:{_index(spec.device)}",
        run=spec.run,
        bias=bias,
        activation=activation,
        step_seconds=seconds,
    )


def _index(device: torch.device) -> int:
    """Return which GPU is meant: the child has a current one of its own."""
    return torch.cuda.current_device() if device.index is None else device.index


class SelfTest:
    """The child process, started at the first question. Close it (or leave a `with`) when tuning is done.

    `step_seconds` is how long one variant may take at one token count, its compilation included; `start_seconds` how
    long the child may take to import and to answer at all. `find` tells the child where kernels are found by name.
    """

    def __init__(self, find: str = KERNELS, step_seconds: float = 120.0, start_seconds: float = 300.0) -> None:
        """Set the limits; nothing is started yet."""
        self.find, self.step_seconds, self.start_seconds = find, step_seconds, start_seconds
        self._child: _Child | None = None

    def __enter__(self) -> "SelfTest":
        """Return itself."""
        return self

    def __exit__(self, *failure: object) -> None:
        """Close."""
        self.close()

    def close(self) -> None:
        """End the child; a later question starts another."""
        if self._child is not None:
            self._child.end()
        self._child = None

    def test(self, kernel: str, spec: MatmulSpec, bias: bool, activation: Activation | None) -> Outcome:
        """Try a kernel; see `Tester`. Never raises for what the kernel does."""
        case = case_for(kernel, spec, bias, activation, self.find, self.step_seconds)
        limit = self.step_seconds
        if self._child is None:
            try:
                self._child = _Child()
            except OSError as error:
                return Outcome(f"its self-test could not start a process: {error}", lasting=False)
            limit = self.start_seconds
        outcome, usable = _ask(self._child, case, limit)
        if not usable:
            self.close()
        return outcome


def _ask(child: "_Child", case: Case, first_limit: float) -> tuple[Outcome, bool]:
    """Send one case and wait for its outcome; also whether the child may be asked again."""
    child.send(json.dumps(dataclasses.asdict(case)))
    step, limit = "starting", first_limit
    while True:
        try:
            line = child.lines.get(timeout=limit)
        except queue.Empty:
            return Outcome(f"its self-test hung for {limit:.0f} s at {step}", lasting=False), False
        if line is None:
            words, lasting = child.death()
            return Outcome(f"its self-test {words} at {step}", lasting), False
        if not line.endswith(b"\n"):  # its end came in the middle of an answer
            continue
        answer = json.loads(line)
        if "step" in answer:
            step, limit = answer["step"], case.step_seconds
            continue
        return Outcome(answer["refused"], answer["lasting"], answer["uncapturable"]), answer["usable"]


class _Child:
    """A running child: `lines` are its answers, None at its end."""

    def __init__(self) -> None:
        """Start it with the import path of this process. Raises OSError."""
        paths = [os.path.abspath(path) for path in sys.path]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", CHILD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
        )
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.lines: queue.Queue[bytes | None] = queue.Queue()
        self.printed: deque[bytes] = deque(maxlen=PRINTED_LINES)
        self.threads = (
            threading.Thread(target=_read, args=(self.process.stdout, self.lines), daemon=True),
            threading.Thread(target=_drain, args=(self.process.stderr, self.printed), daemon=True),
        )
        for thread in self.threads:
            thread.start()
        self._finalizer = weakref.finalize(self, _stop, self.process)

    def send(self, line: str) -> None:
        """Send one request; a child that is gone shows in `lines`."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line.encode() + b"\n")
            self.process.stdin.flush()
        except OSError:  # its end is read from `lines`, with the reason
            return

    def death(self) -> tuple[str, bool]:
        """Say how it ended, and whether it would again: what kills from outside is most often a lack of memory."""
        try:
            code = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            return "stopped answering", False
        self.threads[1].join(timeout=5)
        printed = [line.decode(errors="replace").strip() for line in self.printed]
        if code < 0:
            known = {entry.value: entry.name for entry in signal.Signals}
            return f"crashed ({known.get(-code, f'signal {-code}')})", known.get(-code) != "SIGKILL"
        last = next((line for line in reversed(printed) if line), "it said nothing")
        return f"ended with code {code} ({last[:200]})", True

    def end(self) -> None:
        """Close its input, which ends it, or kill it where it does not listen."""
        self._finalizer()
        for thread in self.threads:
            thread.join(timeout=5)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and close its pipes."""
    if process.stdin is not None:
        with contextlib.suppress(OSError):  # unread requests of a process that is gone
            process.stdin.close()
    try:
        process.wait(timeout=0.5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read(pipe: IO[bytes], lines: "queue.Queue[bytes | None]") -> None:
    with pipe:
        for line in pipe:
            lines.put(line)
    lines.put(None)


def _drain(pipe: IO[bytes], printed: deque[bytes]) -> None:
    """Keep the end of what is printed, in pieces of bounded length: a kernel may print without line ends."""
    with pipe:
        while piece := pipe.readline(4096):
            printed.append(piece)
