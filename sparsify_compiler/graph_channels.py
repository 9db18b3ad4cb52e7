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
    """A parameter that counts the channels: `shape` is its own with every axis split into factors.

    `channels` are the positions in `shape` that count them; `blocks` those that count the blocks.
    """

    parameter: str
    shape: tuple[int, ...]
    channels: tuple[int, ...]
    blocks: tuple[int, ...]

    def reordered(self, value: Tensor, orders: Tensor) -> Tensor:
        """Return `value`, the parameter or a tensor of its shape, with its channels in the given `orders`.

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


def rows_by_block(value: Tensor, member: Member) -> Tensor:
    """Bring a tensor of a member's shape into (blocks, rows, size): its channels last, all other factors in rows.

    Only for a member that counts the channels once.
    """
    (axis,) = member.channels
    rest = [at for at in range(len(member.shape)) if at != axis and at not in member.blocks]
    arranged = value.reshape(member.shape).permute(*member.blocks, *rest, axis)
    return arranged.reshape(prod(member.shape[at] for at in member.blocks), -1, member.shape[axis])
