"""Channels that a model may have in any order: which parameters count them, and how to put them in another.

Where a site's inputs are the outputs of other sites, their order is a free choice: rows of the weights that make them,
the parameters between, and columns of all that read them change places together, and the model computes what it did.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Member:
    """A parameter that counts the channels: `shape` is its own with every axis split into factors, slowest first.

    `ends` are the positions in `shape` after the last factor of each of its own axes; `channels` the positions that
    count the channels; `blocks` those that count the blocks, if any: then `channels` is one.
    """

    parameter: str
    shape: tuple[int, ...]
    ends: tuple[int, ...]
    channels: tuple[int, ...]
    blocks: tuple[int, ...]

    def reordered(self, value: Tensor, orders: Tensor) -> Tensor:
        """Return `value`, a tensor of the parameter's own shape, with its channels in the given `orders`.

        `orders` is int64 (blocks, size): channel p of a block of the result is channel `orders[block, p]` of `value`.
        """
        factored = value.reshape(self.shape)
        orders = orders.to(value.device)
        if not self.blocks:
            for axis in self.channels:
                factored = factored.index_select(axis, orders[0])
            return factored.reshape(value.shape)
        (axis,) = self.channels
        where = (*self.blocks, axis)
        index = orders.reshape([self.shape[at] for at in where])
        index = index.permute(sorted(range(len(where)), key=where.__getitem__))
        index = index.reshape([size if at in where else 1 for at, size in enumerate(self.shape)])
        return torch.take_along_dim(factored, index, axis).reshape(value.shape)

    def rows(self, value: Tensor, axis: int) -> Tensor:
        """Bring `value`, of the parameter's own shape, into (blocks, rows, channels) of its own axis `axis`.

        The channels are that axis's last factor; all factors that count neither them nor the blocks count rows.
        """
        last = self.ends[axis] - 1
        rest = [at for at in range(len(self.shape)) if at != last and at not in self.blocks]
        arranged = value.reshape(self.shape).permute(*self.blocks, *rest, last)
        return arranged.reshape(prod(self.shape[at] for at in self.blocks), -1, self.shape[last])


@dataclass(frozen=True)
class Channels:
    """`size` channels in each of `blocks` blocks (heads, say); a block's have an order of their own.

    `members` are all parameters that count them. `sites` names the sites that read them side by side, so that their
    order decides which weights share an N:M group.
    """

    size: int
    blocks: int
    members: tuple[Member, ...]
    sites: tuple[str, ...]


@dataclass(frozen=True)
class ChannelMap:
    """All channels of a graph whose order is free, and why the inputs of the other sites have to stay, by site."""

    free: tuple[Channels, ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)
