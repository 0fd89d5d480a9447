"""The models that the notebooks train, and others to try the workbook on."""

from helpers.models.architectures import (
    GPT,
    Encoder,
    ResNet,
    UNet,
    timm_model,
    transformers_model,
)
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
    "timm_model",
    "transformers_model",
    "unequal_blocks",
    "uniform_mlp",
]
