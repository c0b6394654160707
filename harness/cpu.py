"""Tricks that only a CPU needs: without them a run would be slower, and not deterministic.

They use parts of PyTorch that are not public, each for a measured reason (bench/LOG.md).
"""

import ctypes
import os
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2_model import Transformer

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # options of mallopt, from glibc's malloc.h
SMALL = 2**17  # weights; a smaller matrix stays in the CPU's cache and gains nothing from packing


def prepare_process() -> None:
    """Set up the process before the first product: deterministic sums, and two ways to use memory.

    Sums are deterministic so that runs with the same seed are identical.

    Freed memory is kept. Every step frees and allocates the same hundreds of megabytes. Returning
    them to the kernel and faulting them in again page by page takes as long as the arithmetic.

    Compiled products are not kept for long. oneDNN compiles code for each shape of a bf16 product,
    about 0.7 MiB, and keeps it for the last 1,024 shapes, and so does the layer between oneDNN and
    PyTorch. Since almost every micro-batch has another length, that comes to gigabytes. A model
    needs fewer than 64 shapes at once.
    """
    # Like use_deterministic_algorithms(True), but without importing the compiler (4 s, 150 MB).
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, "64")
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # Linux with glibc; other C libraries keep their own policy
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)


def warn_of_slow_dtype(dtype: torch.dtype) -> str:
    """A warning if this CPU lacks bf16 instructions and so multiplies bf16 slowly; else ""."""
    if dtype != torch.bfloat16 or _onednn_multiplies(dtype):
        return ""
    slowdown = operations_per_second(torch.float32) / operations_per_second(torch.bfloat16)
    if slowdown < 2:
        return ""
    return f"this CPU multiplies bfloat16 {slowdown:.0f} times slower; set model.dtype=float32"


def operations_per_second(dtype: torch.dtype) -> float:
    matrix = torch.ones(256, 256, dtype=dtype)
    return 2 * 256**3 / min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=3))


@contextmanager
def packed_for_decoding(model: Transformer, rows: int) -> Iterator[None]:
    """Within this context, weights are also stored in oneDNN's own layout for `rows` rows of input.

    Otherwise a product with few rows spends up to two thirds of its time reordering the weights.
    The packed copy takes as much memory as the weights. The weights must not change inside the
    context.
    """
    if not packs_for_decoding(model.head_weight_VE.device.type, model.head_weight_VE.dtype):
        yield
        return
    linears = [module for module in model.model.modules() if isinstance(module, nn.Linear)]
    products = [(linear, "forward", linear.weight, linear.bias) for linear in linears]
    products.append((model, "logits", model.head_weight_VE, None))
    try:
        for module, name, weight_OE, bias_O in products:
            if weight_OE.numel() > SMALL:
                packed = torch.ops.mkldnn._reorder_linear_weight(weight_OE.detach(), rows)
                product = partial(_product, weight_OE=weight_OE, packed=packed, bias_O=bias_O)
                setattr(module, name, product)
        yield
    finally:
        for module, name, _, _ in products:
            module.__dict__.pop(name, None)  # restores the method of the class


def packs_for_decoding(device: str, dtype: torch.dtype) -> bool:
    return device == "cpu" and _onednn_multiplies(dtype)


def _onednn_multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN is fast in this dtype; some builds of PyTorch for Arm do not have oneDNN."""
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _product(x_PE: Tensor, *, weight_OE: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return F.linear(x_PE, weight_OE, bias_O)
    return torch.ops.mkldnn._linear_pointwise(x_PE, packed, bias_O, "none", [], "")
