"""GPUs by their names, for predictions of what another machine's would count."""

from helpers.allocator.scratch import Gpu

# Multiprocessors, threads that each can hold, and compute capability: NVIDIA's
# architecture whitepapers, and "Technical Specifications per Compute Capability" in the
# CUDA C++ Programming Guide.
CARDS = {
    "T4": Gpu(40, 1024, (7, 5)),
    "V100": Gpu(80, 2048, (7, 0)),
    "A10": Gpu(72, 1536, (8, 6)),
    "A100": Gpu(108, 2048, (8, 0)),
    "L4": Gpu(58, 1536, (8, 9)),
    "L40S": Gpu(142, 1536, (8, 9)),
    "H100": Gpu(132, 2048, (9, 0)),
    "H200": Gpu(132, 2048, (9, 0)),
    "B200": Gpu(148, 2048, (10, 0)),
    "RTX 2080 Ti": Gpu(68, 1024, (7, 5)),
    "RTX 3060": Gpu(28, 1536, (8, 6)),
    "RTX 3090": Gpu(82, 1536, (8, 6)),
    "RTX 4090": Gpu(128, 1536, (8, 9)),
    "RTX 5090": Gpu(170, 1536, (12, 0)),
}


def named(name: str) -> Gpu:
    """Find a GPU by its name, in any case, with or without spaces.

    Raises:
        ValueError: lists the names.
    """
    for known, gpu in CARDS.items():
        if known.replace(" ", "").lower() == str(name).replace(" ", "").lower():
            return gpu
    raise ValueError(f"gpu is one of {', '.join(CARDS)}, or None, not {name!r}")
