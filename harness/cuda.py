"""Check the CUDA device before anything is loaded, and recognise out-of-memory errors."""

import os
import warnings

import torch

from gpu import free_bytes
from harness.config import Config
from harness.plan import CONTEXT_BYTES, GIB, Plan

OUT_OF_MEMORY = (
    "out of memory",
    "STATUS_ALLOC_FAILED",
    "can't allocate memory",
    "not enough memory",
    "unable to mmap",
)


def why_no_cuda() -> str:
    """Say in one line why PyTorch cannot use a CUDA device, and how to fix it; "" if it can."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch warns of the reason that this line reports
        if torch.cuda.is_available():
            return ""
        try:
            torch.cuda.init()
            reason = "there is no CUDA device"
        except (RuntimeError, AssertionError) as error:  # AssertionError: built without CUDA
            reason = str(error).partition(". ")[0]
    way_out = "set model.device=cpu"
    if "too old" in reason:
        way_out = "update the driver, or install a PyTorch built for an older CUDA version"
    return f"model.device=cuda, but PyTorch {torch.__version__} says: {reason}; {way_out}"


def check_cuda(config: Config, plan: Plan) -> None:
    """Raise ValueError in one line if this device or the CPU's memory cannot run the plan."""
    if reason := why_no_cuda():
        raise ValueError(reason)
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if config.model.dtype == "bfloat16" and capability < (8, 0):
        raise ValueError(
            f"model.dtype=bfloat16 needs compute capability 8.0 (A100, RTX 30) or newer, and the "
            f"{name} has {capability[0]}.{capability[1]}; set model.dtype=float32, which takes "
            "twice the memory"
        )
    free = free_bytes(torch.device("cuda"))
    needed = plan.needed - CONTEXT_BYTES  # the context exists by now
    if needed > free:
        raise ValueError(
            f"the plan takes {needed / GIB:.1f} GiB (model.memory_gib={config.model.memory_gib}), "
            f"but only {free / GIB:.1f} GiB of the {name} is free; set model.memory_gib=null to "
            "plan with what is free, or stop the other programs that use the GPU"
        )
    # Every rank on this machine pins its share of the optimizer state.
    pinned = plan.pinned_bytes * int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    free = free_bytes(torch.device("cpu"))
    if pinned > free:
        raise ValueError(
            f"optimizer.offload=true pins {pinned / GIB:.1f} GiB of CPU memory for the optimizer "
            f"state, but only {free / GIB:.1f} GiB is free; close other programs, set "
            "optimizer.offload=false, or use a smaller model"
        )


def is_out_of_memory(error: BaseException | None) -> bool:
    """True for the errors of Python, PyTorch, graph recording, cuBLAS and the CPU allocator."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY)
