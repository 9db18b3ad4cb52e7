"""EfficientNet-Lite0 for ImageNet at 224 px: EfficientNet-B0 without squeeze-excitation, ReLU6 for swish.

Its padding is TensorFlow's "same", fixed for 224 px: one more pixel at the right and bottom of a strided convolution.
The trained weights are a development asset beside the repository: `tests.models.efficientnet_lite0:efficientnet_lite0`.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

WEIGHTS = Path(__file__).resolve().parents[3] / "shared" / "assets" / "efficientnet_lite0_imagenet.safetensors"
PREPROCESS = "mean=127 std=128 size=224 channels=rgb scale=1"

# kernel, stride, expansion, channels out, repeats
STAGES = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
EPSILON = 1e-3


def same_padding(kernel: int, stride: int) -> nn.ZeroPad2d:
    """Pad an even-sized image so that the output has size / stride pixels, the odd pixel at the end."""
    total = kernel - stride
    return nn.ZeroPad2d((total // 2, total - total // 2) * 2)


class InvertedBottleneck(nn.Module):
    """Expand by 1x1, filter each channel, project by 1x1; a shortcut where the shape stays."""

    def __init__(self, channels_in: int, kernel: int, stride: int, expansion: int, channels: int) -> None:
        super().__init__()
        wide = channels_in * expansion
        self.expands = expansion > 1
        if self.expands:
            self._expand_conv = nn.Conv2d(channels_in, wide, 1, bias=False)
            self._bn0 = nn.BatchNorm2d(wide, eps=EPSILON)
        self._pad = same_padding(kernel, stride)
        self._depthwise_conv = nn.Conv2d(wide, wide, kernel, stride, groups=wide, bias=False)
        self._bn1 = nn.BatchNorm2d(wide, eps=EPSILON)
        self._project_conv = nn.Conv2d(wide, channels, 1, bias=False)
        self._bn2 = nn.BatchNorm2d(channels, eps=EPSILON)
        self.shortcut = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(self._pad(y))))
        y = self._bn2(self._project_conv(y))
        return y + x if self.shortcut else y


class EfficientNetLite0(nn.Module):
    """Images (n, 3, 224, 224) to scores (n, 1000)."""

    def __init__(self) -> None:
        super().__init__()
        self._pad = same_padding(3, 2)
        self._conv_stem = nn.Conv2d(3, 32, 3, 2, bias=False)
        self._bn0 = nn.BatchNorm2d(32, eps=EPSILON)
        blocks, width = [], 32
        for kernel, stride, expansion, channels, repeats in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedBottleneck(width, kernel, 1 if repeat else stride, expansion, channels))
                width = channels
        self._blocks = nn.ModuleList(blocks)
        self._conv_head = nn.Conv2d(width, 1280, 1, bias=False)
        self._bn1 = nn.BatchNorm2d(1280, eps=EPSILON)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self._bn0(self._conv_stem(self._pad(x))))
        for block in self._blocks:
            x = block(x)
        x = functional.relu6(self._bn1(self._conv_head(x)))
        return self._fc(x.mean(dim=(2, 3)))


def random_efficientnet_lite0() -> EfficientNetLite0:
    """The architecture with seeded random weights."""
    torch.manual_seed(0)
    return EfficientNetLite0().eval()


def efficientnet_lite0() -> EfficientNetLite0:
    """The trained network: 69.6 % on the development subset of 500 ImageNet validation images of 10 classes."""
    model = EfficientNetLite0()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval()
