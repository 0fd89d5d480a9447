"""What PyTorch 2.11 needs and 2.13 does not, all in one place.

GPU machines still have it, and a recording is made on them.
"""

import inspect
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch.torch_version import TorchVersion
from torch.utils.checkpoint import checkpoint as theirs

OLDEST = (2, 11)


def checkpoint(function: Callable, *args, **options) -> object:
    """Call torch's ``checkpoint``, and end what it leaves behind if ``function`` fails.

    PyTorch 2.11 has its hooks on saved tensors stay for as long as the error is kept,
    and every later operator would be recomputed by them.
    """
    try:
        return theirs(function, *args, **options)
    except BaseException as error:
        trace = error.__traceback__
        while trace:
            frame, trace = trace.tb_frame, trace.tb_next
            if frame.f_code is inspect.unwrap(theirs).__code__:
                if generator := frame.f_locals.get("gen"):
                    generator.close()
        raise


if TorchVersion(torch.__version__) >= (2, 13):
    all_gather, reduce_scatter = dist.all_gather_single, dist.reduce_scatter_single
else:
    all_gather, reduce_scatter = (
        dist.all_gather_into_tensor,
        dist.reduce_scatter_tensor,
    )
