"""Countdown: combine all given numbers with + - * / so that they equal a target.

harness/rewards.py describes the functions of a task.
"""

import ast
import operator
import random
import re
from collections.abc import Collection, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from data_types import Reward
from published_format import read_rows
from tokenizer import Tokenizer

SYSTEM_MESSAGE = (
    "You are a careful assistant. You reason first, in the open, and then state your answer."
)
USER_TEMPLATE = (
    "Combine the numbers {numbers} into an arithmetic expression that equals {target}. "
    "Use each number exactly once, with + - * / and parentheses. "
    "Reason between <think> and </think>, then give only the expression between <answer> and "
    "</answer>, for example <answer>(1 + 2) / 3</answer>."
)
RESPONSE_PREFIX = "Let me solve this step by step.\n<think>"

TAG = re.compile("(</?(?:think|answer)>)")
STOP_TOKEN = re.compile(r"<\|(im_end|endoftext)\|>\Z")  # a response may end with one of them
MAX_EXPRESSION_CHARS = 1000
# Integers of up to 20 digits without leading zeros, operators, parentheses and white space.
EXPRESSION = re.compile(r"(?:(?<![0-9])(?:0|[1-9][0-9]{0,19})(?![0-9])|[-+*/() \t\n\r\f\v])*")
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SYNTHETIC_TRAIN_SIZE = 500_000  # about the size of the published dataset


def render_prompt(problem: dict[str, Any], tokenizer: Tokenizer) -> str:
    user = USER_TEMPLATE.format(numbers=problem["numbers"], target=problem["target"])
    messages = [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": user}]
    chat = tokenizer.render_chat(messages)
    # The templates of some reasoning models open the thinking themselves.
    return chat if chat.rstrip().endswith("<think>") else chat + RESPONSE_PREFIX


def parse_question(text: str) -> dict[str, Any]:
    """Turn "3 5 7 = 22" into a problem. Raises ValueError for any other form."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:[\s,]+[0-9]{1,9})+)\s*=\s*(-?[0-9]{1,9})\s*", text)
    if match is None:
        raise ValueError(
            f'{text[:80]!r} is not a question; write two or more numbers, "=" and a target, each '
            'of at most nine digits, for example "3 5 7 = 22"'
        )
    numbers = [int(number) for number in re.split(r"[\s,]+", match[1])]
    return {"numbers": numbers, "target": int(match[2])}


# ---------------------------------------------------------------- reward


def reward_function(response: str, numbers: Sequence[int], target: int) -> Reward:
    """Score a response, which continues the prompt's "<think>". Never raises."""
    response = STOP_TOKEN.sub("", response)
    well_formed = float(_is_well_formed(response))
    correct = float(_is_solution(_last_answer(response), numbers, target))
    return Reward(correct + 0.1 * well_formed, {"format": well_formed, "answer": correct})


def _is_well_formed(response: str) -> bool:
    """Return whether "<think>" + response is <think>A</think> <answer>C</answer>.

    A and C may be anything without one of the four tags. Only white space may surround the answer.
    """
    parts = TAG.split(response, 3)  # [A, </think>, space, <answer>, C, </answer>, space]
    if parts[1::2] != ["</think>", "<answer>", "</answer>"]:
        return False
    return not (parts[2] + parts[6]).strip()


def _last_answer(response: str) -> str:
    """Return the contents of the last <answer>...</answer>, or "" if there is none.

    The search starts after the first </think>: an answer inside the thinking does not count.
    """
    _, _, rest = response.partition("</think>")
    start = rest.rfind("<answer>", 0, max(0, rest.rfind("</answer>")))
    if start < 0:
        return ""
    return rest[start + len("<answer>") : rest.find("</answer>", start)]


def _is_solution(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Return whether the expression uses each number once and equals the target.

    Python's parser reads the expression, but nothing is executed.
    """
    if len(expression) > MAX_EXPRESSION_CHARS or not EXPRESSION.fullmatch(expression):
        return False
    try:
        tree = ast.parse(" ".join(expression.split()), mode="eval").body
        used = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
        # Compare before computing: the given numbers bound the size of every intermediate value.
        if sorted(used) != sorted(int(n) for n in numbers):
            return False
        return _value(tree) == target
    except (SyntaxError, ZeroDivisionError):
        return False
    except (RecursionError, MemoryError):  # nested too deeply for the parser
        return False


def _value(tree: ast.expr) -> Fraction:
    """Compute the exact value. Raises SyntaxError unless the tree is + - * / of integers."""
    values = {}
    for node in reversed(list(ast.walk(tree))):  # operands come before their operator
        match node:
            case ast.Constant(value):
                values[node] = Fraction(value)
            case ast.UnaryOp(op, operand):
                values[node] = values[operand] if isinstance(op, ast.UAdd) else -values[operand]
            case ast.BinOp(left, op, right) if type(op) in OPERATORS:
                values[node] = OPERATORS[type(op)](values[left], values[right])
            case ast.expr():
                raise SyntaxError("not an expression of + - * / and parentheses")
    return values[tree]


# ---------------------------------------------------------------- problems


class Data(BaseModel, extra="forbid", frozen=True, strict=True):
    """The `data` section of the config. Keys with a default only matter for `path: synthetic`."""

    path: str  # "synthetic", a .jsonl, .json or .parquet file, or a directory of parquet files
    test_size: int = Field(ge=1, le=10**6)  # questions held out for evaluation
    num_numbers: list[Annotated[int, Field(ge=2, le=6)]] = Field(
        [3, 4], min_length=1, examples=[3, 4]
    )  # how many numbers a question has, drawn from this list
    max_number: int = Field(99, ge=2, le=10**6)  # numbers are 1..max_number
    min_target: int = Field(10, ge=0)  # targets are min_target..max_target
    max_target: int = Field(100, ge=1)
    synthetic_seed: int = Field(0, ge=0)  # determines all questions, the held-out ones included

    @model_validator(mode="after")
    def _check_targets(self) -> "Data":
        if self.min_target > self.max_target:
            raise ValueError(
                f"data.min_target={self.min_target} is above data.max_target={self.max_target}; "
                "swap them"
            )
        return self


def load_problems(data: Data) -> tuple[Sequence[dict], Sequence[dict]]:
    """Return training and held-out problems, each {"numbers": list[int], "target": int}.

    The last data.test_size rows are held out. A training problem never has the target and the
    numbers, in any order, of a held-out problem.
    Raises FileNotFoundError or ValueError naming the file, the row and the fix.
    """
    if data.path == "synthetic":
        rng, held_out = random.Random(data.synthetic_seed), {}
        while len(held_out) < data.test_size:
            problem = draw_problem(rng, data, taken=held_out)
            held_out[_key(problem)] = problem
        return SyntheticProblems(data, held_out), list(held_out.values())
    problems = _read_problems(Path(data.path))
    test = problems[-data.test_size :]
    held_out = {_key(problem) for problem in test}
    train = [problem for problem in problems[: -data.test_size] if _key(problem) not in held_out]
    if not train:
        raise ValueError(
            f"{data.path} has {len(problems)} problems, and holding out data.test_size="
            f"{data.test_size} of them and their duplicates leaves none to train on; lower "
            "data.test_size or add problems"
        )
    return train, test


def problem_kind(problem: dict[str, Any]) -> str:
    return f"{len(problem['numbers'])} numbers"


class SyntheticProblems(Sequence):
    """Solvable problems made on demand. Item i is always the same, and never a held-out problem."""

    def __init__(self, data: Data, held_out: Collection[tuple]):
        self._data, self._held_out = data, held_out

    def __len__(self) -> int:
        return SYNTHETIC_TRAIN_SIZE

    def __getitem__(self, index: int | slice) -> dict | list[dict]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        rng = random.Random(f"{self._data.synthetic_seed}/{index}")
        return draw_problem(rng, self._data, taken=self._held_out)


def draw_problem(rng: random.Random, data: Data, *, taken: Collection[tuple]) -> dict:
    """Draw numbers, combine them at random, and take the result as the target.

    Tries again until the target is in range and the problem is not taken.
    """
    for _ in range(100_000):
        numbers = [rng.randint(1, data.max_number) for _ in range(rng.choice(data.num_numbers))]
        values = [Fraction(n) for n in numbers]
        while len(values) > 1:
            a, b = (values.pop(rng.randrange(len(values))) for _ in range(2))
            values.append(rng.choice([a + b, a - b, a * b, a / b if b else a + b]))
        if values[0].denominator == 1 and data.min_target <= values[0] <= data.max_target:
            problem = {"numbers": numbers, "target": int(values[0])}
            if _key(problem) not in taken:
                return problem
    raise ValueError(
        f"found no problem besides {len(taken)} held-out ones with numbers up to "
        f"data.max_number={data.max_number} and a target in data.min_target={data.min_target} to "
        f"data.max_target={data.max_target}; widen the range or lower "
        f"data.test_size={data.test_size}"
    )


def _key(problem: dict) -> tuple:
    """Equal for problems that differ only in the order of their numbers."""
    return (*sorted(problem["numbers"]), problem["target"])


def _read_problems(path: Path) -> list[dict]:
    if path.suffix:
        remedy = 'each row must look like {"nums": [3, 5, 7], "target": 22}'
    else:
        remedy = (
            "fetch the dataset with\n  uv run hf download Jiayi-Pan/Countdown-Tasks-3to4 "
            f"--repo-type dataset --local-dir {path}\n"
            "or train without any download: uv run train.py --config config_tiny.yaml"
        )
    problems = []
    for place, row in read_rows(path, ("nums", "target"), remedy=remedy):
        numbers, target = row["nums"], row["target"]
        integers = isinstance(numbers, list) and all(type(n) is int for n in [*numbers, target])
        if not integers or not numbers:
            raise ValueError(
                f"{place}: nums={numbers!r:.100} and target={target!r:.100}; nums must be a list "
                "of integers and target an integer"
            )
        problems.append({"numbers": numbers, "target": target})
    return problems
