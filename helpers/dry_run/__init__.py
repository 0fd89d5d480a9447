"""Run a training step on meta tensors: shapes and lifetimes, but no data."""

from helpers.dry_run.kernels import kernels_of
from helpers.dry_run.meta import like_cuda, meta_batch, meta_model
from helpers.dry_run.shapes import RememberedShapes

__all__ = ["RememberedShapes", "kernels_of", "like_cuda", "meta_batch", "meta_model"]
