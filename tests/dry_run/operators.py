"""Over two hundred operators, losses, layers and optimizers, each in a small model.

Each is a function of a batch that makes a module; the batch says of which kind it is.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import nn, optim
from torch.nn import functional as F

ODD, EVEN, LARGE = 0, 1, 2
SIZES = {  # an odd, an even and a large one of each kind
    "rows": [(7, 13), (8, 16), (4096, 256)],
    "square": [(3, 5, 5), (2, 8, 8), (16, 128, 128)],
    "words": [(3, 11, 5), (4, 16, 8), (16, 256, 128)],  # batch, length, width
    "signal": [(3, 5, 11), (4, 8, 16), (16, 64, 512)],  # batch, channels, length
    "image": [(3, 5, 7, 9), (2, 8, 8, 8), (8, 64, 32, 32)],
    "volume": [(2, 3, 5, 7, 5), (2, 4, 6, 6, 8), (4, 16, 8, 16, 16)],
    "ids": [(3, 11), (4, 16), (16, 512)],
}


class Run(nn.Module):
    """Calls a function, or modules that give several results of which one counts."""

    def __init__(self, function: Callable, *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.own = function, nn.ModuleList(modules)

    def forward(self, x):
        return self.function(*self.own, x)


def first(*values):
    """Take the first result; every floating one takes part in the loss."""
    *own, x = values
    made = own[0](x)
    floats = [y for y in made if isinstance(y, torch.Tensor) and y.is_floating_point()]
    return sum(y.sum() for y in floats)


def batch_of(kind: str, parity: int) -> torch.Tensor:
    sizes = SIZES[kind][parity]
    return torch.randint(9, sizes) if kind == "ids" else torch.randn(sizes)


def before(kind: str, channels: int) -> nn.Module:
    """Make a layer with weights, so that there is a gradient to come back to."""
    convolutions = {"signal": nn.Conv1d, "image": nn.Conv2d, "volume": nn.Conv3d}
    if kind in convolutions:
        return convolutions[kind](channels, channels, 1)
    return nn.Identity() if kind == "ids" else nn.Linear(channels, channels)


# Layers, by the kind of their input: a function of its number of channels -----------

ACTIVATIONS = """ReLU ReLU6 LeakyReLU PReLU RReLU ELU SELU CELU GELU SiLU Mish Hardtanh
  Hardswish Hardsigmoid Hardshrink Softshrink Tanhshrink Softplus Softsign Tanh Sigmoid
  LogSigmoid Dropout AlphaDropout FeatureAlphaDropout Identity Flatten""".split()
IN_PLACE = (
    "ReLU ReLU6 LeakyReLU RReLU ELU SELU CELU SiLU Mish Hardtanh Hardswish".split()
)
IN_PLACE += ["Dropout"]

LAYERS: dict[str, tuple[str, Callable]] = {}


def layer(kind: str, **more: Callable) -> None:
    LAYERS.update({name: (kind, make) for name, make in more.items()})


for name in ACTIVATIONS:
    layer("image", **{name: lambda c, name=name: getattr(nn, name)()})
for name in IN_PLACE:
    make = partial(getattr(nn, name), inplace=True)
    layer("image", **{f"{name} in place": lambda c, make=make: make()})
layer(
    "rows",
    Linear=lambda c: nn.Linear(c, 7),
    GELU_tanh=lambda c: nn.GELU("tanh"),
    Threshold=lambda c: nn.Threshold(0.1, 0.2),
    Softmax=lambda c: nn.Softmax(-1),
    Softmin=lambda c: nn.Softmin(-1),
    LogSoftmax=lambda c: nn.LogSoftmax(-1),
    BatchNorm1d=lambda c: nn.BatchNorm1d(c),
    BatchNorm1d_eval=lambda c: nn.BatchNorm1d(c).eval(),
    LayerNorm=lambda c: nn.LayerNorm(c),
    RMSNorm=lambda c: nn.RMSNorm(c),
    Unflatten=lambda c: nn.Unflatten(1, (1, c)),
    LSTMCell=lambda c: Run(first, nn.LSTMCell(c, 6)),
    GRUCell=lambda c: nn.GRUCell(c, 6),
    RNNCell=lambda c: nn.RNNCell(c, 6),
    Bilinear=lambda c: Run(lambda own, x: own(x, x), nn.Bilinear(c, c, 5)),
)
layer(
    "words",
    LSTM=lambda c: Run(first, nn.LSTM(c, 6, 2, batch_first=True, dropout=0.1)),
    LSTM_projected=lambda c: Run(first, nn.LSTM(c, 6, proj_size=3)),
    LSTM_both=lambda c: Run(first, nn.LSTM(c, 6, bidirectional=True, bias=False)),
    GRU=lambda c: Run(first, nn.GRU(c, 6, 2, bidirectional=True)),
    RNN=lambda c: Run(first, nn.RNN(c, 6, 2, batch_first=True, dropout=0.1)),
    RNN_relu=lambda c: Run(first, nn.RNN(c, 6, nonlinearity="relu", bias=False)),
    MultiheadAttention=lambda c: Run(
        lambda own, x: own(x, x, x, need_weights=False)[0], nn.MultiheadAttention(c, 1)
    ),
    Attention_weights=lambda c: Run(
        lambda own, x: own(x, x, x)[0], nn.MultiheadAttention(c, 1)
    ),
    EncoderLayer=lambda c: nn.TransformerEncoderLayer(c, 1, 12, 0.1),
    EncoderLayer_first=lambda c: nn.TransformerEncoderLayer(
        c, 1, 12, 0.0, "gelu", batch_first=True, norm_first=True
    ),
    DecoderLayer=lambda c: Run(
        lambda own, x: own(x, x), nn.TransformerDecoderLayer(c, 1, 12)
    ),
    Transformer=lambda c: Run(
        lambda own, x: own(x, x), nn.Transformer(c, 1, 1, 1, 12, 0.0)
    ),
    LayerNorm_words=lambda c: nn.LayerNorm(c),
    transposed_BatchNorm=lambda c: Run(
        lambda own, x: own(x.transpose(1, 2)), nn.BatchNorm1d(c)
    ),
)
layer(
    "signal",
    Conv1d=lambda c: nn.Conv1d(c, 4, 3, stride=2, padding=1),
    Conv1d_same=lambda c: nn.Conv1d(c, 4, 3, padding="same"),
    ConvTranspose1d=lambda c: nn.ConvTranspose1d(c, 4, 3, stride=2),
    MaxPool1d=lambda c: nn.MaxPool1d(2),
    AvgPool1d=lambda c: nn.AvgPool1d(3, 2),
    LPPool1d=lambda c: nn.LPPool1d(2, 3),
    AdaptiveAvgPool1d=lambda c: nn.AdaptiveAvgPool1d(3),
    AdaptiveMaxPool1d=lambda c: nn.AdaptiveMaxPool1d(3),
    InstanceNorm1d=lambda c: nn.InstanceNorm1d(c, affine=True),
    BatchNorm1d_signal=lambda c: nn.BatchNorm1d(c),
    ReflectionPad1d=lambda c: nn.ReflectionPad1d(2),
    ReplicationPad1d=lambda c: nn.ReplicationPad1d(2),
    ConstantPad1d=lambda c: nn.ConstantPad1d(2, 1.0),
    ZeroPad1d=lambda c: nn.ZeroPad1d(2),
    CircularPad1d=lambda c: nn.CircularPad1d(2),
    Upsample_linear=lambda c: nn.Upsample(scale_factor=2, mode="linear"),
    Upsample_nearest1d=lambda c: nn.Upsample(scale_factor=2),
    Dropout1d=lambda c: nn.Dropout1d(0.3),
    MaxUnpool1d=lambda c: Run(
        lambda own, undo, x: undo(*own(x), output_size=x.shape),
        nn.MaxPool1d(2, return_indices=True),
        nn.MaxUnpool1d(2),
    ),
)
layer(
    "image",
    Conv2d=lambda c: nn.Conv2d(c, 6, 3, padding=1),
    Conv2d_stride=lambda c: nn.Conv2d(c, 6, 3, stride=2, bias=False),
    Conv2d_dilated=lambda c: nn.Conv2d(c, 6, 3, dilation=2, padding=2),
    Conv2d_depthwise=lambda c: nn.Conv2d(c, c, 3, groups=c),
    Conv2d_reflect=lambda c: nn.Conv2d(c, 6, 3, padding=1, padding_mode="reflect"),
    ConvTranspose2d=lambda c: nn.ConvTranspose2d(c, 6, 3, stride=2, output_padding=1),
    MaxPool2d=lambda c: nn.MaxPool2d(2),
    MaxPool2d_indices=lambda c: Run(first, nn.MaxPool2d(3, 2, 1, return_indices=True)),
    AvgPool2d=lambda c: nn.AvgPool2d(3, 2, padding=1),
    LPPool2d=lambda c: nn.LPPool2d(2, 2),
    FractionalMaxPool2d=lambda c: nn.FractionalMaxPool2d(2, output_size=3),
    AdaptiveAvgPool2d=lambda c: nn.AdaptiveAvgPool2d(3),
    AdaptiveAvgPool2d_1=lambda c: nn.AdaptiveAvgPool2d(1),
    AdaptiveMaxPool2d=lambda c: nn.AdaptiveMaxPool2d((2, 3)),
    BatchNorm2d=lambda c: nn.BatchNorm2d(c),
    BatchNorm2d_eval=lambda c: nn.BatchNorm2d(c).eval(),
    BatchNorm2d_plain=lambda c: nn.BatchNorm2d(c, affine=False),
    BatchNorm2d_untracked=lambda c: nn.BatchNorm2d(c, track_running_stats=False),
    InstanceNorm2d=lambda c: nn.InstanceNorm2d(c),
    InstanceNorm2d_tracked=lambda c: nn.InstanceNorm2d(
        c, affine=True, track_running_stats=True
    ),
    GroupNorm=lambda c: nn.GroupNorm(1, c),
    GroupNorm_plain=lambda c: nn.GroupNorm(c, c, affine=False),
    LocalResponseNorm=lambda c: nn.LocalResponseNorm(3),
    PReLU_channels=lambda c: nn.PReLU(c),
    GLU=lambda c: Run(lambda x: F.glu(torch.cat([x, x], 1), 1)),
    Softmax2d=lambda c: nn.Softmax2d(),
    ReflectionPad2d=lambda c: nn.ReflectionPad2d(2),
    ReplicationPad2d=lambda c: nn.ReplicationPad2d((1, 2, 0, 3)),
    ConstantPad2d=lambda c: nn.ConstantPad2d(2, 0.5),
    ZeroPad2d=lambda c: nn.ZeroPad2d(1),
    CircularPad2d=lambda c: nn.CircularPad2d(1),
    Upsample_nearest=lambda c: nn.Upsample(scale_factor=2),
    Upsample_bilinear=lambda c: nn.Upsample(scale_factor=2, mode="bilinear"),
    Upsample_bicubic=lambda c: nn.Upsample(size=(5, 12), mode="bicubic"),
    Upsample_area=lambda c: Run(lambda x: F.interpolate(x, size=3, mode="area")),
    Upsample_exact=lambda c: Run(
        lambda x: F.interpolate(x, scale_factor=1.5, mode="nearest-exact")
    ),
    Upsample_antialias=lambda c: Run(
        lambda x: F.interpolate(x, size=4, mode="bilinear", antialias=True)
    ),
    PixelShuffle=lambda c: Run(lambda x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2)),
    PixelUnshuffle=lambda c: Run(lambda x: F.pixel_unshuffle(x[..., :6, :6], 2)),
    ChannelShuffle=lambda c: Run(lambda x: F.channel_shuffle(x.repeat(1, 2, 1, 1), 2)),
    Unfold=lambda c: nn.Unfold(3),
    Fold=lambda c: Run(lambda x: F.fold(F.unfold(x, 3), x.shape[2:], 3)),
    Dropout2d=lambda c: nn.Dropout2d(0.3),
    MaxUnpool2d=lambda c: Run(
        lambda own, undo, x: undo(*own(x), output_size=x.shape),
        nn.MaxPool2d(2, return_indices=True),
        nn.MaxUnpool2d(2),
    ),
    grid_sample=lambda c: Run(
        lambda x: F.grid_sample(x, x[:, :2].permute(0, 2, 3, 1), align_corners=False)
    ),
    affine_grid=lambda c: Run(
        lambda x: F.affine_grid(x[:, 0, :2, :3], x.shape, align_corners=False)
    ),
    convolutions=lambda c: nn.Sequential(
        nn.Conv2d(c, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(True),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 4, 1),
        nn.InstanceNorm2d(4),
        nn.SiLU(),
        nn.Flatten(),
    ),  # fmt: skip
)
layer(
    "volume",
    Conv3d=lambda c: nn.Conv3d(c, 4, 3, padding=1),
    ConvTranspose3d=lambda c: nn.ConvTranspose3d(c, 4, 2, stride=2),
    MaxPool3d=lambda c: nn.MaxPool3d(2),
    AvgPool3d=lambda c: nn.AvgPool3d(2),
    FractionalMaxPool3d=lambda c: nn.FractionalMaxPool3d(2, output_size=2),
    AdaptiveAvgPool3d=lambda c: nn.AdaptiveAvgPool3d(2),
    AdaptiveMaxPool3d=lambda c: nn.AdaptiveMaxPool3d(2),
    BatchNorm3d=lambda c: nn.BatchNorm3d(c),
    InstanceNorm3d=lambda c: nn.InstanceNorm3d(c),
    GroupNorm3d=lambda c: nn.GroupNorm(1, c),
    ReflectionPad3d=lambda c: nn.ReflectionPad3d(1),
    ReplicationPad3d=lambda c: nn.ReplicationPad3d(1),
    Upsample_trilinear=lambda c: nn.Upsample(scale_factor=2, mode="trilinear"),
    Dropout3d=lambda c: nn.Dropout3d(0.3),
)
layer(
    "ids",
    Embedding=lambda c: nn.Embedding(9, 6),
    Embedding_padding=lambda c: nn.Embedding(9, 6, padding_idx=0),
    Embedding_scaled=lambda c: nn.Embedding(9, 6, scale_grad_by_freq=True),
    EmbeddingBag=lambda c: nn.EmbeddingBag(9, 6),
    EmbeddingBag_sum=lambda c: nn.EmbeddingBag(9, 6, mode="sum"),
    EmbeddingBag_max=lambda c: nn.EmbeddingBag(9, 6, mode="max"),
    one_hot=lambda c: Run(lambda own, x: own(F.one_hot(x, 9).float()), nn.Linear(9, 4)),
    words_classified=lambda c: nn.Sequential(
        nn.Embedding(9, 6), nn.LayerNorm(6), nn.Linear(6, 9), nn.LogSoftmax(-1)
    ),
)

# Functions of a tensor --------------------------------------------------------------

UNARY = """abs neg exp expm1 exp2 log log1p log2 log10 sqrt rsqrt square sin cos tan
  asin acos atan sinh cosh asinh atanh erf erfc erfinv lgamma digamma
  sigmoid logit reciprocal frac trunc round floor ceil sign sinc nan_to_num
  i0 positive deg2rad cumsum:0 cumprod:1 logcumsumexp:0 cummax:0 cummin:1
  logsumexp:1 softmax:0 amax:1 amin:0 aminmax max:1 min:0 median:1
  nanmedian:0 mode:0 sort topk:3 kthvalue:2 std var std_mean var_mean mean:0
  sum:1 prod:1 norm nansum nanmean flip:0 fliplr flipud roll:2 rot90 tril
  triu t diagonal diff msort clone logdet:sq slogdet:sq det:sq matrix_exp:sq
  trace:2d diag:2d unbind:0 chunk:2 split:3 tensor_split:2 squeeze
  unsqueeze:0 movedim:01 tile:22 narrow:012 cdist:self clamp:01 hardshrink
  pow:3 cosine_similarity:self maximum:self minimum:self fmod:self
  remainder:self atan2:self hypot:self logaddexp:self logaddexp2:self
  xlogy:self mul:self div:self sub:self dist:self matmul:T kron:self
  fmax:self copysign:self lerp:half addcmul:two addcdiv:two""".split()
FUNCTIONS: dict[str, tuple[str, Callable]] = {}
WAYS: dict[str, Callable] = {
    "self": lambda f, x: f(x, x.flip(0)),
    "T": lambda f, x: f(x, x.T),
    "half": lambda f, x: f(x, x.flip(0), 0.5),
    "two": lambda f, x: f(x, x.flip(0), x),
    "sq": lambda f, x: f(x.T @ x),
    "2d": lambda f, x: f(x),
    "1d": lambda f, x: f(x[0]),
    "01": lambda f, x: f(x, 0, 1),
    "22": lambda f, x: f(x, (2, 2)),
    "012": lambda f, x: f(x, 0, 1, 2),
}


def total(value: object) -> torch.Tensor:
    values = [value] if isinstance(value, torch.Tensor) else value
    floats = [y for y in values if y.is_floating_point()] or [values[0].float()]
    return sum(y.sum() for y in floats)


for entry in UNARY:
    name, _, how = entry.partition(":")
    way = WAYS.get(how, (lambda f, x, n=int(how): f(x, n)) if how.isdigit() else None)
    if how.isdigit() and how in WAYS:
        way = WAYS[how]
    op = getattr(torch, name)
    call = partial(way, op) if way else op
    if name in ("flip",):
        call = lambda x: torch.flip(x, [0])  # noqa: E731
    FUNCTIONS[name] = "rows", call
FUNCTIONS |= {
    "vector_norm": ("rows", torch.linalg.vector_norm),
    "matrix_norm": ("rows", torch.linalg.matrix_norm),
    "solve": ("rows", lambda x: torch.linalg.solve(x.T @ x + 1, x.T)),
    "inv": ("rows", lambda x: torch.linalg.inv(x.T @ x + torch.ones_like(x[0]).diag())),
    "cholesky": (
        "rows",
        lambda x: torch.linalg.cholesky(x.T @ x + torch.ones_like(x[0]).diag()),
    ),
    "qr": ("rows", torch.linalg.qr),
    "svdvals": ("rows", torch.linalg.svdvals),
    "svd": ("rows", lambda x: torch.linalg.svd(x, full_matrices=False)[1]),
    "eigvalsh": ("rows", lambda x: torch.linalg.eigvalsh(x.T @ x)),
    "pinv": ("rows", torch.linalg.pinv),
    "rfft": ("rows", lambda x: torch.fft.rfft(x).abs()),
    "fft2": ("image", lambda x: torch.fft.fft2(x).real),
    "irfft": ("rows", lambda x: torch.fft.irfft(torch.fft.rfft(x))),
    "stft": (
        "rows",
        lambda x: torch.stft(
            x, 8, 4, window=torch.ones(8, device=x.device), return_complex=True
        ).abs(),
    ),
    "cat": ("words", lambda x: torch.cat([x, x * 2], 1)),
    "stack": ("words", lambda x: torch.stack([x, x * 2])),
    "bmm": ("square", lambda x: x.bmm(x.transpose(1, 2))),
    "baddbmm": ("square", lambda x: torch.baddbmm(x, x, x)),
    "addmm": ("rows", lambda x: torch.addmm(x @ x.T, x, x.T)),
    "addmv": ("rows", lambda x: torch.addmv(x[:, 0], x, x[0])),
    "addr": ("rows", lambda x: torch.addr(x.T @ x, x[0], x[1])),
    "mv": ("rows", lambda x: x.mv(x[0])),
    "dot": ("rows", lambda x: x[0].dot(x[1])),
    "einsum": ("words", lambda x: torch.einsum("bij,bkj->bik", x, x)),
    "tensordot": ("words", lambda x: torch.tensordot(x, x, ([0, 1], [0, 1]))),
    "where": ("rows", lambda x: torch.where(x > 0, x, -x)),
    "masked_fill": ("rows", lambda x: x.masked_fill(x > 0, 0.0)),
    "masked_fill_": ("rows", lambda x: (x * 1).masked_fill_(x > 0, 0.0)),
    "gather": ("rows", lambda x: x.gather(1, x.argsort(1))),
    "take_along_dim": ("rows", lambda x: x.take_along_dim(x.argsort(1), 1)),
    "index_select": ("rows", lambda x: x.index_select(0, x.argmax(0))),
    "index": ("rows", lambda x: x[x.argmax(0)]),
    "index_add": ("rows", lambda x: x.index_add(0, x.argmax(1) * 0, x)),
    "index_copy": ("rows", lambda x: (x * 1).index_copy(0, x.argsort(0)[:, 0], x)),
    "index_put": ("rows", lambda x: x.index_put((x.argmax(1) * 0,), x[0], True)),
    "index_fill": ("rows", lambda x: x.index_fill(0, x.argmax(0), 0.0)),
    "scatter": ("rows", lambda x: x.scatter(1, x.argsort(1), x)),
    "scatter_add": ("rows", lambda x: x.scatter_add(0, x.argsort(0), x)),
    "scatter_reduce": ("rows", lambda x: x.scatter_reduce(0, x.argsort(0), x, "amax")),
    "embedding": ("rows", lambda x: F.embedding(x.argmax(0), x)),
    "repeat_interleave": ("rows", lambda x: x.repeat_interleave(3, 0)),
    "expand": ("rows", lambda x: x.unsqueeze(1).expand(-1, 4, -1) * 2),
    "permute": ("image", lambda x: x.permute(0, 2, 3, 1).contiguous()),
    "transpose": ("words", lambda x: x.transpose(1, 2).reshape(len(x), -1)),
    "unfold": ("rows", lambda x: x.unfold(1, 3, 2)),
    "as_strided": ("rows", lambda x: x.as_strided((3, 4), (4, 1))),
    "select_scatter": ("rows", lambda x: x.select_scatter(x[0] * 2, 0, 1)),
    "slice_scatter": ("rows", lambda x: x.slice_scatter(x[:2] * 2, 0, 0, 2)),
    "assigned": ("rows", lambda x: set_row(x * 1)),
    "pad": ("image", lambda x: F.pad(x, (1, 2, 3, 4))),
    "normalize": ("rows", F.normalize),
    "pairwise_distance": ("rows", lambda x: F.pairwise_distance(x, x.flip(0))),
    "pdist": ("rows", F.pdist),
    "renorm": ("rows", lambda x: x.renorm(2, 0, 1.0)),
    "cross": ("rows", lambda x: torch.linalg.cross(x[:, :3], x[:, 3:6])),
    "gumbel_softmax": ("rows", F.gumbel_softmax),
    "gumbel_softmax_hard": ("rows", lambda x: F.gumbel_softmax(x, hard=True)),
    "bernoulli": ("rows", lambda x: x * torch.bernoulli(x.sigmoid())),
    "rand_like": ("rows", lambda x: x * torch.rand_like(x) + torch.randn_like(x)),
    "attention": ("square", lambda x: F.scaled_dot_product_attention(*3 * [x[None]])),
    "attention_causal": (
        "square",
        lambda x: F.scaled_dot_product_attention(*3 * [x[None]], is_causal=True),
    ),
    "attention_3d": ("square", lambda x: F.scaled_dot_product_attention(x, x, x)),
    "attention_dropped": (
        "square",
        lambda x: F.scaled_dot_product_attention(*3 * [x[None]], dropout_p=0.1),
    ),
    "to_double": ("rows", lambda x: x.double() * 2),
    "to_half": ("rows", lambda x: x.bfloat16() * 2),
    "complex": ("rows", lambda x: torch.complex(x, x).abs()),
    "broadcast": ("rows", lambda x: x[:, None] * x[None]),
    "in_place_chain": ("rows", lambda x: (x * 2).add_(1).mul_(3).relu_()),
    "bucketize": ("rows", lambda x: x * torch.bucketize(x, x[0])),
    "cumulative_trapezoid": ("rows", torch.cumulative_trapezoid),
    "multi_head": ("words", lambda x: x.unflatten(-1, (1, -1)).transpose(1, 2) @ x.mT),
    "rms_norm": ("words", lambda x: F.rms_norm(x, x.shape[-1:])),
    "group_norm": ("signal", lambda x: F.group_norm(x, 1)),
    "instance_norm": ("image", F.instance_norm),
    "celu": ("rows", F.celu),
    "local_response_norm": ("image", lambda x: F.local_response_norm(x, 3)),
}


def set_row(x: torch.Tensor) -> torch.Tensor:
    x[0] = x[1] * 2
    return x


# Losses, with the kind of their target ----------------------------------------------

LOSSES: dict[str, tuple[Callable, str]] = {
    "mse": (F.mse_loss, "like"),
    "l1": (F.l1_loss, "like"),
    "smooth_l1": (F.smooth_l1_loss, "like"),
    "huber": (F.huber_loss, "like"),
    "bce": (
        lambda x, y, **how: F.binary_cross_entropy(x.float().sigmoid(), y, **how),
        "01",
    ),
    "bce_logits": (F.binary_cross_entropy_with_logits, "01"),
    "kl": (lambda x, y, **how: F.kl_div(x.log_softmax(1), y, **how), "01"),
    "poisson_nll": (F.poisson_nll_loss, "01"),
    "soft_margin": (F.soft_margin_loss, "signs"),
    "hinge_embedding": (F.hinge_embedding_loss, "signs"),
    "multilabel_soft_margin": (F.multilabel_soft_margin_loss, "01"),
    "multilabel_margin": (F.multilabel_margin_loss, "places"),
    "multi_margin": (F.multi_margin_loss, "class"),
    "cross_entropy": (F.cross_entropy, "class"),
    "cross_entropy_smooth": (partial(F.cross_entropy, label_smoothing=0.1), "class"),
    "cross_entropy_soft": (F.cross_entropy, "01"),
    "nll": (lambda x, y, **how: F.nll_loss(x.log_softmax(1), y, **how), "class"),
    "cosine_embedding": (
        lambda x, y, **how: F.cosine_embedding_loss(x, x.flip(0), y[:, 0], **how),
        "signs",
    ),
    "margin_ranking": (
        lambda x, y, **how: F.margin_ranking_loss(x, x.flip(0), y, **how),
        "signs",
    ),
    "triplet": (
        lambda x, y, **how: F.triplet_margin_loss(x, y, x.flip(0), **how),
        "like",
    ),
}


def target_of(kind: str, x: torch.Tensor) -> torch.Tensor:
    makes: dict[str, Callable] = {
        "like": torch.randn_like,
        "01": torch.rand_like,
        "signs": lambda x: torch.randn_like(x).sign(),
        "places": lambda x: torch.zeros_like(x, dtype=torch.long),
        "class": lambda x: torch.zeros(len(x), dtype=torch.long),
    }
    return makes[kind](x)


# Optimizers -------------------------------------------------------------------------

OPTIMIZERS: dict[str, Callable] = {
    "SGD": partial(optim.SGD, lr=0.1),
    "SGD_momentum": partial(optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
    "Adam_amsgrad": partial(optim.Adam, amsgrad=True),
    "AdamW_capturable": partial(optim.AdamW, weight_decay=0.1, maximize=True),
    "RMSprop_centered": partial(optim.RMSprop, centered=True, momentum=0.9),
} | {
    name: getattr(optim, name)
    for name in "Adadelta Adagrad Adam AdamW Adamax NAdam RAdam RMSprop Rprop".split()
}
FUSED = {"SGD": partial(optim.SGD, lr=0.1), "Adam": optim.Adam, "AdamW": optim.AdamW}
FUSED |= {"Adagrad": optim.Adagrad}

# A CPU has no kernel in bf16, or autograd none.
NOT_IN_BF16 = set(
    """Bilinear Upsample_antialias logdet slogdet det inv pinv rfft fft2 irfft pdist
    complex""".split()
)
# Not here, as they look at values: AdaptiveLogSoftmaxWithLoss, GaussianNLLLoss, cov,
# corrcoef, Adafactor, ASGD.
