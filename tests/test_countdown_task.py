"""The reward against DESIGN's definitions, an independent evaluator and hostile text; the problems against brute force."""

import ast
import json
import operator
import random
import re
import time
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from countdown_task import Data, load_problems, reward_function
from data_types import Reward

PUBLISHED = Path(__file__).parent.parent / "../shared/countdown/countdown_cd3_test.jsonl"
LIMIT_SECONDS = 0.010  # of one call of the reward, whatever the text
REPEATABLE = settings(max_examples=300, deadline=None, derandomize=True)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def answer_reward(expression: str, numbers: list[int], target: int) -> float:
    return reward_function(f" so</think>\n<answer>{expression}</answer>", numbers, target).parts[
        "answer"
    ]


def call_within_limit(response: str, numbers=(3, 5, 7), target=22) -> Reward:
    """The reward, which must come in time: this thread's own time, the best of a few calls, for the machine may be busy."""
    best = float("inf")
    for _ in range(10):
        start = time.thread_time()
        reward = reward_function(response, numbers, target)
        best = min(best, time.thread_time() - start)
        if best < LIMIT_SECONDS:
            break
    assert best < LIMIT_SECONDS, (
        f"{best * 1e3:.1f} ms for {len(response)} characters that begin {response[:60]!r}"
    )
    assert reward.parts["format"] in (0.0, 1.0)
    assert reward.parts["answer"] in (0.0, 1.0)
    return reward


# ---------------------------------------------------------------- the definitions, clause by clause

FORMAT = {  # response, which continues "<think>" -> format reward
    "thinking, newline, answer": ("3 + 5</think>\n<answer>3 + 5</answer>", 1),
    "a space between": ("x</think> <answer>1</answer>", 1),
    "any white space between": ("x</think> \n\t \r\n<answer>1</answer>", 1),
    "white space after": ("x</think>\n<answer>1</answer> \n\n", 1),
    "many lines of thinking": ("a\nb\n\nc</think>\n<answer>1</answer>", 1),
    "empty thinking": ("</think>\n<answer>1</answer>", 1),
    "empty answer": ("x</think>\n<answer></answer>", 1),
    "an answer on its own lines": ("x</think>\n<answer>\n1\n</answer>", 1),
    "a wrong answer": ("x</think>\n<answer>nonsense</answer>", 1),
    "lesser signs that are no tags": ("1 < 2 > 0 <b> < think></think>\n<answer>1 < 2</answer>", 1),
    "the stop token": ("x</think>\n<answer>1</answer><|im_end|>", 1),
    "the other stop token": ("x</think>\n<answer>1</answer><|endoftext|>", 1),
    "white space, then the stop token": ("x</think>\n<answer>1</answer>\n<|im_end|>", 1),
    "two stop tokens": ("x</think>\n<answer>1</answer><|im_end|><|im_end|>", 0),
    "one stop token and the other": ("x</think>\n<answer>1</answer><|endoftext|><|im_end|>", 0),
    "nothing": ("", 0),
    "only a stop token": ("<|im_end|>", 0),
    "no closed thinking": ("x\n<answer>1</answer>", 0),
    "no answer": ("x</think>\n", 0),
    "answer not closed": ("x</think>\n<answer>1", 0),
    "answer not opened": ("x</think>\n1</answer>", 0),
    "tags in the wrong order": ("<answer>1</answer></think>", 0),
    "words between": ("x</think> so <answer>1</answer>", 0),
    "words after": ("x</think>\n<answer>1</answer> done", 0),
    "a second answer": ("x</think>\n<answer>1</answer>\n<answer>1</answer>", 0),
    "a second thinking": ("x</think>\n<think>y</think>\n<answer>1</answer>", 0),
    "<think> in the thinking": ("<think>x</think>\n<answer>1</answer>", 0),
    "<answer> in the thinking": ("x <answer> y</think>\n<answer>1</answer>", 0),
    "</answer> in the thinking": ("x </answer> y</think>\n<answer>1</answer>", 0),
    "an answer in the thinking": ("<answer>1</answer></think>\n<answer>1</answer>", 0),
    "</think> twice": ("x</think></think>\n<answer>1</answer>", 0),
    "<think> in the answer": ("x</think>\n<answer><think>1</answer>", 0),
    "</think> in the answer": ("x</think>\n<answer>1</think></answer>", 0),
    "<answer> in the answer": ("x</think>\n<answer><answer>1</answer>", 0),
    "</answer> in the answer": ("x</think>\n<answer>1</answer></answer>", 0),
    "tags in capitals": ("x</THINK>\n<ANSWER>1</ANSWER>", 0),
    "a space in a tag": ("x</think>\n<answer >1</answer>", 0),
}


# Catches: any of the four tags left out of TAG; parts[2] or parts[6] left out, or their `.strip()`, in
# _is_well_formed; `\Z` left out of STOP_TOKEN.
@pytest.mark.parametrize(("response", "wanted"), FORMAT.values(), ids=FORMAT)
def test_format_reward(response, wanted):
    assert reward_function(response, [1, 2], 3).parts["format"] == wanted


ANSWER = {  # contents of <answer>, numbers, target -> answer reward
    "the sum": ("1 + 2", [1, 2], 3, 1),
    "numbers in another order": ("2 + 1", [1, 2], 3, 1),
    "subtraction from the left": ("10 - 3 - 2", [10, 3, 2], 5, 1),
    "subtraction is not from the right": ("10 - 3 - 2", [10, 3, 2], 9, 0),
    "division from the left": ("24 / 4 / 2", [24, 4, 2], 3, 1),
    "division is not from the right": ("24 / 4 / 2", [24, 4, 2], 12, 0),
    "division and product are equals": ("24 / 4 * 2", [24, 4, 2], 12, 1),
    "product before sum": ("2 + 3 * 4", [2, 3, 4], 14, 1),
    "sum is not before product": ("2 + 3 * 4", [2, 3, 4], 20, 0),
    "parentheses first": ("(2 + 3) * 4", [2, 3, 4], 20, 1),
    "nested parentheses": ("((2) + ((3))) * (4)", [2, 3, 4], 20, 1),
    "sign at the head": ("-2 + 5", [2, 5], 3, 1),
    "sign after an operator": ("5 * -2 + 13", [5, 2, 13], 3, 1),
    "sign before parentheses": ("-(2 - 5)", [2, 5], 3, 1),
    "signs in a row": ("5 - - + 2", [5, 2], 7, 1),
    "plus sign": ("+5 + +2", [5, 2], 7, 1),
    "sign binds before product": ("-2 * 3 + 7", [2, 3, 7], 1, 1),
    "exact thirds": ("1 / 3 * 3", [1, 3, 3], 1, 1),
    "exact where floats are not": (
        "49 * (1 / 49)",
        [49, 1, 49],
        1,
        1,
    ),  # 49 * (1 / 49) is 0.9999999999999999 in floats
    "nearly is not equal": ("10 / 3 * 3 + 1", [10, 3, 1], 11, 0),  # three given once, used twice
    "a fraction near the target": ("7 / 2", [7, 2], 3, 0),
    "the numerator is not the value": ("7 / 2", [7, 2], 7, 0),
    "negative target": ("2 - 5", [2, 5], -3, 1),
    "zero": ("0 + 3", [0, 3], 3, 1),
    "target zero": ("3 - 3", [3, 3], 0, 1),
    "no white space": ("(1+2)*3", [1, 2, 3], 9, 1),
    "white space everywhere": (" ( 1\t+ 2 )\n*\r\n 3 ", [1, 2, 3], 9, 1),
    "a repeated number, repeated": ("3 * 3 + 4", [3, 4, 3], 13, 1),
    "a large number": ("12345678901 - 1", [12345678901, 1], 12345678900, 1),
    "a number unused": ("1 + 2", [1, 2, 3], 3, 0),
    "a number twice": ("1 + 2 + 2 - 2", [1, 2], 3, 0),
    "a repeated number, used once": ("3 + 4", [3, 4, 3], 7, 0),
    "another number": ("4 - 1", [1, 2], 3, 0),
    "digits joined": ("12", [1, 2], 12, 0),
    "a number apart": ("1 2", [12], 12, 0),
    "only the target": ("3", [1, 2], 3, 0),
    "an equation": ("1 + 2 = 3", [1, 2], 3, 0),
    "wrong value": ("2 - 1", [1, 2], 3, 0),
    "empty": ("", [1, 2], 3, 0),
    "empty parentheses": ("() 1 + 2", [1, 2], 3, 0),
    "white space only": (" \n ", [1, 2], 3, 0),
    "floor division": ("7 // 2", [7, 2], 3, 0),
    "power": ("2 ** 3", [2, 3], 8, 0),
    "caret": ("2 ^ 3", [2, 3], 8, 0),
    "remainder": ("7 % 4", [7, 4], 3, 0),
    "leading zero": ("01 + 2", [1, 2], 3, 0),
    "leading zeros": ("1 + 002", [1, 2], 3, 0),
    "zero twice": ("00 + 3", [0, 3], 3, 0),
    "underscore": ("1_0 + 2", [10, 2], 12, 0),
    "decimal point": ("1.0 + 2", [1, 2], 3, 0),
    "exponent": ("1e1 + 2", [10, 2], 12, 0),
    "hexadecimal": ("0xA + 2", [10, 2], 12, 0),
    "implied product": ("2(3)", [2, 3], 6, 0),
    "implied product of parentheses": ("(2)(3)", [2, 3], 6, 0),
    "product sign": ("2 × 3", [2, 3], 6, 0),
    "division sign": ("6 ÷ 3", [6, 3], 2, 0),
    "real minus": ("5 − 2", [5, 2], 3, 0),
    "full-width digits": ("１ + 2", [1, 2], 3, 0),
    "superscript": ("1 + 2²", [1, 2], 3, 0),
    "arabic digits": ("١ + 2", [1, 2], 3, 0),
    "open parenthesis": ("(1 + 2", [1, 2], 3, 0),
    "closed parenthesis": ("1 + 2)", [1, 2], 3, 0),
    "crossed parentheses": (")1 + 2(", [1, 2], 3, 0),
    "operator at the end": ("1 + 2 +", [1, 2], 3, 0),
    "operator at the head": ("* 1 + 2", [1, 2], 3, 0),
    "operators in a row": ("1 + * 2", [1, 2], 3, 0),
    "division by zero": ("3 / (1 - 1)", [3, 1, 1], 3, 0),
    "division of zero by zero": ("(1 - 1) / (2 - 2)", [1, 1, 2, 2], 1, 0),
    "a comment": ("1 + 2 # three", [1, 2], 3, 0),
    "a comma": ("1 + 2, 3", [1, 2, 3], 3, 0),
    "a call": ("abs(1 - 2) + 2", [1, 2, 2], 3, 0),
    "code": ("__import__('os')", [1, 2], 3, 0),
    "words": ("the answer is 1 + 2", [1, 2], 3, 0),
    "markdown": ("`1 + 2`", [1, 2], 3, 0),
}


# Catches: Fraction(value) turned into float(value) ("exact where floats are not"); `values[left], values[right]` swapped;
# "used != numbers" turned into a comparison of sets; EXPRESSION without its clause on leading zeros; `== target` compared
# after int(); `-values[operand]` without its sign; `if type(op) in OPERATORS` dropped.
@pytest.mark.parametrize(("expression", "numbers", "target", "wanted"), ANSWER.values(), ids=ANSWER)
def test_answer_reward(expression, numbers, target, wanted):
    assert answer_reward(expression, numbers, target) == wanted


WHICH_ANSWER = {  # response -> answer reward for 1 + 2 = 3: which <answer> counts
    "after the thinking": ("x</think>\n<answer>1+2</answer>", 1),
    "inside the thinking": ("<answer>1+2</answer></think>", 0),
    "inside the thinking, and a wrong one after": (
        "<answer>1+2</answer></think>\n<answer>2-1</answer>",
        0,
    ),
    "wrong inside the thinking, right after": (
        "<answer>2-1</answer></think>\n<answer>1+2</answer>",
        1,
    ),
    "opened in the thinking, closed after": ("<answer>1+</think>2</answer>", 0),
    "without any </think>": ("x\n<answer>1+2</answer>", 0),
    "last of two, right": ("x</think><answer>2-1</answer><answer>1+2</answer>", 1),
    "last of two, wrong": ("x</think><answer>1+2</answer><answer>2-1</answer>", 0),
    "last of three": ("x</think><answer>1</answer><answer>2</answer> so <answer>1+2</answer>", 1),
    "before a second </think>": ("x</think><answer>1+2</answer></think>", 1),
    "after a second </think>": ("x</think>y</think><answer>1+2</answer>", 1),
    "words around": ("x</think> so <answer>1+2</answer> it is", 1),
    "then an answer that is not closed": ("x</think><answer>1+2</answer><answer>2-1", 1),
    "not closed": ("x</think><answer>1+2", 0),
    "not closed before the stop token": ("x</think><answer>1+2<|im_end|>", 0),
    "closed twice": ("x</think><answer>1+2</answer></answer>", 1),
    "before the stop token": ("x</think>\n<answer>1+2</answer><|im_end|>", 1),
}


# Catches: the search starting at the head of the response; the first answer kept instead of the last; rpartition for
# partition at "</think>".
@pytest.mark.parametrize(("response", "wanted"), WHICH_ANSWER.values(), ids=WHICH_ANSWER)
def test_the_last_answer_after_the_first_closed_thinking_counts(response, wanted):
    assert reward_function(response, [1, 2], 3).parts["answer"] == wanted


# Catches: 0.1 * well_formed turned into 1.0 * well_formed, or multiplied with the answer.
@pytest.mark.parametrize(
    ("response", "form", "answer", "total"),
    [
        ("x</think>\n<answer>1+2</answer>", 1.0, 1.0, 1.1),
        ("x</think>\n<answer>2-1</answer>", 1.0, 0.0, 0.1),
        ("x</think> so <answer>1+2</answer>", 0.0, 1.0, 1.0),
        ("1+2", 0.0, 0.0, 0.0),
    ],
)
def test_total_is_answer_plus_a_tenth_of_format(response, form, answer, total):
    reward = reward_function(response, [1, 2], 3)
    assert reward.parts == {"format": form, "answer": answer}
    assert reward.total == pytest.approx(total, abs=1e-12)


def test_the_numbers_may_come_in_any_sequence():
    response = "x</think>\n<answer>(5 - 3) * 7</answer>"
    for numbers in ((7, 5, 3), [3, 5, 7], range(3, 8, 2)):
        assert reward_function(response, numbers, 14).parts["answer"] == 1


# ---------------------------------------------------------------- an independent evaluator


def tree_value(tree) -> Fraction | None:
    """Value of a number, a signed tree ("-", a) or a pair ("*", a, b); None where it divides by zero."""
    if isinstance(tree, int):
        return Fraction(tree)
    values = [tree_value(branch) for branch in tree[1:]]
    if None in values or (tree[0] == "/" and values[1] == 0):
        return None
    return OPERATIONS[tree[0]](*([Fraction(0)] if len(values) == 1 else []), *values)


def random_tree(rng, numbers: list[int]):
    if rng.random() < 0.1:
        return (rng.choice("+-"), random_tree(rng, numbers))
    if len(numbers) == 1:
        return numbers[0]
    cut = rng.randrange(1, len(numbers))
    return (rng.choice("+-*/"), random_tree(rng, numbers[:cut]), random_tree(rng, numbers[cut:]))


def render(tree, rng) -> str:
    """The tree as text, with the parentheses that it needs, some that it does not, and white space anywhere."""
    space = lambda: rng.choice(["", "", " ", "\t", "\n", "  "])  # noqa: E731
    if isinstance(tree, int):
        text = str(tree)
    else:
        branches = []
        for i, branch in enumerate(tree[1:]):
            inner = (
                branch[0] if isinstance(branch, tuple) and len(branch) == 3 else ""
            )  # signed branches bind tightest
            if len(tree) == 2 or tree[0] in "*/":
                needed = inner in ("+", "-") or (inner != "" and (len(tree) == 2 or i == 1))
            else:
                needed = i == 1 and inner in ("+", "-")
            branches.append(f"({render(branch, rng)})" if needed else render(branch, rng))
        text = (
            f"{tree[0]}{space()}{branches[0]}"
            if len(tree) == 2
            else f"{branches[0]}{space()}{tree[0]}{space()}{branches[1]}"
        )
        if len(tree) == 3 and rng.random() < 0.15:
            text = f"({space()}{text}{space()})"
    return space() + text + space()


# Catches: every change of the grammar: precedence, associativity, the order of operands, the scope of a sign.
@REPEATABLE
@given(seed=st.integers(0, 2**32), numbers=st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_expressions_are_worth_what_their_tree_is_worth(seed, numbers):
    rng = random.Random(seed)
    tree = random_tree(rng, numbers)
    value, text = tree_value(tree), render(tree, rng)
    shuffled = rng.sample(numbers, len(numbers))
    if value is None:
        assert answer_reward(text, shuffled, 0) == 0
    else:
        assert answer_reward(text, shuffled, value) == 1, text
        assert answer_reward(text, shuffled, value + 1) == 0, text
        assert answer_reward(text, [*shuffled, 1], value) == 0, text
        assert answer_reward(text, [*shuffled[1:], shuffled[0] + 1], value) == 0, text


def python_value(text: str) -> Fraction | None:
    """What Python's own parser makes of it, in rational arithmetic; None for what is no expression of this language."""
    if re.search(r"//|\*\*|\b0[0-9]", text):
        return None

    def value(node) -> Fraction:
        if isinstance(node, ast.Constant):
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp):
            return -value(node.operand) if isinstance(node.op, ast.USub) else value(node.operand)
        if not isinstance(node, ast.BinOp):
            raise SyntaxError  # a call such as 2(3)
        symbol = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}[type(node.op)]
        return OPERATIONS[symbol](value(node.left), value(node.right))

    try:
        return value(ast.parse(text.strip(" "), mode="eval").body)
    except (SyntaxError, ZeroDivisionError):
        return None


# Catches: `case ast.expr()` left out of _value, which would then raise on "2(3)"; `" ".join(expression.split())` -> `"".join(...)`.
@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's parser on "2(3)"
@REPEATABLE
@given(
    st.lists(st.sampled_from([*"+-*/()", " ", *"0123", "12", "+", "*"]), max_size=9).map("".join)
)
def test_any_string_of_tokens_is_judged_as_python_judges_it(text):
    value = python_value(text)
    numbers = [int(digits) for digits in re.findall("[0-9]+", text)]
    for target in {value, Fraction(3)} - {None}:
        assert answer_reward(text, numbers, target) == float(value == target), (text, target)


# ---------------------------------------------------------------- hostile text

FRAGMENTS = [
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "<",
    ">",
    "</",
    "answer>",
    "</answer",
    "<|im_end|>",
    "<|endoftext|>",
    *"0123456789",
    *"+-*/()",
    " ",
    "\n",
    "\t",
    "\r",
    "3",
    "5",
    "7",
    "3 * 5 + 7",
    "(3*5)+7",
    "**",
    "//",
    "_",
    ".",
    "=",
    ",",
    "e9",
    "0x",
    "\0",
    "\ud800",
    "\udfff",
    "\u202e",
    "\u200b",
    "\ufeff",
    "\u00a0",
    "\u2028",
    "\x1c",
    "１",
    "²",
    "٣",
    "½",
    "−",
    "×",
    "é",
    "思",
    "🤔",
    "9" * 25,
    "(" * 70,
    ")" * 70,
    "-" * 300,
    "9**9**9",
    "__import__('os')",
    "{}",
    "%s",
    "\\",
    "'",
    '"',
]
ANYTHING = st.one_of(
    st.text(st.characters()),  # lone surrogates included
    st.lists(st.sampled_from(FRAGMENTS), max_size=60).map("".join),
    st.lists(
        st.one_of(st.sampled_from(FRAGMENTS), st.text(st.characters(), max_size=4)), max_size=30
    ).map(lambda parts: "x</think>\n<answer>" + "".join(parts) + "</answer>"),
)


# Catches: ZeroDivisionError or SyntaxError left out of _is_solution's except.
@REPEATABLE
@given(response=ANYTHING)
def test_no_text_raises_or_takes_long(response):
    call_within_limit(response)


def inside(text: str) -> str:
    return f"</think>\n<answer>{text}</answer>"


HOSTILE = {
    "a power tower": inside("99**98**97"),
    "a product of everything": inside("*".join(["99999999999999999999"] * 40)),
    "megabyte of digits": inside("9" * 1_000_000),
    "megabyte of white space": inside(" " * 1_000_000),
    "megabyte of signs": inside("-" * 1_000_000 + "3"),
    "megabyte of words": inside("word " * 200_000),
    "megabyte after the answer": inside("3*5+7") + "y" * 1_000_000,
    "megabyte of thinking": "y" * 1_000_000 + inside("3*5+7"),
    "megabyte of null characters": "\0" * 1_000_000,
    "100,000 parentheses opened": inside("(" * 100_000),
    "100,000 parentheses closed": inside(")" * 100_000),
    "100,000 parentheses around": inside("(" * 50_000 + "3*5+7" + ")" * 50_000),
    "as deep as fits": inside("(" * 497 + "3*5+7" + ")" * 497),
    "as many signs as fit": inside("3*5+" + "-+" * 496 + "7"),
    "20,000 opened thoughts": "<think>" * 20_000,
    "20,000 closed thoughts": "</think>" * 20_000,
    "20,000 opened answers": "</think>" + "<answer>" * 20_000,
    "20,000 closed answers": "</think>" + "</answer>" * 20_000,
    "10,000 answers": "</think>" + "<answer></answer>" * 10_000,
    "20,000 tags in turn": "<think></think><answer></answer>" * 5_000,
    "200,000 halves of a tag": "</think><answer>" + "</answe" * 200_000,
    "20,000 stop tokens": "<|im_end|>" * 20_000,
    "null characters": inside("3\0*5+7"),
    "lone surrogates": inside("3*5+7\ud800"),
    "lone surrogates outside": "\udfff" + inside("3*5+7") + "\ud800",
    "right-to-left marks": inside("\u202e3*5+7"),
    "byte order mark": inside("\ufeff3*5+7"),
    "full-width": inside("３*５+７"),
    "a number of 21 digits": inside("3*5+" + "7" * 21),
}


# Catches: MAX_EXPRESSION_CHARS left out; the numbers compared after the arithmetic instead of before it.
@pytest.mark.parametrize("response", HOSTILE.values(), ids=HOSTILE)
def test_hostile_text_is_scored_in_time(response):
    call_within_limit(response)


def test_hostile_answers_earn_nothing_and_honest_ones_in_hostile_company_all():
    earned = {
        name
        for name, response in HOSTILE.items()
        if reward_function(response, [3, 5, 7], 22).parts["answer"]
    }
    assert earned == {
        "megabyte of thinking",
        "megabyte after the answer",
        "as many signs as fit",
        "lone surrogates outside",
    }


def test_nothing_is_raised_however_deep_the_caller_stands():
    # Catches: RecursionError left out of _is_solution's except (Python 3.11 counts its own frames against its parser's).
    def call(depth: int) -> Reward:
        return (
            call(depth - 1)
            if depth
            else reward_function(HOSTILE["as many signs as fit"], [3, 5, 7], 22)
        )

    for depth in (0, 400, 700, 850):
        assert call(depth).parts["format"] == 1


def test_depth_and_length_have_room_for_any_honest_answer():
    assert answer_reward("(" * 30 + "3*5+7" + ")" * 30, [3, 5, 7], 22) == 1
    assert answer_reward("3 * 5 + 7" + " " * 900, [3, 5, 7], 22) == 1
    # Catches: _value by recursion with a limit: parentheses side by side are not deep.
    assert answer_reward("+".join(["(1)"] * 200), [1] * 200, 200) == 1


@pytest.mark.slow
def test_100_000_hostile_texts():
    rng = random.Random(0)
    for i in range(100_000):
        parts = rng.choices(FRAGMENTS, k=rng.randrange(40))
        if i % 2:
            parts = ["</think>\n<answer>", *parts, "</answer>"]
        if i % 100 == 0:
            parts *= rng.randrange(1, 400)
        if i % 5 == 0:
            parts += map(chr, (rng.randrange(0x110000) for _ in range(5)))
        call_within_limit("".join(parts))


# ---------------------------------------------------------------- problems


def data_config(path, **changes) -> Data:
    return Data(
        **{
            "path": str(path),
            "test_size": 8,
            "num_numbers": [3, 4],
            "max_number": 20,
            "min_target": 10,
            "max_target": 60,
            "synthetic_seed": 5,
        }
        | changes
    )


def solve(numbers: list[int], target: int) -> str | None:
    """An expression over all the numbers that is worth the target, by trying every one."""

    def combine(entries: list[tuple[Fraction, str]]) -> str | None:
        if len(entries) == 1:
            return entries[0][1] if entries[0][0] == target else None
        for i, (a, a_text) in enumerate(entries):
            for j, (b, b_text) in enumerate(entries):
                if i != j:
                    rest = [e for k, e in enumerate(entries) if k not in (i, j)]
                    for symbol in "+-*/" if i < j else "-/":
                        if symbol != "/" or b != 0:
                            entry = OPERATIONS[symbol](a, b), f"({a_text} {symbol} {b_text})"
                            if (found := combine([*rest, entry])) is not None:
                                return found
        return None

    return combine([(Fraction(n), str(n)) for n in numbers])


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text(
        "".join(json.dumps({"nums": nums, "target": target}) + "\n" for nums, target in rows)
    )
    return path


@pytest.mark.skipif(
    not PUBLISHED.exists(), reason="../shared/countdown/countdown_cd3_test.jsonl is not here"
)
def test_the_published_problems_load_and_their_solutions_earn_everything(tmp_path):
    published = [json.loads(line) for line in PUBLISHED.read_text().splitlines()]
    rows = [([int(n) for n in row["input"].split(",")], int(row["output"])) for row in published]
    train, test = load_problems(
        data_config(write_jsonl(tmp_path / "published.jsonl", [([1, 1], 2), *rows]), test_size=256)
    )
    assert len(test) == 256
    assert list(train) == [{"numbers": [1, 1], "target": 2}]
    assert [(p["numbers"], p["target"]) for p in test] == rows
    solutions = [solve(**problem) for problem in test]
    assert all(solutions)  # each of the 256 can be solved
    for problem, solution in zip(test, solutions, strict=True):
        assert reward_function(
            f" so</think>\n<answer>{solution}</answer><|im_end|>", **problem
        ).total == pytest.approx(1.1)


ROWS = [
    ([1, 2, 3], 6),
    ([4, 5], 20),
    ([3, 2, 1], 6),
    ([5, 4], 9),
    ([7, 8, 9], 24),
    ([2, 1, 3], 6),
    ([4, 5], 9),
]


# Catches: sorted() left out of _key; rows[:test_size] held out instead of the last; _key without the target.
def test_the_last_rows_are_held_out_and_what_equals_them_is_not_trained_on(tmp_path):
    train, test = load_problems(
        data_config(write_jsonl(tmp_path / "problems.jsonl", ROWS), test_size=2)
    )
    assert list(test) == [{"numbers": [2, 1, 3], "target": 6}, {"numbers": [4, 5], "target": 9}]
    assert list(train) == [{"numbers": [4, 5], "target": 20}, {"numbers": [7, 8, 9], "target": 24}]


def test_blank_lines_and_other_columns_do_no_harm(tmp_path):
    path = tmp_path / "problems.jsonl"
    lines = [
        "",
        '{"nums": [1, 2], "target": 3, "source": "é"}',
        "",
        "  ",
        '{"id": 1, "target": 9, "nums": [4, 5]}',
        "",
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    train, test = load_problems(data_config(path, test_size=1))
    assert [*train, *test] == [{"numbers": [1, 2], "target": 3}, {"numbers": [4, 5], "target": 9}]


def write_parquet(directory: Path, name: str, columns: dict) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    (directory / "data").mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), directory / "data" / name)


def test_a_dataset_directory_is_read_like_the_same_rows_as_jsonl(tmp_path):
    for name, rows in (
        ("train-00001-of-00002.parquet", ROWS[4:]),
        ("train-00000-of-00002.parquet", ROWS[:4]),
    ):
        columns = {
            "target": [t for _, t in rows],
            "nums": [n for n, _ in rows],
            "other": ["x"] * len(rows),
        }
        write_parquet(tmp_path / "dataset", name, columns)
    for test_size in (1, 2, 5):
        of_parquet = load_problems(data_config(tmp_path / "dataset", test_size=test_size))
        of_jsonl = load_problems(
            data_config(write_jsonl(tmp_path / "problems.jsonl", ROWS), test_size=test_size)
        )
        assert list(map(list, of_parquet)) == list(map(list, of_jsonl))
        assert all(type(n) is int for problem in of_parquet[0] for n in problem["numbers"])


# ---------------------------------------------------------------- synthetic problems


def key(problem: dict) -> tuple:
    return tuple(sorted(problem["numbers"])), problem["target"]


def test_synthetic_problems_can_be_solved_and_keep_their_ranges():
    train, test = load_problems(data_config("synthetic"))
    problems = [*test, *(train[i] for i in range(40))]
    for problem in problems:
        assert len(problem["numbers"]) in (3, 4)
        assert all(type(n) is int and 1 <= n <= 20 for n in problem["numbers"])
        assert type(problem["target"]) is int
        assert 10 <= problem["target"] <= 60
        solution = solve(**problem)
        assert solution is not None, problem
        assert reward_function(
            f"</think>\n<answer>{solution}</answer>", **problem
        ).total == pytest.approx(1.1)
    assert {len(p["numbers"]) for p in problems} == {3, 4}


def test_synthetic_problems_reach_both_ends_of_their_ranges():
    train, _ = load_problems(
        data_config(
            "synthetic", num_numbers=[2], max_number=4, min_target=2, max_target=7, test_size=1
        )
    )
    problems = [train[i] for i in range(1000)]
    assert {n for p in problems for n in p["numbers"]} == {1, 2, 3, 4}
    assert {p["target"] for p in problems} == {2, 3, 4, 5, 6, 7}


# Catches: the random numbers of an item drawn from a generator that remembers the items before it.
def test_a_synthetic_problem_depends_on_its_place_and_the_seed_alone():
    first, first_test = load_problems(data_config("synthetic"))
    again, again_test = load_problems(data_config("synthetic"))
    other, other_test = load_problems(data_config("synthetic", synthetic_seed=6))
    places = [0, 1, 7, 100, 499_999]
    forward, backward = [first[i] for i in places], [again[i] for i in reversed(places)]
    assert forward == backward[::-1]
    assert forward == [first[i] for i in places]
    assert forward != [other[i] for i in places]
    assert first_test == again_test
    assert first_test != other_test
    assert len(first) == 500_000
    assert len({key(p) for p in forward}) == 5


# Catches: the comparison with the held-out problems left out of draw_problem; _key without sorted().
def test_no_held_out_problem_is_trained_on():
    few = {"num_numbers": [3], "max_number": 5, "min_target": 1, "max_target": 20, "test_size": 100}
    train, test = load_problems(data_config("synthetic", **few))
    held_out = {key(p) for p in test}
    assert len(held_out) == len(test) == 100
    drawn = {key(train[i]) for i in range(3000)}
    assert len(drawn) > 100
    assert not drawn & held_out


# ---------------------------------------------------------------- what is wrong with the data is said


def test_a_missing_dataset_says_how_to_fetch_it_and_how_to_do_without(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        load_problems(data_config(tmp_path / "nowhere"))
    message = str(caught.value)
    assert all(
        part in message for part in (str(tmp_path / "nowhere"), "hf download", "config_tiny.yaml")
    )


GOOD = '{"nums": [1, 2], "target": 3}\n'
BAD_JSONL = {  # text, test_size -> what the message holds
    "another column": (GOOD + '{"numbers": [1, 2], "target": 3}\n', 1, ["line 2", "nums"]),
    "no target": (GOOD * 2 + '{"nums": [1, 2]}\n', 1, ["line 3", "target"]),
    "not JSON": (GOOD * 4 + "nums: 1 2\n", 1, ["line 5", '"nums"']),
    "cut in the middle": (GOOD * 2 + GOOD[:15], 1, ["line 3"]),
    "a list": (GOOD + "[1, 2, 3]\n", 1, ["line 2"]),
    "a number": ("3\n" + GOOD, 1, ["line 1"]),
    "a float among the numbers": (
        GOOD + '{"nums": [1, 2.0], "target": 3}\n',
        1,
        ["line 2", "2.0", "integers"],
    ),
    "a float as target": (
        GOOD + '{"nums": [1, 2], "target": 3.0}\n',
        1,
        ["line 2", "3.0", "integer"],
    ),
    "text as target": (GOOD + '{"nums": [1, 2], "target": "3"}\n', 1, ["line 2", "'3'", "integer"]),
    "text as numbers": (
        GOOD + '{"nums": "1,2", "target": 3}\n',
        1,
        ["line 2", "'1,2'", "integers"],
    ),
    "a truth value": (
        GOOD + '{"nums": [1, true], "target": 3}\n',
        1,
        ["line 2", "True", "integers"],
    ),
    "no numbers": (GOOD + '{"nums": [], "target": 3}\n', 1, ["line 2", "[]"]),
    "null": (GOOD + '{"nums": null, "target": 3}\n', 1, ["line 2", "None"]),
    "empty": ("", 1, ["no rows"]),
    "blank": ("\n \n", 1, ["no rows"]),
    "all of it held out": (GOOD * 3, 3, ["3 problems", "data.test_size=3", "lower"]),
    "more held out than there is": (GOOD * 3, 8, ["3 problems", "data.test_size=8", "lower"]),
}


@pytest.mark.parametrize(("text", "test_size", "wanted"), BAD_JSONL.values(), ids=BAD_JSONL)
def test_bad_jsonl_is_named(tmp_path, text, test_size, wanted):
    path = tmp_path / "problems.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match="problems") as caught:
        load_problems(data_config(path, test_size=test_size))
    assert [part for part in [str(path), *wanted] if part not in str(caught.value)] == []


def test_bad_parquet_is_named(tmp_path):
    write_parquet(tmp_path / "columns", "train.parquet", {"numbers": [[1, 2]], "target": [3]})
    write_parquet(
        tmp_path / "floats", "train.parquet", {"nums": [[1, 2], [1.0, 2.5]], "target": [3, 3]}
    )
    write_parquet(tmp_path / "rows", "train.parquet", {"nums": [[1, 2]], "target": [3]})
    for name, content in (("damaged", b"PAR1 and so on"), ("cut", b"")):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data/train.parquet").write_bytes(content)
    (tmp_path / "hollow").mkdir()
    for name, wanted in {
        "columns": ["train.parquet", "nums", "target"],
        "damaged": ["train.parquet", "fetch"],
        "cut": ["train.parquet", "fetch"],
        "floats": ["row 1", "1.0", "integers"],
        "rows": ["1 problems", "data.test_size=8"],
    }.items():
        with pytest.raises(ValueError, match=name) as caught:
            load_problems(data_config(tmp_path / name))
        assert [part for part in wanted if part not in str(caught.value)] == []
    with pytest.raises(FileNotFoundError, match=r"hollow.*data/\*\.parquet"):
        load_problems(data_config(tmp_path / "hollow"))


def test_impossible_synthetic_problems_are_refused():
    with pytest.raises(
        ValueError, match=r"beside 7 held-out.*data\.max_number=2.*lower data\.test_size=10"
    ):
        load_problems(
            data_config(
                "synthetic", num_numbers=[2], max_number=2, min_target=1, max_target=4, test_size=10
            )
        )
    with pytest.raises(ValueError, match=r"data\.min_target=50.*data\.max_number=3.*widen"):
        load_problems(
            data_config("synthetic", num_numbers=[2], max_number=3, min_target=50, max_target=60)
        )


def test_holding_out_every_synthetic_problem_is_refused():
    # 1 + 1, 1 * 1, 1 / 1; 2 + 2, 2 * 2, 2 / 2; 1 + 2, 2 - 1, 2 * 1, 2 / 1: seven different problems with targets 1..4
    every = {"num_numbers": [2], "max_number": 2, "min_target": 1, "max_target": 4}
    train, test = load_problems(data_config("synthetic", **every, test_size=7))
    assert len(test) == 7
    with pytest.raises(ValueError, match=r"beside 7 held-out problems"):
        train[0]


def test_a_file_with_only_held_out_problems_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "problems.jsonl", [([1, 2], 3), ([2, 1], 3)])
    with pytest.raises(ValueError, match=r"problems\.jsonl"):
        load_problems(data_config(path, test_size=1))


def test_synthetic_problems_end():
    train, _ = load_problems(data_config("synthetic"))
    assert train[-1] == train[len(train) - 1]
    with pytest.raises(IndexError):
        train[len(train)]


def test_a_file_that_is_no_utf_8_is_named(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(GOOD.encode() + b"\xff\n")
    with pytest.raises(ValueError, match=r"problems\.jsonl"):
        load_problems(data_config(path, test_size=1))


def test_a_line_separator_inside_a_string_does_not_end_the_line(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(
        '{"nums": [1, 2], "target": 3, "note": "a\u2028b"}\n{"nums": [4, 5], "target": 9}\n',
        encoding="utf-8",
    )
    assert len(load_problems(data_config(path, test_size=1))[0]) == 1


def test_a_wrong_type_is_named_by_its_line(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text("\n\n" + GOOD + '{"nums": [1, 2.0], "target": 3}\n')
    with pytest.raises(ValueError, match="line 4"):
        load_problems(data_config(path, test_size=1))


def test_megabytes_of_answers_are_scored_in_time():
    call_within_limit("</think>" + "<answer></answer>" * 120_000)


def test_white_space_is_the_same_everywhere_in_an_answer():
    assert answer_reward("\u00a01 + 2", [1, 2], 3) == answer_reward("1\u00a0+ 2", [1, 2], 3)
