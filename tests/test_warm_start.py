"""The traces that the small base model imitates: right in every number, honest in every verdict, in the right format."""

import random
import re
from collections import Counter
from fractions import Fraction

import pytest

from countdown_task import reward_function
from warm_start import all_attempts, make_trace

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def value(a: int, operation: str, b: int) -> Fraction:
    return {"+": Fraction(a + b), "-": Fraction(a - b), "*": Fraction(a * b), "/": Fraction(a, b) if b else None}[operation]


def problems(count: int):
    """Numbers and a target that some attempt reaches; zeros and equal numbers included."""
    rng = random.Random(0)
    while count:
        numbers = [rng.randint(0, 10) for _ in range(3)]
        reached = sorted({v for group in all_attempts(numbers).values() for _, _, v in group})
        yield numbers, rng.choice(reached)
        count -= 1


@pytest.fixture(scope="module")
def traces():
    rng = random.Random(1)
    return [(n, t, make_trace(all_attempts(n), t, rng)) for n, t in problems(400) for _ in range(5)]


def test_every_equation_is_right_and_uses_each_number_once(traces):
    # Catches: `abs` forgotten in a difference; the third number mistaken for one of the first two; MAX_VALUE not held.
    for numbers, _, trace in traces:
        for line in trace.split("</think>")[0].split("\n")[1:]:
            first, *others = EQUATION.findall(line)
            left = Counter(numbers) - Counter([int(first[0]), int(first[2])])
            assert sum(left.values()) == 1, (numbers, line)
            for a, operation, b, result in (first, *others):
                assert value(int(a), operation, int(b)) == int(result) <= 50, (numbers, line)
            for a, _, b, _ in others:
                assert Counter([int(a), int(b)]) == left + Counter([int(first[3])]), (numbers, line)


def test_every_verdict_is_honest_and_the_last_decides(traces):
    # Catches: `yes` where the value is not the target; a trace that goes on after a hit.
    for _, target, trace in traces:
        verdicts = re.findall(r"= (\d+), want (\d+): (yes|no)", trace)
        assert all(int(want) == target and (int(got) == target) == (verdict == "yes") for got, want, verdict in verdicts)
        assert "yes" not in [verdict for _, _, verdict in verdicts[:-1]]
        assert ("I give up" in trace) == (verdicts[-1][2] == "no")


def test_the_answer_is_the_last_attempt_and_scores_as_the_verdict_says(traces):
    # Catches: the parentheses around the first step dropped; the answer of another attempt.
    for numbers, target, trace in traces:
        reward = reward_function(trace, numbers, target)
        assert reward.parts == {"format": 1.0, "answer": float("yes" in trace)}, trace


def test_no_first_step_comes_twice(traces):
    # Catches: rng.sample -> rng.choices.
    for _, _, trace in traces:
        firsts = re.findall(r"\n ([^;]*);", trace)
        assert len(firsts) == len(set(firsts)) >= 1


def test_a_base_model_gives_up_more_often_than_not(traces):
    hits = sum("yes" in trace for _, _, trace in traces) / len(traces)
    assert 0.3 < hits < 0.6
