"""What CUDA's caching allocator counts besides tensors."""

from helpers.allocator.scratch import H100, Gpu, on_gpu, scratch_on, this_gpu

__all__ = ["H100", "Gpu", "on_gpu", "scratch_on", "this_gpu"]
