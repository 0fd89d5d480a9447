"""What no prediction knows: what a library takes for itself, or what values decide."""

from helpers.dry_run.kernels import imagined_device, met

# Operators that a library runs, in a workspace of its own choice.
_CUDNN = {"convolution": "convolution", "lstm": "LSTM", "gru": "GRU"}
_CUDNN |= {"rnn_tanh": "RNN", "rnn_relu": "RNN"}
_CUDNN |= {"persistent_batch_norm": "batch norm in channels_last"}
_OF_MATRICES = """_linalg_det _linalg_eigh _linalg_slogdet _linalg_solve_ex _linalg_svd
  linalg_cholesky_ex linalg_eig linalg_eigvals linalg_householder_product
  linalg_inv_ex linalg_ldl_factor_ex linalg_lstsq linalg_lu linalg_lu_factor_ex
  linalg_lu_solve linalg_pinv linalg_qr cholesky_inverse cholesky_solve geqrf
  ormqr""".split()
_CUDAS = dict.fromkeys(("_fft_r2c", "_fft_c2c", "_fft_c2r"), "FFT")
_CUDAS |= dict.fromkeys(_OF_MATRICES, "linear algebra")
_PACKED = {"_pack_padded_sequence": "packed sequences"}
# How they go on is decided by values, as by zeros among what is multiplied.
_BY_VALUES = {"prod": "prod", "cumprod": "cumprod", "renorm": "renorm"}
_BY_VALUES |= {"linalg_matrix_exp": "matrix_exp"}
BY_VALUES = frozenset(_BY_VALUES.values())
_LIBRARIES = {
    "cuda": _CUDNN | _CUDAS | _PACKED | _BY_VALUES,
    "cpu": {"mkldnn_rnn_layer": "LSTM"} | _PACKED,
}


def workspaces(operators: set[str]) -> tuple[str, ...]:
    """Name those of some operators, and of the functions met, with such a workspace."""
    names = _LIBRARIES[imagined_device.get()]
    found = (operators | met.get()) & names.keys()
    return tuple(sorted({names[name] for name in found}))


def told(unknown: tuple[str, ...], device: str) -> str:
    """Say what is not known, in a few words."""
    library = "cuDNN" if device == "cuda" else "oneDNN"
    if not {"FFT", "linear algebra"}.isdisjoint(unknown):
        library = "a library"
    taken = ", ".join(name for name in unknown if name not in BY_VALUES)
    decided = ", ".join(name for name in unknown if name in BY_VALUES)
    parts = [f"{library}'s workspace for {taken}"] if taken else []
    parts += [f"what {decided} keeps on the way"] if decided else []
    return "; ".join(parts)
