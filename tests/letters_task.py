"""A task for tests: its reward differs between the answers of an untrained model.

So every training step has something to learn.
"""

from countdown_task import Data, load_problems, render_prompt
from data_types import Reward

__all__ = ["Data", "load_problems", "render_prompt", "reward_function"]


def reward_function(response: str, numbers: list[int], target: int) -> Reward:
    letters = sum(c.isalpha() for c in response)
    return Reward(letters / (1 + len(response)), {"answer": float(letters > 20)})
