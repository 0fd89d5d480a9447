"""Models to try the workbook on: each has something that an MLP has not.

They are small, plain PyTorch, as one finds them in training scripts; sizes are
arguments, and on the meta device any size costs nothing.
"""

import importlib
import types

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """A decoder block: (batch, length, width) → the same."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Causal self-attention by PyTorch's fused function."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        heads = self.inputs(x).view(batch, length, 3, self.heads, -1)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.output(x.transpose(1, 2).reshape(batch, length, width))


class GPT(nn.Module):
    """A GPT-style decoder: token ids (batch, length) → scores (…, vocabulary).

    ``GPT(blocks=32, width=4096, heads=32, vocabulary=32000, context=4096)`` has some
    7 billion parameters.

    Args:
        tied: whether the head's weight is the embedding's.
    """

    def __init__(
        self,
        blocks: int = 4,
        width: int = 128,
        heads: int = 4,
        vocabulary: int = 1000,
        context: int = 128,
        dropout: float = 0.0,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        x = self.tokens(ids) + self.places(places)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    """A residual block with BatchNorm and in-place ReLU, halving the picture or not."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Identity()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False),
                nn.BatchNorm2d(channels),
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        y += self.shortcut(x)
        return self.relu(y)


class ResNet(nn.Module):
    """A ResNet-style network: pictures (batch, 3, height, width) → (batch, classes).

    Args:
        blocks: residual blocks of each stage; a stage has twice the channels of the
            one before, and half its height and width.
    """

    def __init__(
        self, blocks: tuple[int, ...] = (2, 2, 2), channels: int = 16, classes: int = 10
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )
        layers, before = [], channels
        for stage, count in enumerate(blocks):
            for place in range(count):
                stride = 2 if stage > 0 and place == 0 else 1
                layers.append(Residual(before, channels << stage, stride))
                before = channels << stage
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(before, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.stem(x))
        return self.head(x.mean((2, 3)))


def double_conv(channels_in: int, channels: int) -> nn.Sequential:
    """Two convolutions, each with GroupNorm and SiLU."""
    layers = []
    for channels_before in (channels_in, channels):
        layers.append(nn.Conv2d(channels_before, channels, 3, padding=1))
        layers += [nn.GroupNorm(4, channels), nn.SiLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """A U-Net-style network: pictures in, pictures of the same size out.

    Each level down has half the height and width; its output is kept for the level up.
    """

    def __init__(self, levels: int = 3, channels: int = 16) -> None:
        super().__init__()
        widths = [channels << level for level in range(levels)]
        pairs = list(zip(widths, widths[1:], strict=False))
        self.stem = double_conv(3, channels)
        self.down = nn.ModuleList(double_conv(low, high) for low, high in pairs)
        self.grow = nn.ModuleList(
            nn.ConvTranspose2d(high, low, 2, 2) for low, high in reversed(pairs)
        )
        self.up = nn.ModuleList(double_conv(2 * low, low) for low, _ in reversed(pairs))
        self.head = nn.Conv2d(channels, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        skips = []
        for down in self.down:
            skips.append(x)
            x = down(F.max_pool2d(x, 2))
        for grow, up in zip(self.grow, self.up, strict=True):
            x = up(torch.cat([skips.pop(), grow(x)], 1))
        return self.head(x)


class Encoder(nn.Module):
    """An encoder called by keywords that returns a tuple: (scores, last states).

    Every layer takes the mask besides the states and returns a tuple, too.
    """

    def __init__(
        self, layers: int = 3, width: int = 64, heads: int = 4, vocabulary: int = 500
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))
        self.head = nn.Linear(width, 2)

    def forward(
        self, *, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        states = self.tokens(input_ids)
        mask = attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            states, _ = layer(states, mask=mask)
        return self.head(states[:, 0]), states


class EncoderLayer(nn.Module):
    """Attention and an MLP; returns the new states, and what attention added."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.inputs = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(
        self, states: torch.Tensor, *, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = self.inputs(self.norm(states)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        added = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        added = added.transpose(1, 2).flatten(2)
        states = states + added
        return states + self.mlp(states), added


SMALL = {"num_hidden_layers": 4, "hidden_size": 128, "intermediate_size": 512}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 1000}
SMALL |= {"use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def transformers_model(
    name: str = "GPT2", **sizes: object
) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Make a small language model of the ``transformers`` package, and a batch for it.

    Its weights are random; nothing is downloaded. The package is no dependency.

    Args:
        name: of its configuration: "GPT2", "Llama", "Qwen2", …
        sizes: of the configuration, beside those of ``SMALL``.

    Returns:
        The model, and keyword arguments. Labels make it return its loss; the mask is
        a whole one, (batch, 1, length, length), since it looks at values to make one.

    Raises:
        ImportError: if the package is not installed; says what to install.
    """
    transformers = _package("transformers")
    config = getattr(transformers, f"{name}Config")()
    for key, value in (SMALL | sizes).items():
        if hasattr(config, key):
            setattr(config, key, value)
    model = transformers.AutoModelForCausalLM.from_config(config)
    ids = torch.randint(config.vocab_size, (4, 64))
    mask = torch.ones(4, 1, 64, 64, dtype=torch.bool).tril()
    return model.train(), {"input_ids": ids, "labels": ids, "attention_mask": mask}


def timm_model(
    name: str = "resnet18", **options: object
) -> tuple[nn.Module, torch.Tensor]:
    """Make a vision model of the ``timm`` package by its name, and pictures for it.

    Weights, package and errors: as in ``transformers_model``.
    """
    model = _package("timm").create_model(name, pretrained=False, **options)
    channels, height, width = model.default_cfg["input_size"]
    return model.train(), torch.randn(2, channels, height, width)


def _package(name: str) -> types.ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ImportError(
            f"this model comes from the {name} package: pip install {name}"
        ) from None
