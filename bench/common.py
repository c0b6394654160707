"""Random models of the published shapes, random questions, and the two rates that bound everything on a machine."""

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import cpu, made_up
from harness.plan import PUBLISHED, find_shape
from qwen2_model import Qwen2Config, Transformer

TINY = Qwen2Config(
    vocab_size=640, hidden_size=128, intermediate_size=384, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=1e4, tie_word_embeddings=True,
)  # fmt: skip
SHAPES = ["tiny", *PUBLISHED]
IMPORTED_BYTES = 1024 * getrusage(RUSAGE_SELF).ru_maxrss


def work_parser() -> argparse.ArgumentParser:
    """The work that both benchmarks are told to do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("questions", type=int)
    parser.add_argument("answers", type=int)
    parser.add_argument("length", type=int)
    parser.add_argument("--mean", type=int, help="mean of geometric lengths, at most `length`")
    parser.add_argument("--prompt", type=int, default=140)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=2)
    return parser


def random_model(shape: str, *, layers: int | None, device: str, dtype: torch.dtype) -> Transformer:
    if device == "cpu":
        cpu.prepare_process()
    config = TINY if shape == "tiny" else find_shape(f"Qwen2.5-{shape}")
    return made_up.random_model(replace(config, num_hidden_layers=layers or config.num_hidden_layers), device=device, dtype=dtype)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large product on random data."""
    size = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _typical_seconds(lambda: a @ b, device)


def copy_rate(device: str) -> float:
    """Bytes/s of a large copy, read and written counted."""
    source = torch.randint(0, 100, (2**28 if device == "cuda" else 2**26,), device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _typical_seconds(lambda: target.copy_(source), device)


def _typical_seconds(work, device: str) -> float:
    """Median of nine runs after two to warm up."""
    times = []
    for _ in range(11):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[2:])


def peak_bytes(device: str) -> int:
    """Peak memory beyond what Python and PyTorch themselves take."""
    return torch.cuda.max_memory_allocated() if device == "cuda" else 1024 * getrusage(RUSAGE_SELF).ru_maxrss - IMPORTED_BYTES
