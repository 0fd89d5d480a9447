"""What a function's result depends on besides its arguments, noted to be restored.

These are the states of the random number generators, autocast and the default device.
Two runs of a function with the same arguments do the same only if these are the same.
"""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch.utils._pytree import tree_leaves


class Surroundings:
    """The RNG states, autocast and default device of the moment it was made.

    Args:
        arguments: the function's, nested as they may be. The generators of their
            devices count, beside the CPU's.
        preserve_rng_state: whether any generator counts.
    """

    def __init__(self, arguments: object, preserve_rng_state: bool) -> None:
        leaves = tree_leaves(arguments)
        devices = {leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)}
        kinds = {"cpu", *(device.type for device in devices)}
        if accelerator := torch.accelerator.current_accelerator(check_available=True):
            kinds.add(accelerator.type)
        self._autocast = [
            functools.partial(
                torch.amp.autocast,
                kind,
                enabled=torch.is_autocast_enabled(kind),
                dtype=torch.get_autocast_dtype(kind),
                cache_enabled=torch.is_autocast_cache_enabled(),
            )
            for kind in kinds
            if torch.amp.is_autocast_available(kind)
        ]
        self._default_device = torch.get_default_device()
        self._devices = [d for d in devices if d.type not in ("cpu", "meta")]
        self._rng_states = self._read_rngs() if preserve_rng_state else []

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Make all as it was then, and at the end as it was before."""
        with contextlib.ExitStack() as stack:
            if self._rng_states:
                stack.callback(self._set_rngs, self._read_rngs())
                self._set_rngs(self._rng_states)
            for autocast in self._autocast:
                stack.enter_context(autocast())
            if self._default_device.type != "cpu":
                stack.enter_context(self._default_device)
            yield

    def _read_rngs(self) -> list[torch.Tensor]:
        others = [torch.get_device_module(d).get_rng_state(d) for d in self._devices]
        return [torch.get_rng_state(), *others]

    def _set_rngs(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for device, state in zip(self._devices, states[1:], strict=True):
            torch.get_device_module(device).set_rng_state(state, device)
