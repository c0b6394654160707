"""Score a model on held-out questions."""

from collections.abc import Callable

import torch

from data_types import Episode, Question, Reward
from grpo import rollout
from qwen2_model import Transformer
from tokenizer import Tokenizer


def evaluate(
    model: Transformer, tokenizer: Tokenizer, questions: list[Question], *, max_gen_len: int,
    reward_function: Callable[..., Reward], generator: torch.Generator, samples: int = 1,
    progress: Callable[[int, int], None] = lambda ended, steps: None,
) -> list[Episode]:  # fmt: skip
    """Answers to held-out questions, sampled at temperature 1 whatever the training's; `samples` to each question."""
    return rollout(model, tokenizer, questions, num_answers=samples, max_gen_len=max_gen_len, temperature=1.0,
                   reward_function=reward_function, generator=generator, progress=progress)
