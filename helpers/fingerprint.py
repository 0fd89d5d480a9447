"""What a step's numbers depend on, in words: two steps with the same words are alike.

Functions and classes count by their code, models by their structure and shapes. Where
that cannot be told, the words differ: a step run again costs time, and a report of
another step would be wrong.
"""

import contextlib
import functools
import hashlib
import platform
import types
from pathlib import Path

import torch
from torch import nn

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, type)


def digest(value: object) -> str:
    """Shorten words to 32 hexadecimal digits."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:32]


@functools.cache
def helpers_digest() -> str:
    """Shorten the code that measures and predicts, and all that is beside it."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return digest([file.read_bytes() for file in files])


def describe_machine(device: str, measured: bool) -> str:
    """Describe what a step depends on beside itself; its time on more than its bytes.

    Args:
        device: "cpu" or "cuda".
    """
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    words = [device, f"torch {torch.__version__}", f"autocast {autocast}"]
    if measured:
        words += [device_name(device), f"{torch.get_num_threads()} threads"]
        words += [f"{torch.get_float32_matmul_precision()} precision"]
    return ", ".join(words)


def device_name(device: str) -> str:
    """Name the GPU, or the CPU as its maker does."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError, StopIteration):  # there is no such file on macOS
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name"))
        return name.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def describe(value: object, inside: frozenset[int] = frozenset()) -> str:
    """Describe a setting, a batch, a function or a model by what it is and does.

    Args:
        inside: what is being described already, by id.
    """
    if isinstance(value, PLAIN):
        return repr(value)
    if id(value) in inside:
        return "itself"
    words = functools.partial(describe, inside=inside | {id(value)})
    if isinstance(value, torch.Tensor):
        parts = value.dtype, value.device.type, value.requires_grad
        return f"tensor {tuple(value.shape)} {value.stride()} {parts}"
    if isinstance(value, dict):
        return str({words(name): words(item) for name, item in value.items()})
    if isinstance(value, set | frozenset):
        return str(sorted(map(words, value)))
    if isinstance(value, tuple | list):
        return str(list(map(words, value)))
    if isinstance(value, nn.Module):
        return f"model {digest(_model(value, words))}"
    if isinstance(value, functools.partial):
        return f"partial {words([value.func, value.args, value.keywords])}"
    if isinstance(value, types.MethodType):
        return f"{words(value.__func__)} of {words(value.__self__)}"
    if isinstance(value, FUNCTIONS):
        name = f"{value.__module__}.{value.__qualname__}"
        code = [] if _is_torch(value) else _code_of(value, words)
        return f"{name} {digest(code)}" if code else name
    if type(value).__repr__ is object.__repr__:  # it would tell an address
        return f"{words(type(value))} with {getattr(value, '__dict__', {})}"
    return repr(value)


def _is_torch(value: object) -> bool:
    """Say whether torch's or Python's version tells all about it."""
    return str(value.__module__).partition(".")[0] in ("torch", "builtins")


def _model(model: nn.Module, words: types.FunctionType) -> tuple:
    """List a model's tensors, but not their values or place, its modules and classes.

    A module is described by what it prints, and by its own numbers and functions,
    which it may not print.
    """
    tensors = [
        (name, tuple(tensor.shape), tensor.dtype, tensor.requires_grad)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]
    modules = [
        (name, module.extra_repr(), module.training, _settings(module, words))
        for name, module in model.named_modules(remove_duplicate=False)
    ]
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    return tensors, modules, sorted(map(words, kinds))


def _settings(module: nn.Module, words: types.FunctionType) -> list[tuple[str, str]]:
    return [
        (name, words(value))
        for name, value in sorted(vars(module).items())
        if not name.startswith("_") and not isinstance(value, nn.Module | torch.Tensor)
    ]


def _code_of(value: object, words: types.FunctionType) -> list:
    """List a function's code and what it holds, or a class's functions and values."""
    if isinstance(value, types.BuiltinFunctionType):
        return []
    if isinstance(value, type):
        own = {name: _unwrapped(item) for name, item in sorted(vars(value).items())}
        own.pop("__firstlineno__", None)
        kept = {n: v for n, v in own.items() if isinstance(v, (*PLAIN, *FUNCTIONS))}
        return [words(kept), *(words(base) for base in value.__bases__)]
    cells = [_content(cell) for cell in value.__closure__ or ()]
    names = value.__code__.co_names
    numbers = {name: value.__globals__.get(name) for name in names}
    numbers = {n: v for n, v in numbers.items() if isinstance(v, PLAIN)}
    held = [value.__defaults__, value.__kwdefaults__, cells, numbers]
    return [_code(value.__code__), words(held)]


def _unwrapped(item: object) -> object:
    """Take the function out of a method of any kind, or a property."""
    return getattr(item, "fget", None) or getattr(item, "__func__", item)


def _content(cell: types.CellType) -> object:
    with contextlib.suppress(ValueError):  # not filled yet
        return cell.cell_contents


def _code(code: types.CodeType) -> tuple:
    """Take what code does: no names of files and no line numbers."""
    constants = [
        _code(constant)
        if isinstance(constant, types.CodeType)
        else sorted(map(repr, constant))
        if isinstance(constant, frozenset)
        else repr(constant)
        for constant in code.co_consts
    ]
    return code.co_code, code.co_names, constants
