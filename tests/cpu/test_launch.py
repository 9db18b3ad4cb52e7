"""How arguments reach the driver: the launch of runtime/launch.py with a driver that reads what it is given."""

import ctypes
from dataclasses import dataclass, field

import pytest
import torch

from sparsify_compiler.errors import KernelError
from sparsify_compiler.runtime.launch import enqueue


@dataclass
class Driver:
    """Reads `parameters` as cuLaunchKernel does: an address for each argument, 8 bytes there."""

    count: int
    seen: list[int] = field(default_factory=list)
    shape: tuple[int, ...] = ()

    def launchKernel(self, function: int, *rest: int) -> None:
        *shape, parameters, extra = rest
        assert (function, extra) == (77, 0)
        self.shape = tuple(shape)
        places = (ctypes.c_void_p * self.count).from_address(parameters)
        self.seen = [ctypes.c_int64.from_address(place or 0).value for place in places]


def test_tensors_go_as_addresses_numbers_by_value_and_none_as_null() -> None:
    x = torch.zeros(4)
    driver = Driver(4)
    shape = (3, 2, 1, 128, 1, 1, 232448, 12345)
    enqueue(driver, 77, shape, (x, 7, None, -1))
    assert driver.seen == [x.data_ptr(), 7, 0, -1]
    assert driver.shape == shape


@pytest.mark.parametrize("number", [2**31, -(2**31) - 1])
def test_a_number_beyond_int32_is_refused_by_its_value(number: int) -> None:
    with pytest.raises(KernelError, match=rf"given {number}, which does not fit int32"):
        enqueue(Driver(1), 77, (1,) * 8, (number,))
