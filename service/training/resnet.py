"""The residual network for small images of He et al. 2016, section 4.2."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCKS_PER_STAGE = 3
"""Three stages of three blocks of two convolutions, the first convolution and the classifier: 20 layers."""


class ResNet20(nn.Module):
    """ResNet with 20 layers; stages of ``width``, ``2 * width`` and ``4 * width`` channels.

    Shape: ``(N, num_channels, H, W) -> (N, num_classes)`` logits; ``H`` and ``W`` of at least 4, else the last
        stage has a single position per image.
    Shortcuts hold no parameters: where a stage halves the image, they skip every second position and fill the
        new channels with zeros (option A). Every BatchNorm starts with weight 1, the last of a block too.
    Source: He, Zhang, Ren and Sun 2016, section 4.2; convolutions start as in He et al. 2015.
    """

    def __init__(self, num_channels: int, num_classes: int, width: int = 16, bn_momentum: float = 0.1) -> None:
        super().__init__()
        self.conv = _conv3x3(num_channels, width)
        self.bn = nn.BatchNorm2d(width, momentum=bn_momentum)
        self.stage1 = _stage(width, width, 1, bn_momentum)
        self.stage2 = _stage(width, 2 * width, 2, bn_momentum)
        self.stage3 = _stage(2 * width, 4 * width, 2, bn_momentum)
        self.classifier = nn.Linear(4 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = torch.relu(self.bn(self.conv(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.classifier(x.mean(dim=(2, 3)))
        return logits


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with BatchNorm, beside a shortcut (He et al. 2016, figure 5 left).

    Shape: ``(N, num_inputs, H, W) -> (N, num_outputs, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, num_inputs: int, num_outputs: int, stride: int, bn_momentum: float) -> None:
        super().__init__()
        self.conv1 = _conv3x3(num_inputs, num_outputs, stride)
        self.bn1 = nn.BatchNorm2d(num_outputs, momentum=bn_momentum)
        self.conv2 = _conv3x3(num_outputs, num_outputs)
        self.bn2 = nn.BatchNorm2d(num_outputs, momentum=bn_momentum)
        self.stride = stride
        self.num_new_channels = num_outputs - num_inputs

    def forward(self, x: Tensor) -> Tensor:
        """The block's output, after the last ReLU."""
        residual = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(residual + self._shortcut(x))

    def _shortcut(self, x: Tensor) -> Tensor:
        if self.stride == 1 and self.num_new_channels == 0:
            return x
        kept = x[:, :, :: self.stride, :: self.stride]
        return F.pad(kept, (0, 0, 0, 0, 0, self.num_new_channels))


def _stage(num_inputs: int, num_outputs: int, stride: int, bn_momentum: float) -> nn.Sequential:
    first = BasicBlock(num_inputs, num_outputs, stride, bn_momentum)
    rest = [BasicBlock(num_outputs, num_outputs, 1, bn_momentum) for _ in range(BLOCKS_PER_STAGE - 1)]
    return nn.Sequential(first, *rest)


def _conv3x3(num_inputs: int, num_outputs: int, stride: int = 1) -> nn.Conv2d:
    conv = nn.Conv2d(num_inputs, num_outputs, 3, stride=stride, padding=1, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv
