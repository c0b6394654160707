"""Command line, models of published shapes and machine rates that the benchmarks share."""

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import gpu
from bench import synthetic
from harness import console, cpu
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
    parser.add_argument("questions", type=int)
    parser.add_argument("answers", type=int, help="answers to each question")
    parser.add_argument("length", type=int, help="longest answer, in tokens")
    parser.add_argument("--mean", type=int, help="make lengths geometric with this mean")
    parser.add_argument("--prompt", type=int, default=140, help="length of a prompt, in tokens")
    parser.add_argument("--layers", type=int, help="replaces the shape's number of layers")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeat", type=int, default=2, help="number of measurements")
    return parser


def random_model(args: argparse.Namespace) -> Transformer:
    if args.device == "cpu":
        cpu.prepare_process()
    else:
        gpu.prepare_process()
    shape = named_shape(args.shape)
    shape = replace(shape, num_hidden_layers=args.layers or shape.num_hidden_layers)
    return synthetic.random_model(shape, device=args.device, dtype=getattr(torch, args.dtype))


def named_shape(size: str) -> Qwen2Config:
    return TINY if size == "tiny" else find_shape(f"Qwen2.5-{size}")


def body_and_head(config: Qwen2Config) -> tuple[int, int]:
    """The numbers of weights that are multiplied: in the layers, and in the head."""
    head = config.vocab_size * config.hidden_size
    return num_weights(config) - head * (1 if config.tie_word_embeddings else 2), head


def matrix_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of random matrices."""
    size = 8192 if device == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    rate = 2 * size**3 / typical_seconds(lambda: a @ b, device)
    print(
        f"{device}: {rate / 1e9:,.0f} GFLOP/s in {dtype}; torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads"
    )
    return rate


def copy_rate(device: str) -> float:
    """Bytes/s of a large copy; bytes read and bytes written both count."""
    source = torch.randint(0, 100, (2**28 if device == "cuda" else 2**26,), device=device)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / typical_seconds(lambda: target.copy_(source), device)
    print(f"{device}: {rate / 1e9:.1f} GB/s")
    return rate


def typical_seconds(work: Callable[[], object], device: str) -> float:
    """The median of nine runs, after two warm-up runs."""
    seconds = []
    for _ in range(11):
        start = time.perf_counter()
        work()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds[2:])


def peak_gib(device: str) -> float:
    """Peak memory beyond what Python and the imports take."""
    return (console.peak_bytes(device) - IMPORTED_BYTES[device]) / 2**30
