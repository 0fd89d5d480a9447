"""The models that the notebooks train: the docs' MLP, and MLPs of any widths."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh}


class DocsMLP(nn.Module):
    """The MLP of the docs: (batch, 1024) → 1024 → 1024 → (batch, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Linear(1024, 1024)
        self.relu = nn.ReLU()
        self.layer2 = nn.Linear(1024, 1024)
        self.layer3 = nn.Linear(1024, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer1(x)
        x = self.relu(x)
        x = self.layer2(x)
        x = self.relu(x)
        x = self.layer3(x)
        return x


def MLP(
    widths: Sequence[int], activation: str = "relu", dropout: float = 0.0
) -> nn.Sequential:
    """Build an MLP as a chain of children named layer1 … layerN.

    Args:
        widths: features of the input, of each hidden layer, and of the output:
            ``[1024, 256, 10]`` maps (batch, 1024) to (batch, 10) in two layers.
        activation: "relu", "gelu", "silu" or "tanh", after each hidden layer.
        dropout: probability of dropping, after each activation; 0 adds no module.

    Returns:
        A Sequential. A hidden layer is ``Sequential(linear, activation[, dropout])``,
        the last layer is the bare Linear.

    Raises:
        ValueError: on a width, activation or dropout that makes no MLP.
    """
    widths = list(widths)
    if len(widths) < 2 or any(not isinstance(w, int) or w < 1 for w in widths):
        raise ValueError(
            f"widths must be at least two positive whole numbers, got {widths}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
        )
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")

    def hidden(n_in: int, n_out: int) -> nn.Sequential:
        layer = nn.Sequential(nn.Linear(n_in, n_out), ACTIVATIONS[activation]())
        return layer.append(nn.Dropout(dropout)) if dropout else layer

    pairs = list(zip(widths, widths[1:], strict=False))
    layers = [hidden(n_in, n_out) for n_in, n_out in pairs[:-1]]
    layers.append(nn.Linear(*pairs[-1]))
    return nn.Sequential(
        OrderedDict((f"layer{i}", layer) for i, layer in enumerate(layers, 1))
    )


def uniform_mlp(
    depth: int = 8, width: int = 1024, activation: str = "gelu", dropout: float = 0.0
) -> nn.Sequential:
    """Build an MLP of ``depth`` equal hidden layers and 10 outputs.

    This is the family of the closed forms: every activation has the same size.
    """
    if not isinstance(depth, int) or depth < 1:
        raise ValueError(f"depth must be a positive whole number, got {depth}")
    return MLP([width] * (depth + 1) + [10], activation, dropout)


class TanhGELU(nn.Module):
    """GELU by a tanh, written out operation by operation, as some models have it.

    Source: Hendrycks and Gimpel, 2016, https://arxiv.org/abs/1606.08415, section 2.
    """

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        bent = torch.tanh(0.7978845608 * (h + 0.044715 * h**3))
        return 0.5 * h * (1 + bent)


def unequal_blocks(width: int = 1024) -> nn.Sequential:
    """Build five blocks that differ in weights, in kept tensors and in work.

    ``wide``, ``pointwise`` (without products), ``deep`` and ``narrow`` map ``width``
    features to as many, and ``head`` to four times as many.
    """
    if not isinstance(width, int) or width < 4:
        raise ValueError(f"width must be a whole number of at least 4, got {width}")
    blocks = {
        "wide": MLP([width, 4 * width, width], "gelu"),
        "pointwise": nn.Sequential(nn.LayerNorm(width), TanhGELU()),
        "deep": MLP([width] * 4, "relu"),
        "narrow": MLP([width, width // 4, width], "gelu"),
        "head": nn.Linear(width, 4 * width),
    }
    return nn.Sequential(OrderedDict(blocks))
