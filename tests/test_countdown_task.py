"""The reward against its definition, an independent evaluator and hostile text; problems against
brute force."""

import ast
import json
import operator
import random
import re
import shutil
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import countdown_task
from countdown_task import Data, load_problems, reward_function
from data_types import Reward

PUBLISHED = Path(__file__).parent.parent / "../shared/countdown/countdown_cd3_test.jsonl"
REPEATABLE = settings(max_examples=300, deadline=None, derandomize=True)
OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}


def answer_reward(expression: str, numbers: list[int], target: int) -> float:
    return reward_function(f" so</think>\n<answer>{expression}</answer>", numbers, target).parts[
        "answer"
    ]


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
    "less-than signs outside tags": ("1 < 2 > 0 <b> < think></think>\n<answer>1 < 2</answer>", 1),
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


# Catches: any of the four tags left out of TAG; parts[2], parts[6] or `.strip()` left out of
# _is_well_formed; `\Z` left out of STOP_TOKEN.
@pytest.mark.parametrize(("response", "expected"), FORMAT.values(), ids=FORMAT)
def test_format_reward(response, expected):
    assert reward_function(response, [1, 2], 3).parts["format"] == expected


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
    "sign at the start": ("-2 + 5", [2, 5], 3, 1),
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
    "digits apart": ("1 2", [12], 12, 0),
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
    "minus sign U+2212": ("5 − 2", [5, 2], 3, 0),
    "full-width digits": ("１ + 2", [1, 2], 3, 0),
    "superscript": ("1 + 2²", [1, 2], 3, 0),
    "arabic digits": ("١ + 2", [1, 2], 3, 0),
    "open parenthesis": ("(1 + 2", [1, 2], 3, 0),
    "closed parenthesis": ("1 + 2)", [1, 2], 3, 0),
    "crossed parentheses": (")1 + 2(", [1, 2], 3, 0),
    "operator at the end": ("1 + 2 +", [1, 2], 3, 0),
    "operator at the start": ("* 1 + 2", [1, 2], 3, 0),
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


# Catches: float(value) for Fraction(value) ("exact where floats are not"); values[left] and
# values[right] swapped; a comparison of sets of numbers; EXPRESSION without its clause on leading
# zeros; int() around the value; `-values[operand]` without its sign; `if type(op) in OPERATORS`
# left out.
@pytest.mark.parametrize(
    ("expression", "numbers", "target", "expected"), ANSWER.values(), ids=ANSWER
)
def test_answer_reward(expression, numbers, target, expected):
    assert answer_reward(expression, numbers, target) == expected


WHICH_ANSWER = {  # response -> answer reward for the numbers 1 and 2 and the target 3
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


# Catches: a search from the start of the response; the first answer taken instead of the last;
# rpartition instead of partition at "</think>".
@pytest.mark.parametrize(("response", "expected"), WHICH_ANSWER.values(), ids=WHICH_ANSWER)
def test_the_last_answer_after_the_first_closed_thinking_counts(response, expected):
    assert reward_function(response, [1, 2], 3).parts["answer"] == expected


# Catches: 1.0 * well_formed; the format reward multiplied by the answer reward.
@pytest.mark.parametrize(
    ("response", "form", "answer", "total"),
    [
        ("x</think>\n<answer>1+2</answer>", 1.0, 1.0, 1.1),
        ("x</think>\n<answer>2-1</answer>", 1.0, 0.0, 0.1),
        ("x</think> so <answer>1+2</answer>", 0.0, 1.0, 1.0),
        ("1+2", 0.0, 0.0, 0.0),
    ],
)
def test_the_total_is_answer_plus_a_tenth_of_format(response, form, answer, total):
    reward = reward_function(response, [1, 2], 3)
    assert reward.parts == {"format": form, "answer": answer}
    assert reward.total == pytest.approx(total, abs=1e-12)


def test_the_numbers_may_come_in_any_sequence():
    response = "x</think>\n<answer>(5 - 3) * 7</answer>"
    for numbers in ((7, 5, 3), [3, 5, 7], range(3, 8, 2)):
        assert reward_function(response, numbers, 14).parts["answer"] == 1


def test_a_no_break_space_is_not_white_space():
    assert answer_reward("\u00a01 + 2", [1, 2], 3) == answer_reward("1\u00a0+ 2", [1, 2], 3) == 0


# ---------------------------------------------------------------- an independent evaluator


def tree_value(tree) -> Fraction | None:
    """The value of a number, ("-", a) or ("*", a, b), or None if it divides by zero."""
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
    """The tree as text, with all parentheses that it needs, a few others, and white space."""
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


# Catches: any change of precedence, associativity, order of operands or scope of a sign.
@REPEATABLE
@given(seed=st.integers(0, 2**32), numbers=st.lists(st.integers(0, 30), min_size=1, max_size=6))
def test_an_expression_has_the_value_of_the_tree_that_it_was_made_from(seed, numbers):
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
    """The value by Python's grammar in exact arithmetic, or None if it is not an expression."""
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


# Catches: `case ast.expr()` left out of _value, which would then raise on "2(3)"; `"".join` instead
# of `" ".join`.
@pytest.mark.filterwarnings("ignore::SyntaxWarning")  # Python's parser on "2(3)"
@REPEATABLE
@given(
    st.lists(st.sampled_from([*"+-*/()", " ", *"0123", "12", "+", "*"]), max_size=9).map("".join)
)
def test_any_string_of_tokens_has_the_value_that_python_gives_it(text):
    value = python_value(text)
    numbers = [int(digits) for digits in re.findall("[0-9]+", text)]
    for target in {value, Fraction(3)} - {None}:
        assert answer_reward(text, numbers, target) == float(value == target), (text, target)


# ---------------------------------------------------------------- hostile text

TAGS = "<think> </think> <answer> </answer> < > </ answer> </answer <|im_end|> <|endoftext|>"
PIECES = "3 5 7 3*5+7 (3*5)+7 ** // _ . = , e9 0x {} %s 9**9**9 __import__('os')"
FRAGMENTS = [
    *TAGS.split(),
    *PIECES.split(),
    *"0123456789+-*/() \n\t\r\\'\"",
    *"\0\ud800\udfff\u202e\u200b\ufeff\u00a0\u2028\x1c１²٣½−×é思🤔",
    *("9" * 25, "(" * 70, ")" * 70, "-" * 300),
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
def test_no_text_raises(response):
    reward = reward_function(response, (3, 5, 7), 22)
    assert {*reward.parts.values()} <= {0.0, 1.0}


def answer(text: str) -> str:
    return f"</think>\n<answer>{text}</answer>"


# Each builds a text of about n characters.
HOSTILE = {
    "digits": lambda n: answer("9" * n),
    "white space": lambda n: answer(" " * n),
    "signs": lambda n: answer("-" * n + "3"),
    "words": lambda n: answer("word " * (n // 5)),
    "products": lambda n: answer("*".join(["9" * 20] * (n // 21))),
    "powers": lambda n: answer("**".join(["99"] * (n // 4))),
    "opened parentheses": lambda n: answer("(" * n),
    "closed parentheses": lambda n: answer(")" * n),
    "nested parentheses": lambda n: answer("(" * (n // 2) + "3*5+7" + ")" * (n // 2)),
    "text after the answer": lambda n: answer("3*5+7") + "y" * n,
    "text before the answer": lambda n: "y" * n + answer("3*5+7"),
    "null characters": lambda n: "\0" * n,
    "opened thoughts": lambda n: "<think>" * (n // 7),
    "closed thoughts": lambda n: "</think>" * (n // 8),
    "opened answers": lambda n: "</think>" + "<answer>" * (n // 8),
    "closed answers": lambda n: "</think>" + "</answer>" * (n // 9),
    "many answers": lambda n: "</think>" + "<answer></answer>" * (n // 17),
    "tags in turn": lambda n: "<think></think><answer></answer>" * (n // 32),
    "halves of a tag": lambda n: "</think><answer>" + "</answe" * (n // 7),
    "stop tokens": lambda n: "<|im_end|>" * (n // 10),
}
DEEP = {
    "as many parentheses as fit": answer("(" * 497 + "3*5+7" + ")" * 497),
    "as many signs as fit": answer("3*5+" + "-+" * 496 + "7"),
}


def cpu_seconds(response: str) -> float:
    """CPU time of one call, the smallest of five."""
    times = []
    for _ in range(5):
        start = time.thread_time()
        reward_function(response, (3, 5, 7), 22)
        times.append(time.thread_time() - start)
    return min(times)


# Catches: a search for tags that begins again at every tag. Quadratic work would take 100 times as
# long, linear work takes 10 times as long.
@pytest.mark.parametrize("make", HOSTILE.values(), ids=HOSTILE)
def test_the_work_grows_in_proportion_to_the_text(make):
    assert cpu_seconds(make(100_000)) < 40 * cpu_seconds(make(10_000))


# Catches: MAX_EXPRESSION_CHARS left out; the numbers compared after the arithmetic.
def test_only_short_expressions_of_the_given_numbers_are_parsed_and_computed(monkeypatch):
    parsed, computed = [], []
    original_parse, original_value = ast.parse, countdown_task._value

    def parse(text, **keywords):
        parsed.append(text)
        return original_parse(text, **keywords)

    def value(tree):
        computed.append(tree)
        return original_value(tree)

    monkeypatch.setattr(countdown_task, "ast", SimpleNamespace(**vars(ast) | {"parse": parse}))
    monkeypatch.setattr(countdown_task, "_value", value)
    for make in HOSTILE.values():
        for n in (500, 100_000):
            reward_function(make(n), (3, 5, 7), 22)
    assert 0 < len(parsed) <= 2 * len(HOSTILE)
    assert max(map(len, parsed)) <= 1000
    assert {ast.unparse(tree) for tree in computed} == {"3 * 5 + 7"}


def test_only_honest_answers_score_in_hostile_company():
    odd = {
        "null character": answer("3\0*5+7"),
        "lone surrogate": answer("3*5+7\ud800"),
        "lone surrogates outside": "\udfff" + answer("3*5+7") + "\ud800",
        "right-to-left mark": answer("\u202e3*5+7"),
        "byte order mark": answer("\ufeff3*5+7"),
        "full-width digits": answer("３*５+７"),
        "a number of 21 digits": answer("3*5+" + "7" * 21),
    }
    texts = {name: make(100_000) for name, make in HOSTILE.items()} | DEEP | odd
    earned = {
        name for name, text in texts.items() if reward_function(text, [3, 5, 7], 22).parts["answer"]
    }
    assert earned == {
        "text before the answer",
        "text after the answer",
        "as many signs as fit",
        "lone surrogates outside",
    }


# Catches: RecursionError left out of _is_solution's except. Python 3.11 counts its own frames
# against its parser's limit.
def test_nothing_is_raised_at_any_depth_of_the_call_stack():
    def call(depth: int) -> Reward:
        if depth:
            return call(depth - 1)
        return reward_function(DEEP["as many signs as fit"], [3, 5, 7], 22)

    for depth in (0, 400, 700, 850):
        assert call(depth).parts["format"] == 1


def test_depth_and_length_have_room_for_any_honest_answer():
    assert answer_reward("(" * 30 + "3*5+7" + ")" * 30, [3, 5, 7], 22) == 1
    assert answer_reward("3 * 5 + 7" + " " * 900, [3, 5, 7], 22) == 1
    # Catches: _value by recursion with a limit. Parentheses side by side are not deep.
    assert answer_reward("+".join(["(1)"] * 200), [1] * 200, 200) == 1


@pytest.mark.slow
def test_100_000_hostile_texts_do_not_raise():
    rng = random.Random(0)
    for i in range(100_000):
        parts = rng.choices(FRAGMENTS, k=rng.randrange(40))
        if i % 2:
            parts = ["</think>\n<answer>", *parts, "</answer>"]
        if i % 100 == 0:
            parts *= rng.randrange(1, 400)
        if i % 5 == 0:
            parts += map(chr, (rng.randrange(0x110000) for _ in range(5)))
        reward = reward_function("".join(parts), (3, 5, 7), 22)
        assert {*reward.parts.values()} <= {0.0, 1.0}


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
    """An expression of all the numbers that equals the target, found by trying every one."""

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
def test_the_published_problems_load_and_their_solutions_get_the_full_reward(tmp_path):
    published = [json.loads(line) for line in PUBLISHED.read_text().splitlines()]
    rows = [([int(n) for n in row["input"].split(",")], int(row["output"])) for row in published]
    train, test = load_problems(
        data_config(write_jsonl(tmp_path / "published.jsonl", [([1, 1], 2), *rows]), test_size=256)
    )
    assert len(test) == 256
    assert list(train) == [{"numbers": [1, 1], "target": 2}]
    assert [(p["numbers"], p["target"]) for p in test] == rows
    solutions = [solve(**problem) for problem in test]
    assert all(solutions)
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


# Catches: sorted() or the target left out of _key; the first rows held out instead of the last.
def test_the_last_rows_are_held_out_and_their_equals_are_not_trained_on(tmp_path):
    train, test = load_problems(
        data_config(write_jsonl(tmp_path / "problems.jsonl", ROWS), test_size=2)
    )
    assert list(test) == [{"numbers": [2, 1, 3], "target": 6}, {"numbers": [4, 5], "target": 9}]
    assert list(train) == [{"numbers": [4, 5], "target": 20}, {"numbers": [7, 8, 9], "target": 24}]


def test_blank_lines_other_columns_and_line_separators_in_strings_do_no_harm(tmp_path):
    path = tmp_path / "problems.jsonl"
    lines = [
        "",
        '{"nums": [1, 2], "target": 3, "source": "é\u2028"}',
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


def test_synthetic_problems_are_solvable_and_in_range():
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


# Catches: one generator for all items, which would make an item depend on those drawn before it.
def test_a_synthetic_problem_depends_only_on_its_index_and_the_seed():
    first, first_test = load_problems(data_config("synthetic"))
    again, again_test = load_problems(data_config("synthetic"))
    other, other_test = load_problems(data_config("synthetic", synthetic_seed=6))
    indices = [0, 1, 7, 100, 499_999]
    forward, backward = [first[i] for i in indices], [again[i] for i in reversed(indices)]
    assert forward == backward[::-1]
    assert forward == [first[i] for i in indices]
    assert forward != [other[i] for i in indices]
    assert first_test == again_test
    assert first_test != other_test
    assert len(first) == 500_000
    assert len({key(p) for p in forward}) == 5


# Catches: the comparison with the held-out problems left out of draw_problem.
def test_no_held_out_problem_is_trained_on():
    few = {"num_numbers": [3], "max_number": 5, "min_target": 1, "max_target": 20, "test_size": 100}
    train, test = load_problems(data_config("synthetic", **few))
    held_out = {key(p) for p in test}
    assert len(held_out) == len(test) == 100
    drawn = {key(train[i]) for i in range(3000)}
    assert len(drawn) > 100
    assert not drawn & held_out


def test_a_slice_of_synthetic_problems_is_a_list():
    train, _ = load_problems(data_config("synthetic"))
    assert train[:3] == [train[0], train[1], train[2]]
    assert train[499_998:] == [train[-2], train[-1]]
    with pytest.raises(IndexError):
        train[len(train)]


# ---------------------------------------------------------------- error messages


def test_a_missing_dataset_says_how_to_fetch_it_and_how_to_do_without(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere") as caught:
        load_problems(data_config(tmp_path / "nowhere"))
    assert "hf download" in str(caught.value)
    assert "config_tiny.yaml" in str(caught.value)


GOOD = '{"nums": [1, 2], "target": 3}\n'


def row(nums: str, target: str) -> str:
    return GOOD + f'{{"nums": {nums}, "target": {target}}}\n'


BAD_JSONL = {  # the file, data.test_size and what the message must contain
    "another column": (GOOD + '{"numbers": [1, 2], "target": 3}\n', 1, ["line 2", "nums"]),
    "no target": (GOOD * 2 + '{"nums": [1, 2]}\n', 1, ["line 3", "target"]),
    "not JSON": (GOOD * 4 + "nums: 1 2\n", 1, ["line 5", '"nums"']),
    "after blank lines": ("\n\n" + row("[1, 2.0]", "3"), 1, ["line 4"]),
    "cut in the middle": (GOOD * 2 + GOOD[:15], 1, ["line 3"]),
    "not UTF-8": (GOOD + "\udcff\n", 1, []),
    "a list": (GOOD + "[1, 2, 3]\n", 1, ["line 2"]),
    "a number": ("3\n" + GOOD, 1, ["line 1"]),
    "a float among the numbers": (row("[1, 2.0]", "3"), 1, ["line 2", "2.0", "integers"]),
    "a float as target": (row("[1, 2]", "3.0"), 1, ["line 2", "3.0", "integer"]),
    "text as target": (row("[1, 2]", '"3"'), 1, ["line 2", "'3'", "integer"]),
    "text as numbers": (row('"1,2"', "3"), 1, ["line 2", "'1,2'", "integers"]),
    "a truth value": (row("[1, true]", "3"), 1, ["line 2", "True", "integers"]),
    "no numbers": (row("[]", "3"), 1, ["line 2", "[]"]),
    "null": (row("null", "3"), 1, ["line 2", "None"]),
    "empty": ("", 1, ["no rows"]),
    "blank": ("\n \n", 1, ["no rows"]),
    "all held out": (GOOD * 3, 3, ["3 problems", "data.test_size=3", "lower"]),
    "more held out than there are": (GOOD * 3, 8, ["3 problems", "data.test_size=8", "lower"]),
    "all equal to a held-out one": (row("[2, 1]", "3"), 1, ["2 problems", "add problems"]),
}


@pytest.mark.parametrize(("text", "test_size", "expected"), BAD_JSONL.values(), ids=BAD_JSONL)
def test_what_is_wrong_with_a_jsonl_file_is_named(tmp_path, text, test_size, expected):
    path = tmp_path / "problems.jsonl"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match="problems") as caught:
        load_problems(data_config(path, test_size=test_size))
    assert [part for part in [str(path), *expected] if part not in str(caught.value)] == []


def test_rows_of_a_test_split_are_not_trained_on(tmp_path):
    # Catches: all parquet files of a dataset put together.
    write_parquet(tmp_path, "train-0.parquet", {"nums": [[1, 2], [3, 4]], "target": [3, 7]})
    write_parquet(tmp_path, "test-0.parquet", {"nums": [[5, 6], [7, 8]], "target": [11, 15]})
    train, test = load_problems(data_config(tmp_path, test_size=1))
    assert [*train, *test] == [{"numbers": [1, 2], "target": 3}, {"numbers": [3, 4], "target": 7}]


ADDITION = {"nums": [[1, 2], [3, 4]], "target": [3, 7]}


@pytest.mark.parametrize("names", ["train-0 test-0", "gsm_train gsm_test", "0000_train valid"])
def test_a_split_is_told_by_the_word_in_its_name(names, tmp_path):
    # Catches: any folder or file whose name begins with "train", train_sets included.
    directory = tmp_path / "train_sets"
    for name in names.split():
        rows = ADDITION if "train" in name else {"nums": [[5, 6]], "target": [11]}
        write_parquet(tmp_path / name, "rows.parquet", rows)
        directory.mkdir(exist_ok=True)
        (tmp_path / name / "data/rows.parquet").rename(directory / f"{name}.parquet")
    for name in names.split():
        shutil.rmtree(tmp_path / name)
    train, test = load_problems(data_config(tmp_path, test_size=1))
    assert [problem["target"] for problem in [*train, *test]] == [3, 7]


def test_a_folder_data_that_is_a_link_is_read_and_other_folders_are_not(tmp_path):
    # Catches: rglob alone, which does not follow links.
    write_parquet(tmp_path / "real", "train-0.parquet", ADDITION)
    write_parquet(tmp_path / "dataset/other", "train-0.parquet", {"nums": [[5]], "target": [5]})
    (tmp_path / "dataset/data").symlink_to(tmp_path / "real/data")
    train, test = load_problems(data_config(tmp_path / "dataset", test_size=1))
    assert [problem["target"] for problem in [*train, *test]] == [3, 7]


@pytest.mark.parametrize("folder", ["", "main", "default/train"])
def test_parquet_files_are_found_anywhere_below_the_directory(folder, tmp_path):
    # Catches: only data/*.parquet; the splits told apart by the file's name alone.
    write_parquet(tmp_path / "written", "0000.parquet", ADDITION)
    (tmp_path / "dataset" / folder).mkdir(parents=True)
    file = tmp_path / "dataset" / folder / "0000.parquet"
    (tmp_path / "written/data/0000.parquet").rename(file)
    if folder == "default/train":
        write_parquet(tmp_path / "dataset/default/test", "0000.parquet", ADDITION)
    wanted = [{"numbers": [1, 2], "target": 3}, {"numbers": [3, 4], "target": 7}]
    for path in (tmp_path / "dataset", file):  # a single file may be named, too
        train, test = load_problems(data_config(path, test_size=1))
        assert [*train, *test] == wanted


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("name", ["list.json", "lines.json", "lines.jsonl"])
def test_a_list_and_lines_of_json_are_read_with_and_without_a_byte_order_mark(name, mark, tmp_path):
    rows = [{"nums": n, "target": t} for n, t in zip(*ADDITION.values(), strict=True)]
    lines = "\n".join(map(json.dumps, rows))
    text = json.dumps(rows, indent=1) if name.startswith("list") else lines
    (tmp_path / name).write_text(mark + text, encoding="utf-8")
    train, test = load_problems(data_config(tmp_path / name, test_size=1))
    assert [*train, *test] == [{"numbers": [1, 2], "target": 3}, {"numbers": [3, 4], "target": 7}]


def test_data_that_cannot_be_read_is_named_with_what_can(tmp_path):
    for name in ("rows.jsonl.gz", "rows.csv", "rows.zip"):
        (tmp_path / name).write_bytes(b"\x1f\x8b")
        with pytest.raises(ValueError, match=rf"{name} is not a \.jsonl, .*unpack or convert it"):
            load_problems(data_config(tmp_path / name))
    with pytest.raises(FileNotFoundError, match=r"has no parquet files; it holds rows\.csv, rows"):
        load_problems(data_config(tmp_path))
    for folder in ("main", "socratic"):
        write_parquet(tmp_path / folder, "train.parquet", ADDITION)
    with pytest.raises(ValueError, match=r"in .*main/data and .*socratic/data; set data\.path"):
        load_problems(data_config(tmp_path))
    (tmp_path / "numbers.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"numbers\.json, row 1: nums and target missing"):
        load_problems(data_config(tmp_path / "numbers.json"))


def test_what_is_wrong_with_a_parquet_file_is_named(tmp_path):
    columns = {
        "columns": {"numbers": [[1, 2]], "target": [3]},
        "floats": {"nums": [[1, 2], [1.0, 2.5]], "target": [3, 3]},
        "rows": {"nums": [[1, 2]], "target": [3]},
    }
    for name, content in columns.items():
        write_parquet(tmp_path / name, "train.parquet", content)
    for name, content in (("damaged", b"PAR1 and so on"), ("cut", b"")):
        (tmp_path / name / "data").mkdir(parents=True)
        (tmp_path / name / "data/train.parquet").write_bytes(content)
    for name, expected in {
        "columns": ["train.parquet", "nums", "target"],
        "damaged": ["train.parquet", "fetch"],
        "cut": ["train.parquet", "fetch"],
        "floats": ["row 1", "1.0", "integers"],
        "rows": ["1 problems", "data.test_size=8"],
    }.items():
        with pytest.raises(ValueError, match=name) as caught:
            load_problems(data_config(tmp_path / name))
        assert [part for part in expected if part not in str(caught.value)] == []
    (tmp_path / "hollow").mkdir()
    with pytest.raises(FileNotFoundError, match=r"hollow has no parquet files; it holds nothing"):
        load_problems(data_config(tmp_path / "hollow"))


PAIRS = {"num_numbers": [2], "max_number": 2, "min_target": 1, "max_target": 4}


def test_a_range_without_enough_problems_is_refused():
    # 1 + 1, 1 * 1, 1 / 1; 2 + 2, 2 * 2, 2 / 2; 1 + 2, 2 - 1, 2 * 1, 2 / 1: seven different problems
    # with targets 1..4.
    train, test = load_problems(data_config("synthetic", **PAIRS, test_size=7))
    assert len(test) == 7
    with pytest.raises(ValueError, match="besides 7 held-out ones"):
        train[0]
    with pytest.raises(ValueError, match=r"besides 7 .*data\.max_number=2.*data\.test_size=10"):
        load_problems(data_config("synthetic", **PAIRS, test_size=10))
    with pytest.raises(ValueError, match=r"data\.max_number=2.*data\.min_target=50.*widen"):
        load_problems(data_config("synthetic", **PAIRS | {"min_target": 50, "max_target": 60}))
