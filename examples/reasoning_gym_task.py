"""Any of the hundred procedural tasks of reasoning-gym (github.com/open-thought/reasoning-gym).

    uv run --group gym train.py --config config_cpu.yaml data.chain_sum.max_terms=4
    uv run --group gym train.py --config config_cpu.yaml data.dataset=gcd data.gcd.max_value=100

`data.dataset` is the name of a task, and the section of that name in `data` has its parameters.
Problems are generated from seeds and scored by the task's own verifier.
"""

import contextlib
import re
import warnings
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

from pydantic import BaseModel, Field

from data_types import Reward
from tokenizer import Tokenizer

SYSTEM_MESSAGE = (
    "Think briefly, step by step. Then write the final answer between <answer> and </answer>."
)
ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
SOLVED = 0.99  # below: partial credit, which a policy would learn to collect instead of solving


class Data(BaseModel, extra="allow", frozen=True):
    """The section `data` of the config.

    A key that is not declared here is the name of a dataset; its value holds the parameters.
    """

    dataset: str  # a name from reasoning_gym.factory.DATASETS
    test_size: int = Field(ge=1, le=10**6)  # held-out problems
    train_size: int = Field(100_000, ge=1, le=10**9)  # training problems, generated when needed
    seed: int = Field(0, ge=0)  # another seed gives different problems, held-out ones included
    # A question and its answer to show before every problem, for a model that does not use the
    # tags by itself, such as ["What is 2 + 3?", "2 + 3 = 5 <answer>5</answer>"].
    example: tuple[str, str] | None = None
    path: str | None = None  # inherited from config.yaml, not used

    def problem(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {"dataset": self.dataset, "entry": entry, "example": self.example}


@cache
def reasoning_gym() -> ModuleType:
    """Import the package. Raises ValueError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", SyntaxWarning)  # from a package that it depends on
            import reasoning_gym
    except ImportError as error:
        raise ValueError(
            f"the task needs the package reasoning-gym ({error}); install it with "
            "`uv sync --group gym`, or start the program with `uv run --group gym`"
        ) from None
    return reasoning_gym


# Import it now if it is there. The process that scores answers starts from the imported task, and
# the package takes seconds to import, longer than training.reward_timeout may allow.
with contextlib.suppress(ValueError):
    reasoning_gym()


class Problems(Sequence):
    """Training problems, generated on demand, without the held-out ones."""

    def __init__(self, data: Data, held_out: set[str]):
        self.data, self.held_out = data, held_out
        self.dataset = _create_dataset(data, seed=data.seed, size=data.train_size)

    def __len__(self) -> int:
        return self.data.train_size

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        for i in range(range(len(self))[index], len(self)):
            entry = self.dataset[i]
            if entry["question"] not in self.held_out:
                return self.data.problem(entry)
        raise ValueError(
            f"data.dataset={self.data.dataset} has no training problem from index {index} on that "
            "is not held out; lower data.test_size, or give the task a wider range of problems"
        )


def load_problems(data: Data) -> tuple[Sequence[dict], Sequence[dict]]:
    """Training and held-out problems: {"dataset": its name, "entry": what its verifier needs,
    "example": data.example}.

    Raises ValueError naming an unknown dataset or parameter.
    """
    test = {}  # by question, so that no question is held out twice
    # Held-out problems come from seeds of their own.
    candidates = _create_dataset(data, seed=data.seed + 10**9, size=20 * data.test_size)
    for i in range(len(candidates)):
        entry = candidates[i]
        test.setdefault(entry["question"], data.problem(entry))
        if len(test) == data.test_size:
            return Problems(data, set(test)), list(test.values())
    raise ValueError(
        f"data.dataset={data.dataset} has only {len(test)} different problems; lower "
        f"data.test_size={data.test_size}, or give the task a wider range"
    )


def _create_dataset(data: Data, *, seed: int, size: int) -> Any:
    gym, sections = reasoning_gym(), data.model_extra or {}
    for name in sections:
        if name not in gym.factory.DATASETS:
            raise ValueError(
                f"data.{name}: reasoning-gym has no dataset of this name; a parameter of a dataset "
                f"goes into its section, for example data.{data.dataset}.{name}"
            )
    parameters = sections.get(data.dataset, {})
    try:
        return gym.create_dataset(data.dataset, seed=seed, size=size, **parameters)
    except (ValueError, TypeError, AssertionError) as error:
        raise ValueError(
            f"reasoning-gym rejects data.dataset={data.dataset} with {parameters}: {error}; its "
            "documentation lists the datasets and their parameters"
        ) from None


def render_prompt(problem: dict[str, Any], tokenizer: Tokenizer) -> str:
    messages = [{"role": "system", "content": SYSTEM_MESSAGE}]
    if problem["example"]:
        question, answer = problem["example"]
        messages += [{"role": "user", "content": f"{question}\n{SYSTEM_MESSAGE}"}]
        messages += [{"role": "assistant", "content": answer}]
    question = problem["entry"]["question"]
    messages += [{"role": "user", "content": f"{question}\n{SYSTEM_MESSAGE}"}]
    return tokenizer.render_chat(messages)


def reward_function(
    response: str, dataset: str, entry: dict[str, Any], example: tuple[str, str] | None
) -> Reward:
    """1 if the verifier accepts the last <answer>…</answer>, plus 0.1 for the format.

    The format is right if there is exactly one such block and the response ends with it.
    """
    answers = ANSWER.findall(response)
    well_formed = float(len(answers) == 1 and response.rstrip().endswith("</answer>"))
    score = 0.0
    if answers:
        verifier = reasoning_gym().get_score_answer_fn(dataset)
        score = float(verifier(answers[-1].strip(), entry))
    solved, answered = float(score >= SOLVED), float(bool(answers))
    parts = {"format": well_formed, "answered": answered, "answer": solved}
    return Reward(solved + 0.1 * well_formed, parts)
