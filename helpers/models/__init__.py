"""The models that the notebooks train, and others to try the workbook on."""

from helpers import lazily

_MLP = "ACTIVATIONS MLP DocsMLP TanhGELU unequal_blocks uniform_mlp"
_OTHERS = "GPT Encoder ResNet UNet timm_model transformers_model"
_HOMES = dict.fromkeys(_MLP.split(), "mlp")
_HOMES |= dict.fromkeys(_OTHERS.split(), "architectures")
__all__ = list(_HOMES)
__getattr__ = lazily(__name__, _HOMES)
