"""Small models of the kinds that people plan for, with batches: none is a chain."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from helpers.models.architectures import GPT, Block, ResNet, UNet


def conv(channels_in: int, channels: int, size: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels, size, padding=size // 2, **options)


class TwoLevels(nn.Module):
    """A U-Net of two levels: what goes down is concatenated on the way up."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.down1, self.down2 = conv(3, channels), conv(channels, 2 * channels)
        self.norm = nn.GroupNorm(2, 2 * channels)
        self.middle = conv(2 * channels, 2 * channels)
        self.up2, self.up1 = conv(4 * channels, channels), conv(2 * channels, 3)
        self.act = nn.SiLU()

    def forward(self, x):
        one = self.act(self.down1(x))
        two = F.gelu(self.norm(self.down2(F.max_pool2d(one, 2))))
        x = torch.tanh(self.middle(F.avg_pool2d(two, 2)))
        x = torch.cat([two, F.interpolate(x, scale_factor=2)], 1)
        x = torch.sigmoid(self.up2(x))
        return self.up1(torch.cat([one, F.interpolate(x, scale_factor=2)], 1))


class Dense(nn.Module):
    """A DenseNet: each layer sees the outputs of all before it."""

    def __init__(self, layers: int = 3, growth: int = 8) -> None:
        super().__init__()
        self.stem = conv(3, growth)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d(growth * (i + 1)),
                nn.ReLU(),
                conv(growth * (i + 1), growth),
            )
            for i in range(layers)
        )
        self.head = nn.Linear(growth * (layers + 1), 5)

    def forward(self, x):
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return self.head(torch.cat(found, 1).mean((2, 3)))


class CrossAttention(nn.Module):
    """An encoder and a decoder that looks at what it returns, twice."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(width, 4, 64, batch_first=True)
        self.decoder = nn.ModuleList(
            nn.TransformerDecoderLayer(width, 4, 64, 0.0, batch_first=True)
            for _ in range(2)
        )

    def forward(self, source, target):
        memory = self.encoder(source)
        for layer in self.decoder:
            target = layer(target, memory)
        return target


class Experts(nn.Module):
    """A mixture of experts whose routing is fixed: by the place in the batch."""

    def __init__(self, width: int = 32, experts: int = 3) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts)
        self.experts = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
            )
            for _ in range(experts)
        )
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        weights, parts = self.gate(x).softmax(-1), x.chunk(len(self.experts))
        found = [expert(part) for expert, part in zip(self.experts, parts, strict=True)]
        return self.head(x + torch.cat(found) * weights.sum(-1, keepdim=True))


class Siamese(nn.Module):
    """One encoder for two inputs: whatever is ticked in it is ticked twice."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.Tanh()
        )
        self.head = nn.Linear(64, 8)

    def forward(self, x):
        return self.head(self.encoder(x) * torch.tanh(self.encoder(x.flip(0))))


class Loop(nn.Module):
    """A cell that is called at every step, and feeds itself."""

    def __init__(self, width: int = 32, steps: int = 4) -> None:
        super().__init__()
        self.steps, self.mix, self.act = (
            steps,
            nn.Linear(2 * width, 2 * width),
            nn.GLU(),
        )
        self.head = nn.Sequential(nn.Linear(width, 128), nn.GELU(), nn.Linear(128, 4))

    def forward(self, x):
        state = torch.zeros_like(x)
        for _ in range(self.steps):
            state = torch.tanh(self.act(self.mix(torch.cat([x, state], -1))))
        return self.head(state)


class Squeezed(nn.Module):
    """Residual blocks with squeeze and excitation, and views that are written on."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.stem = conv(3, channels)
        self.norm, self.act = nn.InstanceNorm2d(channels), nn.ReLU(inplace=True)
        self.body = nn.Sequential(conv(channels, channels), nn.Hardswish(inplace=True))
        self.gate = nn.Sequential(
            nn.Linear(channels, 4), nn.ReLU(), nn.Linear(4, channels)
        )
        self.head = conv(channels, 2, 1)

    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        y = self.body(x)
        gate = torch.sigmoid(self.gate(y.mean((2, 3))))
        return self.head(x + y * gate[:, :, None, None])


class Pair(nn.Module):
    """A layer that takes and returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, pair):
        return torch.tanh(self.a(pair[0])) + pair[1], torch.tanh(self.b(pair[1]))


class Split(nn.Module):
    def forward(self, x):
        return x, x * 2


class Join(nn.Module):
    def forward(self, pair):
        return pair[0] * pair[1]


def tuples() -> nn.Sequential:
    """A Sequential whose layers hand on tuples."""
    return nn.Sequential(Split(), Pair(), Pair(), Join(), nn.Linear(16, 2))


class Mixer(nn.Module):
    """A pyramid of mixing layers that ends in several outputs."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(
            {
                name: nn.Sequential(
                    nn.LayerNorm(width), nn.Linear(width, width), nn.ELU()
                )
                for name in ("low", "high")
            }
        )
        self.heads = nn.ModuleList(nn.Linear(width, 3) for _ in range(2))

    def forward(self, x):
        low = x + self.stages["low"](x)
        high = low + self.stages["high"](low.transpose(0, 1)).transpose(0, 1)
        return {"low": self.heads[0](low), "high": self.heads[1](high)}


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def ids(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 50


# At most 14 modules are called in these, so that every plan can be tried.
SMALL = {
    "two levels": (TwoLevels, images(2, 3, 16, 16)),
    "dense": (lambda: Dense(2), images(4, 3, 8, 8)),
    "experts": (lambda: Experts(32, 2), images(24, 32)),
    "siamese": (Siamese, images(16, 32)),
    "loop": (Loop, images(16, 32)),
    "squeezed": (Squeezed, images(2, 3, 16, 16)),
    "mixer": (Mixer, images(16, 16, 16)),
    "block": (lambda: Block(32, 4, 0.1), images(2, 16, 32)),
    "tuples": (tuples, images(64, 16)),
}
LARGE = {
    "U-Net": (lambda: UNet(3, 8), images(2, 3, 32, 32)),
    "ResNet": (lambda: ResNet((2, 2), 8), images(2, 3, 16, 16)),
    "DenseNet": (lambda: Dense(6), images(2, 3, 16, 16)),
    "decoder": (lambda: GPT(3, 32, 4, 50, 32, 0.1), ids(2, 32)),
    "encoder and decoder": (
        lambda: CrossAttention(),
        {"source": images(2, 24, 32), "target": images(2, 16, 32)},
    ),
    "experts": (lambda: Experts(32, 6), images(48, 32)),
}


MORE = {
    "U-Net, 4 levels": (lambda: UNet(4, 8), images(2, 3, 32, 32)),
    "ResNet, 8 blocks": (lambda: ResNet((3, 3, 2), 8), images(2, 3, 16, 16)),
    "DenseNet, 10 layers": (lambda: Dense(10, 4), images(2, 3, 16, 16)),
    "decoder, 6 blocks": (lambda: GPT(6, 32, 4, 50, 32), ids(2, 32)),
}

_TEXT = """Bert Roberta DistilBert Electra Albert Llama Qwen2 OPT GPTNeoX Bloom Gemma
  FNet Bart""".split()
_PICTURES = "ViT DeiT Beit ResNet Swin Segformer RegNet PoolFormer Dinov2".split()
_SIZES = {
    **{"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64},
    **{"max_position_embeddings": 64, "embedding_size": 16, "head_dim": 8, "dim": 32},
    **{"hidden_dim": 64, "n_heads": 4, "n_layers": 2, "n_layer": 2, "n_head": 4},
    **{"ffn_dim": 64, "word_embed_proj_dim": 32, "d_model": 32, "encoder_layers": 2},
    **{"decoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64},
    **{"decoder_attention_heads": 4, "decoder_ffn_dim": 64, "pad_token_id": 0},
    **{"bos_token_id": 1, "eos_token_id": 2, "image_size": 32, "patch_size": 8},
    **{"use_cache": False, "groups_width": 4, "decoder_hidden_size": 16},
}
_STAGES = {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}
_SWIN = {"embed_dim": 12, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}


def from_transformers() -> dict:
    """List small models of the transformers package, with their losses inside."""
    found = {name: (_small(name), _text(name)) for name in _TEXT}
    labels = torch.tensor([0, 1])
    batch = {"pixel_values": images(2, 3, 32, 32), "labels": labels}
    found |= {f"{name} (pictures)": (_small(name, True), batch) for name in _PICTURES}
    return found


def from_timm() -> dict:
    """List models of the timm package; none where it, or torchvision, is not there."""
    try:
        import timm
    except (ImportError, RuntimeError):  # a torchvision for another torch
        return {}
    names = "resnet18 convnext_atto mobilenetv3_small_050 efficientnet_b0 regnety_002"
    makes = {
        f"{name} (timm)": partial(timm.create_model, name) for name in names.split()
    }
    for name in ("vit_tiny_patch16_224", "mixer_s32_224"):
        makes[f"{name[:-4]} (timm)"] = partial(timm.create_model, name, img_size=64)
    return {name: (make, images(2, 3, 64, 64)) for name, make in makes.items()}


def _head(name: str, pictures: bool = False) -> str:
    if pictures:
        return "ForImageClassification"
    if name == "Bart":
        return "ForConditionalGeneration"
    encoders = "Bert Roberta DistilBert Electra Albert FNet".split()
    return "ForSequenceClassification" if name in encoders else "ForCausalLM"


def _text(name: str) -> dict:
    labels = torch.tensor([0, 1]) if "Sequence" in _head(name) else ids(2, 16)
    return {"input_ids": ids(2, 16) + 3, "labels": labels}


def _small(name: str, pictures: bool = False):
    def make() -> nn.Module:
        import transformers

        config = getattr(transformers, f"{name}Config")()
        sizes = _SIZES | ({"patch_size": 2} | _SWIN if name == "Swin" else {})
        if isinstance(getattr(config, "hidden_sizes", None), list):
            sizes |= _STAGES | {"embedding_size": 8}
            del sizes["patch_size"]
        for key, value in sizes.items():
            has_list = isinstance(getattr(config, key, None), list | tuple)
            if hasattr(config, key) and (isinstance(value, list) or not has_list):
                setattr(config, key, value)
        return getattr(transformers, name + _head(name, pictures))(config).train()

    return make
