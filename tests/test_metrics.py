"""The numbers that a step and an evaluation report, against values worked by hand and brute force."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest

from data_types import Episode, Reward, UpdateStats
from harness.metrics import (
    compare_models,
    evaluation_metrics,
    model_summary,
    paired_p_value,
    pass_at_k,
    pick_samples,
    smells,
    step_metrics,
    success_counts,
    success_interval,
    wilson_interval,
)

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution, from a table


def episode(
    question_id=0, *, length=3, total=0.0, finished=True, text="", entropy=0.0, **parts
) -> Episode:
    return Episode(
        question_id=question_id,
        prompt_token_ids=[1, 2],
        response_token_ids=[5] * length,
        response_logprobs=[-1.0] * length,
        is_finished=finished,
        text=text,
        reward=Reward(total, parts),
        entropy=entropy,
    )


# ---------------------------------------------------------------- intervals


def score_bounds(share: float, trials: float) -> tuple[float, float]:
    """Where |share - p| = Z sqrt(p (1 - p) / trials), on either side of the share, by bisection."""

    def edge(inside: float, outside: float) -> float:
        for _ in range(200):
            p = (inside + outside) / 2
            if abs(share - p) < Z * math.sqrt(p * (1 - p) / trials):
                inside = p
            else:
                outside = p
        return inside

    return (edge(share, 0.0) if share else 0.0), (edge(share, 1.0) if share < 1 else 1.0)


# Catches: 4 * trials * trials turned into 4 * trials; the scale left out; z * z turned into z.
@pytest.mark.parametrize(
    ("successes", "trials"),
    [
        (0, 1),
        (1, 1),
        (1, 2),
        (0, 10),
        (3, 7),
        (10, 10),
        (128, 256),
        (1, 256),
        (255, 256),
        (153, 997),
    ],
)
def test_the_wilson_interval_solves_the_score_equation(successes, trials):
    assert wilson_interval(successes, trials) == pytest.approx(
        score_bounds(successes / trials, trials), abs=2e-6
    )


def test_the_wilson_interval_by_hand():
    # No success in ten: 0 to z² / (n + z²) = 3.8415 / 13.8415. Half of ten: 1/2 ± z / (2 sqrt(n + z²)) = 1/2 ± 0.26341.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)


def test_intervals_stay_within_0_and_1_and_hold_the_share():
    for trials in (1, 2, 3, 10, 256, 100_000):
        for successes in {0, 1, trials // 3, trials - 1, trials}:
            low, high = wilson_interval(successes, trials)
            assert 0.0 <= low < high <= 1.0
            assert low - 1e-12 <= successes / trials <= high + 1e-12


# Catches: a loss of the questions' own number: samples of one question counted as if they were independent.
def test_an_interval_of_several_samples_knows_that_they_resemble_each_other():
    one = [1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1]
    for successes in range(
        50
    ):  # to the bit: evaluate.py gives the figures of a run's evaluation again
        assert success_interval([1] * successes + [0] * (49 - successes), 1) == wilson_interval(
            successes, 49
        )
    assert success_interval([4 * c for c in one], 4) == pytest.approx(
        wilson_interval(7, 11)
    )  # four times the same answer
    # Each question half solved, as independent answers would never be: no more is claimed than for 22 independent answers.
    assert success_interval([1] * 11, 2) == pytest.approx(wilson_interval(11, 22))
    # Rates 0, 1/2, 1 have mean 1/2 and variance 1/6 (independent pairs: 1/8): worth 3 (1/4) / (1/6) = 4.5 answers.
    assert success_interval([0, 1, 2], 2) == pytest.approx(score_bounds(0.5, 4.5), abs=2e-6)
    assert success_interval([0] * 5, 8) == pytest.approx(wilson_interval(0, 5))
    assert success_interval([8] * 5, 8) == pytest.approx(wilson_interval(5, 5))


# ---------------------------------------------------------------- pass@k and the comparison of two models


# Catches: k and samples swapped; the complement left out.
@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_choices_that_hold_a_success(samples):
    for successes in range(samples + 1):
        answers = [1] * successes + [0] * (samples - successes)
        for k in range(1, samples + 1):
            choices = [any(choice) for choice in itertools.combinations(answers, k)]
            assert pass_at_k(samples, successes, k) == pytest.approx(
                sum(choices) / len(choices), abs=1e-12
            )


def every_choice_of_signs(differences: list[int]) -> float:
    sums = [abs(sum(signed)) for signed in itertools.product(*[(d, -d) for d in differences])]
    return float(Fraction(sum(s >= abs(sum(differences)) for s in sums), len(sums)))


# Catches: >= turned into >; one side counted; the absolute value left out.
@pytest.mark.parametrize(
    "differences",
    [
        [0],
        [1],
        [-1],
        [1, 1, 1, 1, 1],
        [1, -1, 1, -1],
        [0, 0, 3, -1, 2],
        [-4, 1, 1, 2],
        [5, 3, -2, 7, 1, 1, -1, 0],
        [-2] * 9,
    ],
)
def test_the_p_value_is_that_of_every_choice_of_signs(differences):
    assert paired_p_value(differences) == pytest.approx(
        every_choice_of_signs(differences), abs=1e-12
    )
    assert paired_p_value([-d for d in differences]) == pytest.approx(
        paired_p_value(differences), abs=1e-12
    )


def test_the_p_value_with_one_sample_is_mcnemars():
    # 8 questions better, 2 worse, 30 equal: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 2 * 56 / 1024
    assert paired_p_value([1] * 8 + [-1] * 2 + [0] * 30) == pytest.approx(112 / 1024, abs=1e-12)
    assert paired_p_value([0] * 5) == 1.0


def two_models() -> tuple[list[Episode], list[Episode]]:
    """Three questions, two answers each; successes 0, 1, 2 and 2, 1, 1."""
    first, second = [], []
    for question_id, (a, b) in enumerate([((0, 0), (1, 1)), ((1, 0), (0, 1)), ((1, 1), (1, 0))]):
        first += [episode(question_id, answer=float(x), total=x + 0.1, length=4) for x in a]
        second += [
            episode(question_id, answer=float(x), total=float(x), length=6, finished=bool(x))
            for x in b
        ]
    return first, second


def test_two_models_are_compared_question_by_question():
    first, second = two_models()
    assert success_counts(first) == [0, 1, 2]
    assert success_counts(second[::-1]) == [2, 1, 1]
    # differences 2, 0, -1: of the signs ± 2 ± 1, each sum is at least 1 in size
    assert compare_models(first, second) == {
        "difference": 1 / 6,
        "questions_better": 1,
        "questions_worse": 1,
        "p": 1.0,
    }
    assert compare_models(second, first)["difference"] == -1 / 6


def test_the_summary_of_a_model():
    _, second = two_models()
    summary = model_summary(second, ["three", "two", "three"])
    (low, high), (low_2, high_2), (low_3, high_3) = (
        success_interval(counts, 2) for counts in ([2, 1, 1], [1], [2, 1])
    )
    assert list(summary["by_kind"].items()) == [
        (
            "three",
            {
                "questions": 2,
                "success": 0.75,
                "success_low": low_3,
                "success_high": high_3,
                "reward": 0.75,
                "mean_length": 6.0,
                "finished": 0.75,
            },
        ),
        (
            "two",
            {
                "questions": 1,
                "success": 0.5,
                "success_low": low_2,
                "success_high": high_2,
                "reward": 0.5,
                "mean_length": 6.0,
                "finished": 0.5,
            },
        ),
    ]
    assert summary["pass_at"] == {1: pytest.approx(4 / 6), 2: 1.0}
    assert {k: summary[k] for k in ("questions", "samples", "success_low", "success_high")} == {
        "questions": 3,
        "samples": 2,
        "success_low": low,
        "success_high": high,
    }
    assert [summary[k] for k in ("success", "reward", "mean_length", "finished")] == pytest.approx(
        [4 / 6, 4 / 6, 6.0, 4 / 6]
    )
    assert model_summary(second, [""] * 3)["by_kind"] == {
        "": {k: summary[k] for k in summary["by_kind"]["two"]}
    }  # a task without


# ---------------------------------------------------------------- a step

STATS = UpdateStats(
    loss=-0.25,
    grad_norm=1.5,
    num_tokens=9,
    logprob_diff_mean=1e-3,
    logprob_diff_max=2e-2,
    weights_changed=0.5,
    weights_changed_fp32=0.75,
)


def step() -> list[Episode]:
    return [
        episode(0, length=2, total=1.1, entropy=0.5, format=1.0, answer=1.0),
        episode(0, length=7, total=0.1, entropy=2.0, format=1.0, answer=0.0),
        episode(1, length=5, total=0.0, entropy=1.0, format=0.0, answer=0.0, finished=False),
        episode(1, length=4, total=0.0, entropy=0.0, format=0.0, answer=0.0),
    ]


# Catches: pstdev turned into stdev (0.707 in the first group); the deviation taken over the whole batch; entropy averaged
# over answers instead of tokens (0.875); mean_terminated_length over all answers (4.5).
def test_the_metrics_of_a_step_by_hand():
    metrics = step_metrics(step(), STATS, learning_rate=3e-4, num_answers=2)
    assert metrics == pytest.approx(
        {
            "reward": 0.3,  # 1.2 / 4
            "reward_std": 0.25,  # (0.5 + 0) / 2
            "frac_reward_zero_std": 0.5,
            "rewards/answer": 0.25,
            "rewards/format": 0.5,
            "completions/mean_length": 4.5,
            "completions/min_length": 2,
            "completions/max_length": 7,
            "completions/mean_terminated_length": 13 / 3,
            "completions/clipped_ratio": 0.25,
            "entropy": 20 / 18,  # (2 * 0.5 + 7 * 2 + 5 * 1 + 4 * 0) / 18
            "loss": -0.25,
            "grad_norm": 1.5,
            "learning_rate": 3e-4,
            "num_tokens": 9,
            "sampling/logp_difference_mean": 1e-3,
            "sampling/logp_difference_max": 2e-2,
            "weights_changed": 0.5,
            "weights_changed_fp32": 0.75,
        }
    )


def test_a_step_in_which_nothing_ended():
    episodes = [episode(finished=False, total=0.0), episode(finished=False, total=1.0)]
    metrics = step_metrics(episodes, STATS, learning_rate=1e-6, num_answers=2)
    assert metrics["completions/mean_terminated_length"] == 0.0
    assert metrics["completions/clipped_ratio"] == 1.0


def test_a_step_that_was_skipped_says_why():
    assert (
        not {"skipped", "skipped_questions"}
        & step_metrics(step(), STATS, learning_rate=1e-6, num_answers=2).keys()
    )
    stats = UpdateStats(
        loss=math.nan,
        grad_norm=0.0,
        num_tokens=0,
        skipped="the loss is not finite",
        broken_questions=[1],
    )
    metrics = step_metrics(step(), stats, learning_rate=1e-6, num_answers=2)
    assert metrics["skipped"] == "the loss is not finite"
    assert metrics["skipped_questions"] == [1]


def test_a_part_that_only_some_answers_have_counts_zero_for_the_others():
    episodes = [episode(error=1.0), episode(format=1.0), episode(), episode(format=1.0)]
    metrics = step_metrics(episodes, STATS, learning_rate=1e-6, num_answers=4)
    assert (metrics["rewards/error"], metrics["rewards/format"]) == (0.25, 0.5)


# Catches: the test for finite rewards left out of reward_std (statistics raises on a NaN).
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_no_number_shows_and_does_not_crash(broken):
    episodes = [
        episode(0, total=1.0),
        episode(0, total=broken),
        episode(1, total=1.0),
        episode(1, total=1.0),
    ]
    metrics = step_metrics(episodes, STATS, learning_rate=1e-6, num_answers=2)
    assert not math.isfinite(metrics["reward"])
    assert math.isnan(metrics["reward_std"])
    assert metrics["frac_reward_zero_std"] == 0.5


# ---------------------------------------------------------------- an evaluation, samples


def test_the_metrics_of_an_evaluation_by_hand():
    episodes = [*step(), episode(2, length=2, total=1.0, answer=1.0, format=0.0)]
    metrics = evaluation_metrics(
        [replace(answer, question_id=i) for i, answer in enumerate(episodes)]
    )  # one to each question
    low, high = score_bounds(0.4, 5)
    assert metrics == pytest.approx(
        {
            "eval/success": 0.4,
            "eval/success_low": low,
            "eval/success_high": high,
            "eval/reward": 0.44,
            "eval/mean_length": 4.0,
            "eval/finished": 0.8,
            "eval/questions": 5,
        },
        abs=2e-6,
    )
    assert evaluation_metrics([episode(error=1.0), episode()])["eval/success"] == 0.0


# Catches: max and min swapped; the advantage of another answer; the prompt looked up by the answer's place.
def test_the_best_the_worst_and_the_longest_answer_are_kept():
    episodes = [
        episode(0, length=3, total=0.1, text="a", format=1.0),
        episode(0, length=9, total=0.5, text="longest", finished=False),
        episode(1, length=5, total=1.1, text="best", answer=1.0, format=1.0),
        episode(1, length=2, total=-1.0, text="worst", error=1.0),
    ]
    samples = pick_samples(episodes, [0.5, -0.25, 1.5, -1.75], ["first?", "second?"])
    assert samples == [
        {
            "kind": "best",
            "question": "second?",
            "text": "best",
            "reward": 1.1,
            "parts": {"answer": 1.0, "format": 1.0},
            "advantage": 1.5,
            "length": 5,
            "finished": True,
        },
        {
            "kind": "worst",
            "question": "second?",
            "text": "worst",
            "reward": -1.0,
            "parts": {"error": 1.0},
            "advantage": -1.75,
            "length": 2,
            "finished": True,
        },
        {
            "kind": "longest",
            "question": "first?",
            "text": "longest",
            "reward": 0.5,
            "parts": {},
            "advantage": -0.25,
            "length": 9,
            "finished": False,
        },
    ]


def test_of_equals_the_first_is_kept():
    assert [
        s["text"] for s in pick_samples([episode(text="a"), episode(text="b")], [0.0, 0.0], ["?"])
    ] == ["a", "a", "a"]


def test_a_smell_is_named_with_what_to_try():
    fine = {
        "frac_reward_zero_std": 0.5,
        "completions/clipped_ratio": 0.1,
        "sampling/logp_difference_mean": 1e-3,
        "rewards/answer": 0.0,
    }
    uncounted = {name: value for name, value in fine.items() if name != "rewards/answer"}
    assert smells([fine] * 20) == smells([uncounted | {"rewards/error": 1.0}]) == set()
    equal = fine | {"frac_reward_zero_std": 1.0}
    assert (
        smells([equal] * 19)
        == smells([equal] * 19 + [fine])
        == smells([fine] + [equal] * 19)
        == set()
    )
    for changed, wanted in (
        ([equal] * 20, "training.batch_size"),
        ([fine, fine | {"completions/clipped_ratio": 1.0}], "training.max_gen_len"),
        ([fine, fine | {"sampling/logp_difference_mean": 0.11}], "model.dtype"),
        ([uncounted], '{"answer": 1.0}'),
    ):
        (warning,) = smells(changed)
        assert wanted in warning
