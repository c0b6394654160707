"""Countdown: combine every given number once, with + - * /, into the target.

A task is the three functions that harness/tasks.py describes; parse_question lets a person ask by evaluate.py --ask.
"""

import json
import random
import re
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from data_types import Reward
from tokenizer import Tokenizer

SYSTEM_MESSAGE = "You are a careful assistant. You reason first, in the open, and then state your answer."
USER_TEMPLATE = (
    "Combine the numbers {numbers} into an arithmetic expression that equals {target}. "
    "Use each number exactly once, with + - * / and parentheses. "
    "Reason between <think> and </think>, then give only the expression between <answer> and </answer>, "
    "for example <answer>(1 + 2) / 3</answer>."
)
RESPONSE_PREFIX = "Let me solve this step by step.\n<think>"

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
STOP_TOKENS = ("<|im_end|>", "<|endoftext|>")  # tolerated once at the end of a response
MAX_EXPRESSION_CHARS = 1000
MAX_DEPTH = 64
TOKEN = re.compile(r"\s*(?:([0-9]+)|([-+*/()]))", re.ASCII)
SYNTHETIC_TRAIN_SIZE = 500_000  # about as many as the published dataset has


def render_prompt(problem: dict[str, Any], tokenizer: Tokenizer) -> str:
    user = USER_TEMPLATE.format(numbers=problem["numbers"], target=problem["target"])
    messages = [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": user}]
    return tokenizer.render_chat(messages) + RESPONSE_PREFIX


def parse_question(text: str) -> dict[str, Any]:
    """The problem that "3 5 7 = 22" stands for. Raises ValueError for what is not written so."""
    match = re.fullmatch(r"\s*([0-9]{1,9}(?:[\s,]+[0-9]{1,9})+)\s*=\s*(-?[0-9]{1,9})\s*", text)
    if match is None:
        raise ValueError(f'{text[:80]!r} is not a question; write two numbers or more, "=" and a target, '
                         'none above nine digits, for example "3 5 7 = 22"')
    return {"numbers": [int(number) for number in re.split(r"[\s,]+", match[1])], "target": int(match[2])}


# ---------------------------------------------------------------- reward


def reward_function(response: str, numbers: Sequence[int], target: int) -> Reward:
    """Score a response that continues the prompt's "<think>". Takes any string; never raises; bounded time."""
    for stop in STOP_TOKENS:
        if response.endswith(stop):
            response = response[: -len(stop)]
            break
    well_formed = float(_is_well_formed(response))
    answer = _last_answer(response)
    correct = float(answer is not None and _is_solution(answer, numbers, target))
    return Reward(total=correct + 0.1 * well_formed, parts={"format": well_formed, "answer": correct})


def _is_well_formed(response: str) -> bool:
    """Whether "<think>" + response is <think>A</think> <answer>C</answer>, with no further tag in A or C."""
    thinking, _, rest = response.partition("</think>")
    rest = rest.strip()
    if not (rest.startswith("<answer>") and rest.endswith("</answer>")):
        return False
    answer = rest.removeprefix("<answer>").removesuffix("</answer>")
    return not any(tag in thinking or tag in answer for tag in TAGS)


def _last_answer(response: str) -> str | None:
    """Contents of the last <answer>…</answer> after the first </think>: an answer inside the thinking does not count."""
    _, _, rest = response.partition("</think>")
    start = rest.rfind("<answer>", 0, max(0, rest.rfind("</answer>")))
    return None if start < 0 else rest[start + len("<answer>") : rest.find("</answer>", start)]


def _is_solution(expression: str, numbers: Sequence[int], target: int) -> bool:
    if len(expression) > MAX_EXPRESSION_CHARS:
        return False
    try:
        tokens = _tokenize(expression)
        used = sorted(t for t in tokens if isinstance(t, int))
        if used != sorted(int(n) for n in numbers):  # before any arithmetic: bounds the size of what is computed
            return False
        return _Parser(tokens).parse() == target
    except (SyntaxError, ZeroDivisionError):
        return False


def _tokenize(expression: str) -> list[int | str]:
    tokens, position = [], 0
    expression = expression.rstrip(" \t\n\r\f\v")
    while position < len(expression):
        match = TOKEN.match(expression, position)
        if match is None:
            raise SyntaxError(f"unexpected character at {position}")
        digits, operator = match.groups()
        if digits and (len(digits) > 20 or (digits[0] == "0" and digits != "0")):
            raise SyntaxError("a number too long or with a leading zero")
        tokens.append(int(digits) if digits else operator)
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent over: sum = product ((+|-) product)*; product = unary ((*|/) unary)*; unary = (+|-) unary | atom."""

    def __init__(self, tokens: list[int | str]):
        self.tokens, self.position, self.depth = tokens, 0, 0

    def parse(self) -> Fraction:
        value = self.sum()
        if self.peek() is not None:
            raise SyntaxError("something follows the expression")
        return value

    def peek(self) -> int | str | None:
        return self.tokens[self.position] if self.position < len(self.tokens) else None

    def take(self) -> int | str | None:
        token = self.peek()
        self.position += 1
        return token

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = value + self.product() if self.take() == "+" else value - self.product()
        return value

    def product(self) -> Fraction:
        value = self.unary()
        while self.peek() in ("*", "/"):
            value = value * self.unary() if self.take() == "*" else value / self.unary()
        return value

    def unary(self) -> Fraction:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = sign if self.take() == "+" else -sign
        return sign * self.atom()

    def atom(self) -> Fraction:
        token = self.take()
        if isinstance(token, int):
            return Fraction(token)
        self.depth += 1
        if token != "(" or self.depth > MAX_DEPTH:
            raise SyntaxError("a number or parenthesis was expected, or the nesting is too deep")
        value = self.sum()
        if self.take() != ")":
            raise SyntaxError("a closing parenthesis was expected")
        self.depth -= 1
        return value


# ---------------------------------------------------------------- problems


def load_problems(data) -> tuple[Sequence[dict], Sequence[dict]]:
    """Training and held-out problems, {"numbers": […], "target": …} each.

    data.path: "synthetic", a .jsonl file, or a dataset directory with data/*.parquet. The last data.test_size rows are
    held out, and what reads the same (numbers in any order) never appears in training.
    Raises FileNotFoundError or ValueError naming the file, the row and the remedy.
    """
    if data.path == "synthetic":
        rng = random.Random(data.synthetic_seed)
        draw = lambda rng: draw_problem(rng, data.num_numbers, data.max_number, data.min_target, data.max_target)  # noqa: E731
        test = {}
        for _ in range(1000 * data.test_size):
            problem = draw(rng)
            test.setdefault(_key(problem), problem)
            if len(test) == data.test_size:
                return SyntheticProblems(draw, data.synthetic_seed, frozenset(test)), list(test.values())
        raise ValueError(f"data.test_size={data.test_size}: there are only {len(test)} distinct synthetic problems with these "
                         "numbers and targets; lower it, or raise data.max_number")
    rows = _read_rows(Path(data.path))
    if len(rows) <= data.test_size:
        raise ValueError(f"{data.path} has {len(rows)} problems, data.test_size={data.test_size} leaves none to train on; "
                         "lower data.test_size")
    test = rows[-data.test_size :]
    held_out = {_key(problem) for problem in test}
    train = [problem for problem in rows[: -data.test_size] if _key(problem) not in held_out]
    if not train:
        raise ValueError(f"{data.path}: every problem reads like one of the last data.test_size={data.test_size}; "
                         "lower it, or add problems")
    return train, test


class SyntheticProblems(Sequence):
    """Solvable problems made on the fly: item i is always the same problem, and never a held-out one."""

    def __init__(self, draw, seed: int, held_out: frozenset):
        self._draw, self._seed, self._held_out = draw, seed, held_out

    def __len__(self) -> int:
        return SYNTHETIC_TRAIN_SIZE

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        rng = random.Random(f"{self._seed}/{index}")
        for _ in range(10_000):
            problem = self._draw(rng)
            if _key(problem) not in self._held_out:
                return problem
        raise ValueError("data.test_size holds out (nearly) every synthetic problem; lower it, or raise data.max_number")


def draw_problem(rng: random.Random, num_numbers: list[int], max_number: int, min_target: int, max_target: int) -> dict:
    """Numbers of 1..max_number and a target that some expression over all of them reaches."""
    for _ in range(100_000):
        numbers = [rng.randint(1, max_number) for _ in range(rng.choice(num_numbers))]
        values = [Fraction(n) for n in numbers]
        while len(values) > 1:
            a, b = (values.pop(rng.randrange(len(values))) for _ in range(2))
            values.append(rng.choice([a + b, a - b, a * b, a / b if b else a + b]))
        if values[0].denominator == 1 and min_target <= values[0] <= max_target:
            return {"numbers": numbers, "target": int(values[0])}
    raise ValueError(f"no target in data.min_target={min_target} … data.max_target={max_target} can be reached from "
                     f"numbers up to data.max_number={max_number}; widen the range")


def _key(problem: dict) -> tuple:
    return (*sorted(problem["numbers"]), problem["target"])


def _read_rows(path: Path) -> list[dict]:
    if not path.exists():
        raise FileNotFoundError(
            f"data.path={path} does not exist. Fetch the dataset with\n"
            "  uv run hf download Jiayi-Pan/Countdown-Tasks-3to4 --repo-type dataset --local-dir Countdown-Tasks-3to4\n"
            "or train without any download: uv run train.py --config config_tiny.yaml"
        )
    rows = _read_jsonl(path) if path.suffix == ".jsonl" else _read_parquet(path)
    if not rows:
        raise ValueError(f"{path} holds no problems")
    for place, nums, target in rows:
        if not (isinstance(nums, list) and nums and all(type(n) is int for n in nums) and type(target) is int):
            raise ValueError(f"{path}, {place}: nums={nums!r}, target={target!r}; wanted a list of integers and an integer")
    return [{"numbers": nums, "target": target} for _, nums, target in rows]


def _read_jsonl(path: Path) -> list[tuple]:
    """(where it stands, nums, target) of each line."""
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); write it anew") from None
    for i, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
                rows.append((f"line {i}", row["nums"], row["target"]))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f'{path}, line {i}: {error!r}; wanted {{"nums": [3, 5, 7], "target": 22}}') from None
    return rows


def _read_parquet(path: Path) -> list[tuple]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    files = sorted((path / "data").glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{path} holds no data/*.parquet; fetch the dataset again, or give a .jsonl file")
    rows = []
    for file in files:
        try:
            table = pq.read_table(file, columns=["nums", "target"])
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file} is not a parquet file with the columns nums and target ({error}); "
                             "fetch the dataset again") from None
        places = (f"{file.name}, row {i}" for i in range(1, len(table) + 1))
        rows += zip(places, table["nums"].to_pylist(), table["target"].to_pylist(), strict=True)
    return rows
