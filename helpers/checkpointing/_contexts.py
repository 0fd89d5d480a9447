"""What a ``context_fn`` has to be, and whose fault it is where something fails.

``checkpoint`` calls it while the model's forward runs, where its errors look as if a
layer had failed.
"""

from collections.abc import Callable

RIGHT = (
    "context_fn is called without arguments and returns two context managers, as "
    "partial(create_selective_checkpoint_contexts, policy) does"
)


class ContextFault(ValueError):
    """What a ``context_fn`` did instead of returning two context managers."""


def checked(context_fn: Callable, use_reentrant: bool) -> Callable:
    """Wrap a ``context_fn`` so that its own faults are told as such.

    Raises:
        ContextFault: if it cannot be called, or is of no use where ``use_reentrant``;
            from what is returned, if it fails or returns something else.
    """
    if not callable(context_fn):
        raise ContextFault(f"context_fn={context_fn!r} is no function; {RIGHT}")
    if use_reentrant:
        raise ContextFault("a context_fn has no place with use_reentrant=True")

    def make_contexts() -> tuple:
        try:
            made = context_fn()
        except Exception as error:
            kind = type(error).__name__
            raise ContextFault(f"context_fn fails, {kind}: {error}; {RIGHT}") from None
        pair = isinstance(made, tuple | list) and len(made) == 2
        if not pair or not all(hasattr(type(one), "__exit__") for one in made):
            raise ContextFault(f"context_fn returned {made!r}; {RIGHT}")
        return made

    return make_contexts


def policy_failed(error: Exception) -> bool:
    """Say whether a selective policy raised it, or the call of one.

    PyTorch's mode calls two things: the policy, and the operator by torch/_ops.py.
    """
    trace = error.__traceback__
    while trace:
        frame, trace = trace.tb_frame, trace.tb_next
        asks = "_CachingTorchDispatchMode.__torch_dispatch__"
        if frame.f_code.co_qualname == asks:
            called = trace.tb_frame.f_code.co_filename if trace else ""
            return not called.endswith("_ops.py")
    return False
