"""Word problems whose answer is a number, as in GSM8K (Cobbe et al. 2021, arXiv:2110.14168).

    uv run train.py --config examples/config_gsm8k.yaml

data.path is a .jsonl file of {"question": ..., "answer": ...}. An answer is a number, or text that
ends in "#### number".
"""

import re
from decimal import Decimal
from pathlib import Path

from data_types import Reward
from published_format import read_rows

INSTRUCTION = (
    "{question}\n\nReason between <think> and </think>, then give only the final number between "
    "<answer> and </answer>, for example <answer>42</answer>."
)
RESPONSE_PREFIX = "Let me solve this step by step.\n<think>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
NUMBER = re.compile(r"[-+]?([0-9]{1,30}|[0-9]{1,3}(,[0-9]{3}){1,9})(\.[0-9]{0,30})?")


def load_problems(data) -> tuple[list[dict], list[dict]]:
    """Return training and held-out problems, each {"question": str, "number": Decimal}.

    The last data.test_size rows are held out. A held-out question is never trained on.
    Raises FileNotFoundError or ValueError naming the file, the row and the fix.
    """
    remedy = (
        "download grade_school_math/data/train.jsonl from "
        "https://github.com/openai/grade-school-math, or any .jsonl file with lines like "
        '{"question": "...", "answer": "... #### 42"}'
    )
    rows = read_rows(Path(data.path), ("question", "answer"), remedy=remedy)
    problems = [_read_problem(place, row) for place, row in rows]
    test = problems[-data.test_size :]
    held_out = {problem["question"] for problem in test}
    train = [p for p in problems[: -data.test_size] if p["question"] not in held_out]
    if not train:
        raise ValueError(
            f"{data.path} has {len(problems)} problems, and data.test_size={data.test_size} leaves "
            "none to train on; lower data.test_size"
        )
    return train, test


def render_prompt(problem: dict, tokenizer) -> str:
    messages = [{"role": "user", "content": INSTRUCTION.format(question=problem["question"])}]
    chat = tokenizer.render_chat(messages)
    # The templates of some reasoning models open the thinking themselves.
    return chat if chat.rstrip().endswith("<think>") else chat + RESPONSE_PREFIX


def reward_function(response: str, question: str, number: Decimal) -> Reward:
    """Score a response, which continues the prompt's "<think>".

    answer: the last <answer>C</answer> after the thinking contains the right number, compared
    exactly. format: the response is A</think> <answer>C</answer> without further tags in A or C.
    """
    thinking, _, rest = response.partition("</think>")
    before, opened, rest = rest.rpartition("<answer>")
    answer, closed, after = rest.partition("</answer>")
    if not (opened and closed):
        return Reward(0.0, {"format": 0.0, "answer": 0.0})
    correct = float(parse_number(answer) == number)
    extra_tags = any(tag in thinking or tag in answer for tag in TAGS)
    well_formed = float(not before.strip() and not after.strip() and not extra_tags)
    return Reward(correct + 0.1 * well_formed, {"format": well_formed, "answer": correct})


def parse_number(text: str) -> Decimal | None:
    """Read "18", "$1,234", "-0.50" or "18." exactly. Returns None for anything else."""
    text = text.replace("$", "", 1).strip()
    return Decimal(text.replace(",", "")) if NUMBER.fullmatch(text) else None


def _read_problem(place: str, row: dict) -> dict:
    question, answer = row["question"], str(row["answer"])
    number = parse_number(answer.rpartition("####")[2])
    if number is None or not isinstance(question, str):
        raise ValueError(
            f"{place}: the answer {answer[-60:]!r} does not end in a number; it must look like "
            '"42" or "... #### 42"'
        )
    return {"question": question, "number": number}
