"""What CUDA's caching allocator counts: blocks, workspaces, and kernels' scratch."""

from helpers import lazily
from helpers.allocator.scratch import H100, Gpu, on_gpu, scratch_on, this_gpu

__all__ = ["H100", "Gpu", "counted", "on_gpu", "scratch_on", "this_gpu"]
__getattr__ = lazily(__name__, {"counted": "replay"})
