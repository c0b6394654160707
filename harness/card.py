"""What a card, its driver and the machine around it must have: one line at the start, instead of a fault after hours."""

import os
import re
import resource
import sys
import warnings
from pathlib import Path

import torch

from gpu import free_bytes, page_lock
from harness.config import Config
from harness.plan import CONTEXT_BYTES, GIB, Plan

OLDEST_DRIVER = {
    12: 525,
    13: 580,
}  # for each major version of CUDA (NVIDIA, CUDA Compatibility, table 1)
DRIVER = Path("/proc/driver/nvidia/version")
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")
FULL = ("out of memory", "STATUS_ALLOC_FAILED", "can't allocate memory", "not enough memory")


def describe(device: str) -> str:
    """What the program runs on, and what is free."""
    versions, free = (
        f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}",
        free_bytes(torch.device(device)) / GIB,
    )
    if device == "cpu":
        return f"{versions}; threads: {torch.get_num_threads()}, {free:.1f} GiB free"
    return (
        f"{versions}, CUDA {torch.version.cuda}, driver {driver_version() or 'unknown'}; {torch.cuda.get_device_name()}, "
        f"{free:.1f} of {torch.cuda.mem_get_info()[1] / GIB:.1f} GiB free"
    )


def driver_version() -> str:
    """Of NVIDIA's driver, for example 580.65.06; empty if there is none."""
    found = re.search(r"\d{3,}\.[\d.]+", DRIVER.read_text()) if DRIVER.exists() else None
    return found[0] if found else ""


def why_no_card() -> str:
    """Why model.device=cuda is not to be had here, and the way out; empty if it is."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # what PyTorch says of an old driver is said here, with the way out
        if torch.cuda.is_available():
            return ""
    driver, built_for = driver_version(), torch.version.cuda
    if built_for is None:
        return f"model.device=cuda, but no CUDA device is here for PyTorch {torch.__version__}, which is built without CUDA"
    oldest = OLDEST_DRIVER.get(int(built_for.split(".")[0]), 0)
    if not driver or int(driver.split(".")[0]) >= oldest:
        return "model.device=cuda, but no CUDA device is here"
    older = ""
    if int(driver.split(".")[0]) >= OLDEST_DRIVER[12]:
        older = (
            ", or install a build for CUDA 12.6: UV_TORCH_BACKEND=cu126 uv pip install --reinstall-package torch -r "
            "pyproject.toml, and then uv run --no-sync train.py"
        )
    return (
        f"model.device=cuda, but the NVIDIA driver {driver} is too old for PyTorch {torch.__version__}, built for CUDA "
        f"{built_for}, which needs driver {oldest} or newer; update the driver{older}"
    )


def check_card(config: Config, plan: Plan) -> None:
    """Raises ValueError for the first thing that this card or this machine lacks for the plan."""
    name, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    if config.model.dtype == "bfloat16" and capability < (8, 0):
        raise ValueError(
            f"model.dtype=bfloat16, but the {name} has compute capability {'.'.join(map(str, capability))}, and "
            "bfloat16 takes 8.0 (A100, RTX 30); set model.dtype=float32, which doubles memory, or take a newer card"
        )
    free, total = torch.cuda.mem_get_info()
    if plan.needed - CONTEXT_BYTES > free:  # the context stands already
        raise ValueError(
            f"the plan takes {plan.needed / GIB:.1f} GiB of the card (model.memory_gib={config.model.memory_gib}), "
            f"but of the {total / GIB:.1f} GiB of the {name} {free / GIB:.1f} are free; set model.memory_gib=null to "
            "plan with what is free, end what else uses the card, or take a larger one"
        )
    if plan.host:
        _check_host(plan.host)


def _check_host(locked: float) -> None:
    """locked: bytes of CPU memory that each process of this machine will page-lock."""
    wanted, free = (
        locked * int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        free_bytes(torch.device("cpu")),
    )
    if CONTAINER_LIMIT.exists() and (limit := CONTAINER_LIMIT.read_text().strip()).isdecimal():
        free = min(free, int(limit))
    if wanted > free:
        raise ValueError(
            f"optimizer.offload=true keeps {wanted / GIB:.1f} GiB of optimizer state in CPU memory, of which "
            f"{free / GIB:.1f} GiB are free; free some, set optimizer.offload=false, or take a smaller model"
        )
    allowed = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    if allowed == resource.RLIM_INFINITY or allowed >= locked:
        return
    try:  # most drivers do not heed the limit: only who tries to lock more than it allows knows
        page_lock(torch.empty(allowed + 2**20, dtype=torch.uint8))
    except OSError:
        raise ValueError(
            f"optimizer.offload=true page-locks {locked / GIB:.1f} GiB of CPU memory, but `ulimit -l` allows "
            f"{allowed / GIB:.2f} GiB and the driver heeds it; raise it (ulimit -l unlimited), or set "
            "optimizer.offload=false"
        ) from None


def is_out_of_memory(error: BaseException | None) -> bool:
    """PyTorch's own error, or the plain one that recording a graph, cuBLAS or a CPU's allocator raises."""
    own, plain = isinstance(error, torch.OutOfMemoryError), isinstance(error, RuntimeError)
    return own or (plain and any(words in str(error) for words in FULL))
