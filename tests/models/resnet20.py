"""ResNet20 for CIFAR-10 with parameter-free shortcuts (He et al. 2016, section 4.2, option A).

The trained weights are a development asset beside the repository: `tests.models.resnet20:resnet20`. Its input is
x / 255 with the ImageNet mean and standard deviation, 32 px: PREPROCESS.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "assets" / "resnet20_cifar10_akamaster.safetensors"
PREPROCESS = "mean=0.485,0.456,0.406 std=0.229,0.224,0.225 size=32 channels=rgb scale=255"


class Block(nn.Module):
    """Two 3x3 convolutions around a shortcut that subsamples and pads channels with zeros."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.widen = (channels - channels_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        if self.widen:
            x = functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.widen, self.widen))
        return functional.relu(y + x)


class ResNet20(nn.Module):
    """Images (n, 3, 32, 32) to scores (n, 10)."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._layer(16, 16, blocks, 1)
        self.layer2 = self._layer(16, 32, blocks, 2)
        self.layer3 = self._layer(32, 64, blocks, 2)
        self.linear = nn.Linear(64, 10)

    @staticmethod
    def _layer(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = Block(channels_in, channels, stride)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def random_resnet20() -> ResNet20:
    """The architecture with seeded random weights."""
    torch.manual_seed(0)
    return ResNet20().eval()


def resnet20() -> ResNet20:
    """The trained network: 91.73 % on the CIFAR-10 test set."""
    model = ResNet20()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
