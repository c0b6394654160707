"""Word problems with a number for an answer, as in GSM8K (Cobbe et al. 2021, arXiv:2110.14168): a task in one file.

    uv run train.py --config examples/config_gsm8k.yaml

data.path is a .jsonl file of {"question": …, "answer": …}; the answer is a number, or a text that ends in "#### number".
"""

import re
from decimal import Decimal
from pathlib import Path

from data_types import Reward
from published_format import read_rows

INSTRUCTION = (
    "{question}\n\nReason between <think> and </think>, then give only the final number between <answer> and </answer>, "
    "for example <answer>42</answer>."
)
RESPONSE_PREFIX = "Let me solve this step by step.\n<think>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
NUMBER = re.compile(r"[-+]?([0-9]{1,30}|[0-9]{1,3}(,[0-9]{3}){1,9})(\.[0-9]{0,30})?")


def load_problems(data) -> tuple[list[dict], list[dict]]:
    """Training and held-out problems, {"question": str, "number": Decimal} each; the last data.test_size rows are held out.

    Raises FileNotFoundError or ValueError naming the file, the row and the remedy.
    """
    remedy = (
        "take grade_school_math/data/train.jsonl from https://github.com/openai/grade-school-math, or any .jsonl of "
        '{"question": "…", "answer": "… #### 42"}'
    )
    rows = [
        _read_problem(place, row)
        for place, row in read_rows(Path(data.path), ("question", "answer"), remedy=remedy)
    ]
    if len(rows) <= data.test_size:
        raise ValueError(
            f"{data.path} has {len(rows)} problems, data.test_size={data.test_size} leaves none to train on; lower it"
        )
    test = rows[-data.test_size :]
    held_out = {problem["question"] for problem in test}
    return [
        problem for problem in rows[: -data.test_size] if problem["question"] not in held_out
    ], test


def render_prompt(problem: dict, tokenizer) -> str:
    messages = [{"role": "user", "content": INSTRUCTION.format(question=problem["question"])}]
    return tokenizer.render_chat(messages) + RESPONSE_PREFIX


def reward_function(response: str, question: str, number: Decimal) -> Reward:
    """answer: the number between the last <answer> and </answer> after the thinking is the right one, in decimal arithmetic.
    format: the response, which continues "<think>", is A</think> <answer>C</answer>, with no further tag in A or C.
    """
    thinking, _, rest = response.partition("</think>")
    before, opened, rest = rest.rpartition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    correct = float(bool(opened and closed) and parse_number(answer) == number)
    well_formed = float(
        bool(opened and closed)
        and not before.strip()
        and not after.strip()
        and not any(tag in thinking or tag in answer for tag in TAGS)
    )
    return Reward(
        total=correct + 0.1 * well_formed, parts={"format": well_formed, "answer": correct}
    )


def parse_number(text: str) -> Decimal | None:
    """18, "$1,234", "-0.50" or "18." as an exact number; None for anything else."""
    text = text.replace("$", "", 1).strip()
    return Decimal(text.replace(",", "")) if NUMBER.fullmatch(text) else None


def _read_problem(place: str, row: dict) -> dict:
    question, answer = row["question"], str(row["answer"])
    number = parse_number(answer.rpartition("####")[2])
    if number is None or not isinstance(question, str):
        raise ValueError(
            f'{place}: the answer {answer[-60:]!r} does not end in a number; wanted "42" or "… #### 42"'
        )
    return {"question": question, "number": number}
