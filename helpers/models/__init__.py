"""The models that the notebooks train, and others to try the workbook on."""

from helpers.models.architectures import GPT, Encoder, ResNet, UNet
from helpers.models.mlp import (
    ACTIVATIONS,
    MLP,
    DocsMLP,
    TanhGELU,
    unequal_blocks,
    uniform_mlp,
)

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "DocsMLP",
    "Encoder",
    "GPT",
    "ResNet",
    "TanhGELU",
    "UNet",
    "unequal_blocks",
    "uniform_mlp",
]
