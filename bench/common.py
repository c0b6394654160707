"""Random models of the published shapes, random questions, and the two rates that bound everything on a machine."""

import argparse
import random
import sys
import time
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from data_types import Question, Reward
from flat import allocate
from harness import cpu
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
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--repeat", type=int, default=2)
    return parser


def random_model(shape: str, *, device: str, dtype: torch.dtype) -> Transformer:
    if device == "cpu":
        cpu.prepare_process()
    config = TINY if shape == "tiny" else find_shape(f"Qwen2.5-{shape}")
    with torch.device("meta"):
        model = Transformer(config)
    allocate(model, device=device, dtype=dtype)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def random_questions(count: int, prompt_len: int, vocab_size: int) -> list[Question]:
    rng = random.Random(0)
    return [Question("", [rng.randrange(vocab_size) for _ in range(prompt_len)], {}) for _ in range(count)]


class AnyTokenizer:
    """Stands in for the real one: every id below vocab_size may be drawn, stop_ids end an answer."""

    pad_id = 0

    def __init__(self, vocab_size: int, stop_ids: frozenset[int]):
        self.vocab_size, self.stop_ids = vocab_size, stop_ids

    def decode(self, ids: list[int]) -> str:
        return ""


def random_reward():
    rng = random.Random(0)
    return lambda text: Reward(rng.random(), {})


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
