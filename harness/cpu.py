"""What exists only for a CPU. Without it, and the calls of it, the program runs, slower.

Everything here leans on things that are not PyTorch's public face, each for a measured reason (bench/LOG.md).
"""

import ctypes
import timeit
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qwen2_model import Transformer

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
SMALL = 2**17  # weights; a smaller matrix stays in the cache, where its order does not matter


def prepare_process() -> None:
    """Sum in one order whatever the threads do, so that two runs of one seed are the same run; and keep what is freed.

    Every step frees and asks for the same hundreds of megabytes; handed back to the kernel and asked for page by page they
    took as long as the arithmetic.
    """
    # This is use_deterministic_algorithms(True) without its import of the compiler, 4 s and 150 MB.
    torch.set_deterministic_debug_mode("error")
    torch.utils.deterministic.fill_uninitialized_memory = False
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            libc.mallopt(option, value)


def warn_of_slow_dtype(dtype: torch.dtype) -> str:
    """What to say where this CPU has no instructions for bf16 and emulates it; else nothing."""
    if dtype != torch.bfloat16 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return ""
    slower = operations_per_second(torch.float32) / operations_per_second(torch.bfloat16)
    return f"this CPU has no instructions for bfloat16 and multiplies {slower:.0f} times slower in it; set model.dtype=float32"


def operations_per_second(dtype: torch.dtype) -> float:
    matrix = torch.ones(256, 256, dtype=dtype)
    return 2 * 256**3 / min(timeit.repeat(lambda: matrix @ matrix, number=1, repeat=3))


@contextmanager
def packed_for_decoding(model: Transformer, rows: int) -> Iterator[None]:
    """Within, the products of `rows` rows have their weights in the order of the CPU's vector instructions.

    A product with few rows otherwise spends up to two thirds of its time rearranging them. Takes the weights' memory once
    more; gone before the weights change.
    """
    if not packs_for_decoding(model.head_weight_VE.device.type, model.head_weight_VE.dtype):
        yield
        return
    products = [
        (m, "forward", m.weight, m.bias) for m in model.model.modules() if isinstance(m, nn.Linear)
    ]
    products.append((model, "logits", model.head_weight_VE, None))
    try:
        for module, name, weight_OE, bias_O in products:
            if weight_OE.numel() > SMALL:
                packed = torch.ops.mkldnn._reorder_linear_weight(weight_OE.detach(), rows)
                setattr(
                    module,
                    name,
                    partial(_product, weight_OE=weight_OE, packed=packed, bias_O=bias_O),
                )
        yield
    finally:
        for module, name, _, _ in products:
            module.__dict__.pop(name, None)  # the method of its class again


def packs_for_decoding(device: str, dtype: torch.dtype) -> bool:
    if device != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def _product(x_PE: Tensor, *, weight_OE: Tensor, packed: Tensor, bias_O: Tensor | None) -> Tensor:
    if torch.is_grad_enabled():
        return F.linear(x_PE, weight_OE, bias_O)
    return torch.ops.mkldnn._linear_pointwise(x_PE, packed, bias_O, "none", [], "")
