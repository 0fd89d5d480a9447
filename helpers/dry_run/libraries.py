"""What a library takes for itself, which no prediction knows: only its name."""

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
_LIBRARIES = {
    "cuda": _CUDNN | _CUDAS | _PACKED,
    "cpu": {"mkldnn_rnn_layer": "LSTM"} | _PACKED,
}


def workspaces(operators: set[str]) -> tuple[str, ...]:
    """Name those of some operators, and of the functions met, with such a workspace."""
    names = _LIBRARIES[imagined_device.get()]
    found = (operators | met.get()) & names.keys()
    return tuple(sorted({names[name] for name in found}))
