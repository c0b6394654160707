"""Countdown: combine every given number once, with + - * /, into the target.

A task is the three functions that harness/tasks.py describes; parse_question lets a person ask by evaluate.py --ask.
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
    "Reason between <think> and </think>, then give only the expression between <answer> and </answer>, "
    "for example <answer>(1 + 2) / 3</answer>."
)
RESPONSE_PREFIX = "Let me solve this step by step.\n<think>"

TAG = re.compile("(</?(?:think|answer)>)")
STOP_TOKEN = re.compile(r"<\|(im_end|endoftext)\|>\Z")  # tolerated once at the end of a response
MAX_EXPRESSION_CHARS = 1000
EXPRESSION = re.compile(
    r"(?:(?<![0-9])(?:0|[1-9][0-9]{0,19})(?![0-9])|[-+*/() \t\n\r\f\v])*"
)  # no number with a leading zero
OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
SYNTHETIC_TRAIN_SIZE = 500_000  # about as many as the published dataset has


def render_prompt(problem: dict[str, Any], tokenizer: Tokenizer) -> str:
    user = USER_TEMPLATE.format(numbers=problem["numbers"], target=problem["target"])
    messages = [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": user}]
    return tokenizer.render_chat(messages) + RESPONSE_PREFIX


def parse_question(text: str) -> dict[str, Any]:
    """The problem that "3 5 7 = 22" stands for. Raises ValueError for what is not written so."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:[\s,]+[0-9]{1,9})+)\s*=\s*(-?[0-9]{1,9})\s*", text)
    if match is None:
        raise ValueError(
            f'{text[:80]!r} is not a question; write two numbers or more, "=" and a target, '
            'none above nine digits, for example "3 5 7 = 22"'
        )
    return {
        "numbers": [int(number) for number in re.split(r"[\s,]+", match[1])],
        "target": int(match[2]),
    }


# ---------------------------------------------------------------- reward


def reward_function(response: str, numbers: Sequence[int], target: int) -> Reward:
    """Score a response that continues the prompt's "<think>". Takes any string; never raises; bounded time."""
    response = STOP_TOKEN.sub("", response)
    well_formed = float(_is_well_formed(response))
    correct = float(_is_solution(_last_answer(response), numbers, target))
    return Reward(
        total=correct + 0.1 * well_formed, parts={"format": well_formed, "answer": correct}
    )


def _is_well_formed(response: str) -> bool:
    """Whether "<think>" + response is <think>A</think> <answer>C</answer>, with no further tag in A or C."""
    parts = TAG.split(response, 3)  # A, </think>, white space, <answer>, C, </answer>, white space
    return (
        parts[1::2] == ["</think>", "<answer>", "</answer>"] and not (parts[2] + parts[6]).strip()
    )


def _last_answer(response: str) -> str:
    """Contents of the last <answer>…</answer> after the first </think>, or "": an answer inside the thinking does not count."""
    _, _, rest = response.partition("</think>")
    start = rest.rfind("<answer>", 0, max(0, rest.rfind("</answer>")))
    return "" if start < 0 else rest[start + len("<answer>") : rest.find("</answer>", start)]


def _is_solution(expression: str, numbers: Sequence[int], target: int) -> bool:
    """Whether the expression uses each number once and equals the target. Python parses it; nothing is ever run."""
    if len(expression) > MAX_EXPRESSION_CHARS or not EXPRESSION.fullmatch(expression):
        return False
    try:
        tree = ast.parse(" ".join(expression.split()), mode="eval").body
        used = sorted(node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        if used != sorted(
            int(n) for n in numbers
        ):  # before any arithmetic: bounds the size of what is computed
            return False
        return _value(tree) == target
    except (
        SyntaxError,
        ZeroDivisionError,
        RecursionError,
        MemoryError,
    ):  # the last two: nested too deep for the parser
        return False


def _value(tree: ast.expr) -> Fraction:
    """In exact arithmetic. Raises SyntaxError for whatever is not + - * / over integers."""
    values = {}
    for node in reversed(
        list(ast.walk(tree))
    ):  # operands before their operation, without recursion
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
    """The keys of the config's section `data`; those with a value here are only for path: synthetic."""

    path: str  # "synthetic", a .jsonl file, or a dataset directory with data/*.parquet
    test_size: int = Field(
        ge=1, le=10**6
    )  # so many questions at the end are held out for evaluation
    num_numbers: list[Annotated[int, Field(ge=2, le=6)]] = Field(
        [3, 4], min_length=1, examples=[3, 4]
    )  # drawn from this list
    max_number: int = Field(99, ge=2, le=10**6)  # numbers are 1..max_number
    min_target: int = Field(10, ge=0)  # targets are min_target..max_target
    max_target: int = Field(100, ge=1)
    synthetic_seed: int = Field(0, ge=0)  # another seed, other questions, held-out ones included

    @model_validator(mode="after")
    def _in_order(self) -> "Data":
        if self.min_target > self.max_target:
            raise ValueError(
                f"data.min_target={self.min_target} is above data.max_target={self.max_target}; swap them"
            )
        return self


def load_problems(data: Data) -> tuple[Sequence[dict], Sequence[dict]]:
    """Training and held-out problems, {"numbers": […], "target": …} each.

    The last data.test_size rows are held out, and what reads the same (numbers in any order) never appears in training.
    Raises FileNotFoundError or ValueError naming the file, the row and the remedy.
    """
    if data.path == "synthetic":
        rng, held_out = random.Random(data.synthetic_seed), {}
        while len(held_out) < data.test_size:
            problem = draw_problem(rng, data, taken=held_out)
            held_out[_key(problem)] = problem
        return SyntheticProblems(data, held_out), list(held_out.values())
    rows = _read_problems(Path(data.path))
    if len(rows) <= data.test_size:
        raise ValueError(
            f"{data.path} has {len(rows)} problems, data.test_size={data.test_size} leaves none to train on; "
            "lower data.test_size"
        )
    test = rows[-data.test_size :]
    held_out = {_key(problem) for problem in test}
    train = [problem for problem in rows[: -data.test_size] if _key(problem) not in held_out]
    if not train:
        raise ValueError(
            f"{data.path}: every problem reads like one of the last data.test_size={data.test_size}; "
            "lower it, or add problems"
        )
    return train, test


def problem_kind(problem: dict[str, Any]) -> str:
    """Optional, like parse_question: evaluate.py reports the success of each kind of problem."""
    return f"{len(problem['numbers'])} numbers"


class SyntheticProblems(Sequence):
    """Solvable problems made on the fly: item i is always the same problem, and never a held-out one."""

    def __init__(self, data: Data, held_out: Collection[tuple]):
        self._data, self._held_out = data, held_out

    def __len__(self) -> int:
        return SYNTHETIC_TRAIN_SIZE

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        return draw_problem(
            random.Random(f"{self._data.synthetic_seed}/{index}"), self._data, taken=self._held_out
        )


def draw_problem(rng: random.Random, data: Data, *, taken: Collection[tuple]) -> dict:
    """Numbers and a target that some expression over all of them reaches, and that are not taken."""
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
        f"beside {len(taken)} held-out problems no target in data.min_target={data.min_target} … data.max_target="
        f"{data.max_target} can be reached from numbers up to data.max_number={data.max_number}; widen the range, or "
        f"lower data.test_size={data.test_size}"
    )


def _key(problem: dict) -> tuple:
    return (*sorted(problem["numbers"]), problem["target"])


def _read_problems(path: Path) -> list[dict]:
    remedy = (
        'wanted lines like {"nums": [3, 5, 7], "target": 22}'
        if path.suffix == ".jsonl"
        else (
            f"fetch the dataset with\n  uv run hf download Jiayi-Pan/Countdown-Tasks-3to4 --repo-type dataset --local-dir {path}\n"
            "or train without any download: uv run train.py --config config_tiny.yaml"
        )
    )
    problems = []
    for place, row in read_rows(path, ("nums", "target"), remedy=remedy):
        nums, target = row["nums"], row["target"]
        if not (
            isinstance(nums, list)
            and nums
            and all(type(n) is int for n in nums)
            and type(target) is int
        ):
            raise ValueError(
                f"{place}: nums={nums!r:.100}, target={target!r:.100}; wanted a list of integers and an integer"
            )
        problems.append({"numbers": nums, "target": target})
    return problems
