"""What a ``context_fn`` has to be, and that a fault of it is told as its own.

``checkpoint`` calls it while the model's forward runs, where its errors look as if a
layer had failed.
"""

from collections.abc import Callable

from helpers.checkpointing.plan import PlanFault

_RIGHT = (
    "context_fn is called without arguments and returns two context managers, as "
    "partial(create_selective_checkpoint_contexts, policy) does"
)


def checked(context_fn: Callable, use_reentrant: bool) -> Callable:
    """Wrap a ``context_fn`` so that its own faults are told as such.

    Raises:
        PlanFault: if it cannot be called, or is of no use where ``use_reentrant``;
            from what is returned, if it fails or returns something else.
    """
    if not callable(context_fn):
        raise PlanFault(f"context_fn={context_fn!r} is no function; {_RIGHT}")
    if use_reentrant:
        raise PlanFault("a context_fn has no place with use_reentrant=True")

    def make_contexts() -> tuple:
        try:
            made = context_fn()
        except Exception as error:
            kind = type(error).__name__
            raise PlanFault(f"context_fn fails, {kind}: {error}; {_RIGHT}") from None
        pair = isinstance(made, tuple | list) and len(made) == 2
        if not pair or not all(hasattr(type(one), "__exit__") for one in made):
            raise PlanFault(f"context_fn returned {made!r}; {_RIGHT}")
        return made

    return make_contexts
