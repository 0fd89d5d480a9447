"""PyTorch's caching allocator, by its own rules and with no memory behind it.

Asking a GPU for memory is slow, so PyTorch asks for whole segments, cuts blocks off
them, and keeps both: what a tensor gives back waits for the next one. A block can
therefore be larger than what was asked for, and a segment is kept as long as any block
of it is in use. ``max_memory_allocated`` counts blocks, ``max_memory_reserved``
segments.

Source: ``DeviceCachingAllocator`` in c10/cuda/CUDACachingAllocator.cpp, and the sizes
in c10/core/AllocatorConfig.h. This is the default; ``PYTORCH_CUDA_ALLOC_CONF`` can
choose other rules.
"""

import bisect

from helpers.units import round_to_block

MIB = 2**20
SMALLEST = 512  # a block, and so what all sizes are rounded up to
SMALL = MIB  # requests up to this one have segments of their own


class Block:
    """A piece of a segment, in use or free, between its neighbours there."""

    __slots__ = ("size", "address", "pool", "before", "after", "is_free")

    def __init__(self, size: int, address: int, pool: list) -> None:
        self.size, self.address, self.pool = size, address, pool
        self.before: Block | None = None
        self.after: Block | None = None
        self.is_free = False


def segment_bytes(size: int) -> int:
    """Tell how much is taken from the GPU where no free block is large enough."""
    if size <= SMALL:
        return 2 * MIB
    if size < 10 * MIB:
        return 20 * MIB
    return -(-size // (2 * MIB)) * 2 * MIB


class CachingAllocator:
    """Hands out blocks, and counts what is in use and what is taken from the GPU."""

    def __init__(self) -> None:
        self.allocated_bytes = self.most_allocated_bytes = 0  # blocks in use
        self.reserved_bytes = self.most_reserved_bytes = 0  # segments
        self._end = 0  # of the last segment; addresses rise
        # Free blocks of small and of large segments, as (size, address, block).
        self._pools: tuple[list, list] = ([], [])

    def allocate(self, n_bytes: int) -> Block:
        """Hand out the smallest free block that is large enough, cut to size."""
        size = round_to_block(n_bytes)
        pool = self._pools[size > SMALL]
        place = bisect.bisect_left(pool, (size, 0))
        fits = place < len(pool)
        block = pool.pop(place)[2] if fits else self._new_segment(size, pool)
        rest = block.size - size
        # Of a large block as much as 1 MiB is left on, and counts as in use.
        if rest > SMALL if size > SMALL else rest >= SMALLEST:
            self._cut(block, size)
        block.is_free = False
        self.allocated_bytes += block.size
        if self.allocated_bytes > self.most_allocated_bytes:
            self.most_allocated_bytes = self.allocated_bytes
        return block

    def free(self, block: Block) -> None:
        """Take a block back, and join it with the neighbours that are free."""
        self.allocated_bytes -= block.size
        pool, before, after = block.pool, block.before, block.after
        if after is not None and after.is_free:
            pool.pop(bisect.bisect_left(pool, (after.size, after.address)))
            _join(block, after)
        if before is not None and before.is_free:
            pool.pop(bisect.bisect_left(pool, (before.size, before.address)))
            _join(before, block)
            block = before
        block.is_free = True
        bisect.insort(pool, (block.size, block.address, block))

    def empty_cache(self) -> None:
        """Give back the segments of which nothing is in use."""
        for pool in self._pools:
            used = [e for e in pool if e[2].before or e[2].after]
            self.reserved_bytes -= sum(e[0] for e in pool) - sum(e[0] for e in used)
            pool[:] = used

    def _new_segment(self, size: int, pool: list) -> Block:
        block = Block(segment_bytes(size), self._end, pool)
        self._end += block.size
        self.reserved_bytes += block.size
        self.most_reserved_bytes = max(self.most_reserved_bytes, self.reserved_bytes)
        return block

    def _cut(self, block: Block, size: int) -> None:
        """Leave what a block has too much as a free one behind it."""
        rest = Block(block.size - size, block.address + size, block.pool)
        rest.is_free, block.size = True, size
        rest.before, rest.after, block.after = block, block.after, rest
        if rest.after is not None:
            rest.after.before = rest
        bisect.insort(rest.pool, (rest.size, rest.address, rest))


def _join(first: Block, second: Block) -> None:
    """Make two neighbours one."""
    first.size += second.size
    first.after = second.after
    if first.after is not None:
        first.after.before = first
