"""What a device's memory lets work take: a CPU's own figure, and a GPU's share by its size and by what is free."""

from dataclasses import dataclass

import pytest
import torch

from sparsify_compiler.device_memory import LEAST_WORK, free_bytes, work_bytes

GB = 1 << 30
CUDA = torch.device("cuda", 0)


@dataclass(frozen=True)
class Card:
    """What CUDA says of a GPU; `reserved` and `used` are PyTorch's."""

    total_memory: int
    free: int
    reserved: int = 0
    used: int = 0


def pretend(monkeypatch: pytest.MonkeyPatch, card: Card) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (card.free, card.total_memory))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: card.reserved)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: card.used)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)


def test_a_cpu_takes_its_own_figure_and_is_not_asked() -> None:
    assert free_bytes(torch.device("cpu")) is None
    assert work_bytes(torch.device("cpu"), 12345) == 12345


def test_what_the_allocator_holds_unused_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, Card(16 * GB, free=3 * GB, reserved=5 * GB, used=4 * GB))
    assert free_bytes(CUDA) == 4 * GB


@pytest.mark.parametrize(
    ("total", "free", "work"),
    [
        (139 * GB, 130 * GB, 8 * GB),  # a sixteenth is 8.7
        (139 * GB, 33 * GB, 8 * GB),  # what is free changes nothing while four times the work fits
        (139 * GB, 31 * GB, 4 * GB),
        (24 * GB, 22 * GB, GB),
        (16 * GB, 15 * GB, GB),
        (16 * GB, GB, GB // 4),
        (16 * GB, 0, LEAST_WORK),
    ],
)
def test_work_takes_a_sixteenth_of_a_gpu_or_less_where_that_is_taken(
    monkeypatch: pytest.MonkeyPatch, total: int, free: int, work: int
) -> None:
    pretend(monkeypatch, Card(total, free))
    assert work_bytes(CUDA, 12345) == work
