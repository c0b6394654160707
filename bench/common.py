"""The work that benchmarks are told to do, random models of the published shapes, and the two rates that bound everything."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import console, cpu, made_up
from harness.plan import PUBLISHED, find_shape, num_weights
from qwen2_model import Qwen2Config, Transformer

TINY = Qwen2Config(
    vocab_size=640,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=2048,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    tie_word_embeddings=True,
)
SHAPES = ["tiny", *PUBLISHED]
IMPORTED_BYTES = {"cpu": console.peak_bytes("cpu"), "cuda": 0}


def work_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    for name in ("questions", "answers", "length"):
        parser.add_argument(name, type=int)
    parser.add_argument("--mean", type=int, help="mean of geometric lengths, at most `length`")
    parser.add_argument("--prompt", type=int, default=140)
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=2)
    return parser


def random_model(args: argparse.Namespace) -> Transformer:
    if args.device == "cpu":
        cpu.prepare_process()
    shape = named_shape(args.shape)
    shape = replace(shape, num_hidden_layers=args.layers or shape.num_hidden_layers)
    return made_up.random_model(shape, device=args.device, dtype=getattr(torch, args.dtype))


def named_shape(size: str) -> Qwen2Config:
    return TINY if size == "tiny" else find_shape(f"Qwen2.5-{size}")


def body_and_head(config: Qwen2Config) -> tuple[int, int]:
    """Weights that take part in products: of the layers, and of the head."""
    head = config.vocab_size * config.hidden_size
    return num_weights(config) - head * (1 if config.tie_word_embeddings else 2), head


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large product on random data."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    rate = 2 * size**3 / _typical_seconds(lambda: a @ b)
    print(
        f"{device}: {rate / 1e9:,.0f} GFLOP/s {dtype}; torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    return rate


def copy_rate(device: str) -> float:
    """Bytes/s of a large copy, read and written counted."""
    source = torch.randint(0, 100, (2**28 if device == "cuda" else 2**26,), device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / _typical_seconds(lambda: target.copy_(source))
    print(f"{device}: {rate / 1e9:.1f} GB/s")
    return rate


def _typical_seconds(work: Callable[[], object]) -> float:
    """Median of nine runs after two to warm up."""
    watch = console.PhaseWatch("a rate of the machine")
    for i in range(11):
        with watch.part(f"run {i}", 1):
            work()
    return median(list(watch.seconds.values())[2:])


def peak_gib(device: str) -> float:
    """Peak memory beyond what Python and PyTorch themselves take."""
    return (console.peak_bytes(device) - IMPORTED_BYTES[device]) / 2**30
