"""Which rule sizes an operator's scratch, for all that a plain model does without."""

import functools
import importlib
from collections.abc import Callable

import torch

# A module here and its function: operators, with an overload that is not the default.
_RULES = {
    "kernels.of_norm_backward": "native_layer_norm_backward _fused_rms_norm_backward",
    "kernels.of_dense": "max_pool2d_with_indices avg_pool2d",
    "kernels.of_pool_backward": "max_pool2d_with_indices_backward avg_pool2d_backward",
    "kernels.of_dense_gradient": """max_pool3d_with_indices_backward
      fractional_max_pool2d_backward avg_pool3d_backward adaptive_max_pool3d_backward
      _adaptive_avg_pool3d_backward
      reflection_pad1d_backward reflection_pad2d_backward upsample_linear1d_backward
      upsample_nearest1d_backward upsample_nearest2d_backward
      upsample_nearest3d_backward upsample_bilinear2d_backward
      upsample_bicubic2d_backward upsample_trilinear3d_backward
      _upsample_nearest_exact1d_backward _upsample_nearest_exact2d_backward
      _upsample_nearest_exact3d_backward _upsample_bilinear2d_aa_backward
      _upsample_bicubic2d_aa_backward""",
    "kernels.of_average_backward": "_adaptive_avg_pool2d_backward",
    "kernels.of_flash": "_scaled_dot_product_flash_attention",
    "kernels.of_flash_backward": "_scaled_dot_product_flash_attention_backward",
    "kernels.of_efficient_backward": "_scaled_dot_product_efficient_attention_backward",
    "kernels.of_softmax_backward": "_softmax_backward_data",
    "kernels.of_safe_softmax": "_safe_softmax",
    "ids.of_embedding_backward": "embedding_dense_backward",
    "ids.of_bag_backward": "_embedding_bag_backward",
    "ids.of_index_put": "index_put _index_put_impl_ index_put_ _unsafe_index_put",
    "kernels.of_group_norm": "native_group_norm",
    "kernels.of_group_norm_backward": "native_group_norm_backward",
    "kernels.of_batch_norm": "native_batch_norm",
    "kernels.of_batch_norm_backward": "native_batch_norm_backward",
    "convolutions.of_convolution": "convolution",
    "convolutions.of_convolution_backward": "convolution_backward",
    "temporaries.of_loss": "mse_loss smooth_l1_loss huber_loss",
    "temporaries.of_bce": "binary_cross_entropy soft_margin_loss",
    "temporaries.of_bce_with_logits": "binary_cross_entropy_with_logits",
    "temporaries.of_soft_margin_backward": "soft_margin_loss_backward",
    "temporaries.of_margin": "multilabel_margin_loss_forward multi_margin_loss",
    "temporaries.of_distance": "dist",
    "temporaries.of_all_contiguous": "max_unpool2d max_unpool3d _cdist_forward",
    "temporaries.of_largest_backward": "adaptive_max_pool2d_backward",
    "temporaries.of_contiguous": """_softmax _log_softmax _log_softmax_backward_data
      nll_loss_backward roll multilabel_margin_loss_backward multi_margin_loss_backward
      col2im rrelu_with_noise reflection_pad1d reflection_pad2d reflection_pad3d
      avg_pool3d _adaptive_avg_pool3d adaptive_max_pool3d native_layer_norm
      _fused_rms_norm""",
    "reductions.of_reduction": "sum.dim_IntList mean.dim nansum",
    "reductions.of_total": "sum mean",
    "temporaries.of_pair": "aminmax",
    "temporaries.of_deviation": """std.correction var.correction std_mean.correction
      var_mean.correction""",
    "temporaries.of_running": "cumsum cumprod",
    "temporaries.of_chance": "bernoulli",
    "temporaries.of_place": "argmax argmin max.dim min.dim",
    "temporaries.of_extreme": "amax amin max min",
    "temporaries.of_norm": "linalg_vector_norm",
    "temporaries.of_copy": "mode",
    "temporaries.of_rrelu": "rrelu_with_noise_",
    "temporaries.of_resized": "_upsample_bilinear2d_aa _upsample_bicubic2d_aa",
    "temporaries.of_largest": "adaptive_max_pool2d",
    "temporaries.of_patches": "im2col",
    "temporaries.of_logsumexp": "logsumexp",
    "temporaries.of_sort": "sort",
    "temporaries.of_unfold_backward": "unfold_backward",
    "temporaries.of_renorm": "renorm",
    "temporaries.of_power": "pow.Scalar",
    "temporaries.of_affine_grid": "affine_grid_generator",
    "temporaries.of_trilinear": "_trilinear",
    "temporaries.of_cdist_backward": "_cdist_backward",
    "temporaries.of_pdist_backward": "_pdist_backward",
}


def rule_of(func: torch._ops.OpOverload) -> Callable | None:
    """Find an operator's rule, called with its arguments and the GPU; None: nothing."""
    rule = _by_operator().get(str(func).removeprefix("aten.").removesuffix(".default"))
    if rule is None:
        return None
    home, _, name = rule.partition(".")
    return getattr(importlib.import_module(f"helpers.allocator.{home}"), name)


@functools.cache
def _by_operator() -> dict[str, str]:
    return {name: rule for rule, names in _RULES.items() for name in names.split()}
