"""Small modules with every kind of site, for tests; deterministic weights."""

from typing import Any

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """Two linear layers around a ReLU, added to the input."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Mlp(nn.Module):
    """Four residual blocks and a head; inputs (batch, tokens, 32)."""

    def __init__(self, width: int = 32, inner: int = 64, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Residual(width, inner) for _ in range(depth))
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Cnn(nn.Module):
    """Plain, grouped, depthwise, strided and transposed convolutions with BatchNorm; inputs (batch, 3, 16, 16)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16)
        self.point = nn.Conv2d(16, 32, 1, stride=2)
        self.bn2 = nn.BatchNorm2d(32)
        self.up = nn.ConvTranspose2d(32, 8, 2, stride=2)
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.relu(self.grouped(x)) + self.depthwise(x)
        x = torch.relu(self.up(self.bn2(self.point(x))))
        return self.fc(x.mean((2, 3)))


class Tied(nn.Module):
    """An embedding tied to the head, and one linear layer used three times; inputs (batch, tokens) ids below 50."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.before, self.shared, self.after = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.relu(self.before(self.embed(ids)))
        for _ in range(3):
            x = torch.relu(self.shared(x))
        return self.head(torch.relu(self.after(x)))


def seeded(kind: type[nn.Module], seed: int = 0, **sizes: Any) -> nn.Module:
    """Build `kind` in eval mode with reproducible weights; BatchNorm statistics are drawn too."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = kind(**sizes).eval()
        for layer in module.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean = torch.randn(layer.num_features) * 0.1
                layer.running_var = torch.rand(layer.num_features) + 0.5
    return module


def mlp_batches(count: int = 3, samples: int = 4) -> list[Tensor]:
    """Correlated inputs for `Mlp`, so that curvature matters."""
    generator = torch.Generator().manual_seed(1)
    mix = torch.randn(32, 32, generator=generator)
    return [torch.randn(samples, 25, 32, generator=generator) @ mix for _ in range(count)]


def image_batches(count: int = 3, samples: int = 8) -> list[Tensor]:
    """Inputs for `Cnn`."""
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(samples, 3, 16, 16, generator=generator) for _ in range(count)]
