"""The models that others measured, as far as ``helpers.models`` does not have them.

Each has the layers, and the order of operations, of the one that was measured.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

from helpers.models import GPT, TanhGELU

Conv, Norm = nn.Conv2d, nn.BatchNorm2d


class Bottleneck(nn.Module):
    """A residual block of three convolutions: (batch, channels, height, width).

    Args:
        before: whether it normalises what it is given; None if it normalises behind
            each convolution, as it does in the first paper.
    """

    def __init__(
        self, channels_in: int, width: int, stride: int, before: bool | None
    ) -> None:
        super().__init__()
        relu, channels = nn.ReLU(inplace=True), 4 * width
        self.layers = nn.Sequential(
            *([Norm(channels_in), relu] if before else []),
            Conv(channels_in, width, 1, bias=False),
            *(Norm(width), relu),
            Conv(width, width, 3, stride, 1, bias=False),
            *(Norm(width), relu),
            Conv(width, channels, 1, bias=False),
            *([Norm(channels)] if before is None else []),
        )
        self.last = relu if before is None else nn.Identity()
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            narrow = Conv(channels_in, channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(narrow, Norm(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers(x)
        y += self.shortcut(x)
        return self.last(y)


def resnet(blocks: Sequence[int] = (3, 4, 6, 3), classes: int = 1000) -> nn.Sequential:
    """Build ResNet-50 or a deeper one; with three stages memcnn's, for small pictures.

    Source: He et al., 2015, https://arxiv.org/abs/1512.03385, tables 1 and 6.
    """
    small, relu = len(blocks) == 3, nn.ReLU(inplace=True)
    channels = width = 16 if small else 64
    stem = Conv(3, width, *((3, 1, 1) if small else (7, 2, 3)), bias=False)
    pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
    layers = OrderedDict(conv1=stem, bn1=Norm(width), relu=relu, maxpool=pool)
    for stage, count in enumerate(blocks):
        parts = layers[f"layer{stage + 1}"] = nn.Sequential()
        for place in range(count):
            stride = 2 if stage and not place else 1
            before = bool(stage or place) if small else None
            parts.append(Bottleneck(channels, width << stage, stride, before))
            channels = 4 * width << stage
    layers["end"] = nn.Sequential(*([Norm(channels), relu] if small else []))
    layers |= {"avgpool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten()}
    return nn.Sequential(layers | {"fc": nn.Linear(channels, classes)})


class DenseBlock(nn.ModuleList):
    """Layers that each are given the input and all that was made before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [x]
        for layer in self:
            made.append(layer(torch.cat(made, 1)))
        return torch.cat(made, 1)


def densenet(
    blocks: Sequence[int] = (6, 12, 24, 16), growth: int = 32
) -> nn.Sequential:
    """Build DenseNet-121: Huang et al., 2016, https://arxiv.org/abs/1608.06993."""
    relu, channels = nn.ReLU(inplace=True), 2 * growth

    def normalised(channels_in: int, channels_out: int, *size: int) -> list[nn.Module]:
        convolution = Conv(channels_in, channels_out, *size, bias=False)
        return [Norm(channels_in), relu, convolution]

    layers = [Conv(3, channels, 7, 2, 3, bias=False), Norm(channels), relu]
    layers.append(nn.MaxPool2d(3, 2, 1))
    for stage, count in enumerate(blocks):
        if stage:
            layers += [*normalised(channels, channels // 2, 1), nn.AvgPool2d(2, 2)]
            channels //= 2
        layers.append(DenseBlock())
        for _ in range(count):
            wide = normalised(channels, 4 * growth, 1)
            new = nn.Sequential(*wide, *normalised(4 * growth, growth, 3, 1, 1))
            layers[-1].append(new)
            channels += growth
    layers += [Norm(channels), relu, nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(channels, 1000))


class Around(nn.Sequential):
    """Layers with a way around them."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + super().forward(x)


class Heads(nn.MultiheadAttention):
    """PyTorch's own attention; if its weights are asked for, not a fused one."""

    def __init__(self, width: int, heads: int, weights: bool) -> None:
        super().__init__(width, heads, batch_first=True)
        self.weights = weights

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x, x, x, need_weights=self.weights)[0]


def encoder(
    depth: int, width: int, heads: int, weights: bool = True, bent: type = nn.ReLU
) -> nn.Sequential:
    """Build a transformer's blocks: (batch, length, width) → the same."""
    blocks = nn.Sequential()
    for _ in range(depth):
        wide = [nn.Linear(width, 4 * width), bent(), nn.Linear(4 * width, width)]
        parts = {"attention": Around(nn.LayerNorm(width), Heads(width, heads, weights))}
        parts["mlp"] = Around(nn.LayerNorm(width), *wide)
        blocks.append(nn.Sequential(OrderedDict(parts)))
    return blocks


class ViT(nn.Module):
    """ViT-L/16: pictures (batch, 3, 224, 224) → (batch, classes).

    Source: Dosovitskiy et al., 2020, https://arxiv.org/abs/2010.11929.

    Args:
        in_backward: whether Adam uses each gradient as soon as backward has made it.
    """

    def __init__(self, classes: int = 1000, in_backward: bool = False) -> None:
        super().__init__()
        self.patches = Conv(3, 1024, 16, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 1024))
        self.places = nn.Parameter(torch.zeros(1, 197, 1024))
        self.blocks = encoder(24, 1024, 16, weights=False, bent=nn.GELU)
        self.norm, self.head = nn.LayerNorm(1024), nn.Linear(1024, classes)
        for parameter in self.parameters() if in_backward else ():
            adam = torch.optim.Adam([parameter], foreach=False)
            for use in (adam.step, adam.zero_grad):
                parameter.register_post_accumulate_grad_hook(lambda _, use=use: use())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).permute(0, 2, 1)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places
        return self.head(self.norm(self.blocks(x))[:, 0])


class PlainNorm(nn.LayerNorm):
    """A layer norm, operation by operation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = x.var(-1, keepdim=True, unbiased=False)
        return self.weight * ((x - mean) / torch.sqrt(variance + 1e-5)) + self.bias


class CausalAttention(nn.Module):
    """Twelve causal heads with dropout, operation by operation."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        layers = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.inputs, self.output = nn.ModuleList(layers), nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)
        self.register_buffer("mask", torch.ones(length, length).triu(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = [layer(x) for layer in self.inputs]
        key, query, value = (y.unflatten(-1, (12, -1)).transpose(1, 2) for y in made)
        scores = query @ key.transpose(2, 3)
        scores.masked_fill_(self.mask.bool(), -torch.inf)
        weights = self.dropout(torch.softmax(scores / key.shape[-1] ** 0.5, -1))
        return self.output((weights @ value).transpose(1, 2).flatten(2))


class GPT2(GPT):
    """GPT-2 of 124 million parameters, written out: ids (batch, 1024) → scores."""

    def __init__(self, width: int = 768) -> None:
        super().__init__(0, width, 12, vocabulary=50257, context=1024)
        self.blocks.append(nn.Dropout(0.1))
        for _ in range(12):
            wide = [
                nn.Linear(width, 4 * width),
                TanhGELU(),
                nn.Linear(4 * width, width),
            ]
            for parts in ([CausalAttention(width, 1024)], wide):
                self.blocks.append(Around(PlainNorm(width), *parts, nn.Dropout(0.1)))
        self.norm = PlainNorm(width)


def chain(depth: int, width: int) -> nn.Sequential:
    """Build Linear layers with a ReLU behind each."""
    layers = ((nn.Linear(width, width), nn.ReLU()) for _ in range(depth))
    return nn.Sequential(*(layer for pair in layers for layer in pair))


def shared(width: int) -> nn.Sequential:
    """Build two Linear layers that have one weight."""
    pair = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
    pair[1].weight = pair[0].weight
    return pair
