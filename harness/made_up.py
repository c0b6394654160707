"""Models, questions and rewards made up for measurements: the shapes and the work of a run, without download and data."""

import math
import random
from collections.abc import Callable

import torch

from data_types import Episode, Question, Reward
from flat import allocate
from qwen2_model import Qwen2Config, Transformer


class AnyTokenizer:
    """Stands in for the real one: every id below vocab_size may be drawn, stop_ids end an answer."""

    def __init__(self, vocab_size: int, stop_ids: frozenset[int] = frozenset()):
        self.vocab_size, self.stop_ids = vocab_size, stop_ids

    def decode(self, ids: list[int]) -> str:
        return ""

    def save_pretrained(self, directory) -> None:
        pass


def random_model(shape: Qwen2Config, *, device: str, dtype: torch.dtype) -> Transformer:
    """As a model begins its life: norms of 1, everything else of standard deviation 0.02; always the same numbers."""
    with torch.device("meta"):
        model = Transformer(shape)
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
    return [
        Question("", [rng.randrange(vocab_size) for _ in range(prompt_len)], {})
        for _ in range(count)
    ]


def random_episodes(
    questions: int,
    answers: int,
    prompt_len: int,
    longest: int,
    *,
    mean: int | None,
    vocab_size: int,
) -> list[Episode]:
    """Answers that may end at any token, after `mean` on average, or are cut off at `longest`; mean=None: all are as long."""
    count, rng = questions * answers, random.Random(0)
    lengths = [
        min(longest, 1 + int(-mean * math.log(1 - (i + 0.5) / count))) if mean else longest
        for i in range(count)
    ]
    rng.shuffle(lengths)
    prompts, episodes = random_questions(questions, prompt_len, vocab_size), []
    for i, length in enumerate(lengths):
        prompt, ids = (
            prompts[i // answers].prompt_token_ids,
            rng.choices(range(vocab_size), k=length),
        )
        episodes.append(
            Episode(i // answers, prompt, ids, [0.0] * length, True, "", Reward(rng.random(), {}))
        )
    return episodes


def random_reward() -> Callable[[str], Reward]:
    rng = random.Random(0)
    return lambda text: Reward(rng.random(), {})
