"""The numbers that a step and an evaluation report, against values by hand and by brute force."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from data_types import Episode, Reward, UpdateStats
from harness.metrics import (
    compare_models,
    diagnose,
    evaluation_metrics,
    keeps_samples,
    model_summary,
    paired_p_value,
    pass_at_k,
    pick_samples,
    step_metrics,
    success_counts,
    success_interval,
    wilson_interval,
)

METRICS_PAGE = Path(__file__).parent.parent / "docs/metrics.md"
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
    """The two p at which |share - p| = Z sqrt(p (1 - p) / trials), by bisection."""

    def edge(inside: float, outside: float) -> float:
        for _ in range(200):
            p = (inside + outside) / 2
            if abs(share - p) < Z * math.sqrt(p * (1 - p) / trials):
                inside = p
            else:
                outside = p
        return inside

    return (edge(share, 0.0) if share else 0.0), (edge(share, 1.0) if share < 1 else 1.0)


# Catches: 4 * trials * trials -> 4 * trials; "/ scale" left out; z * z -> z.
@pytest.mark.parametrize(
    ("successes", "trials"),
    [(0, 1), (1, 1), (1, 2), (0, 10), (3, 7), (10, 10), (128, 256), (1, 256), (153, 997)],
)
def test_the_wilson_interval_solves_the_score_equation(successes, trials):
    expected = score_bounds(successes / trials, trials)
    assert wilson_interval(successes, trials) == pytest.approx(expected, abs=2e-6)


def test_the_wilson_interval_by_hand():
    # No success in ten: 0 to z² / (n + z²) = 3.8415 / 13.8415.
    # Half of ten: 1/2 ± z / (2 sqrt(n + z²)) = 1/2 ± 0.26341.
    assert wilson_interval(0, 10) == pytest.approx((0.0, 0.27753), abs=1e-5)
    assert wilson_interval(10, 10) == pytest.approx((0.72247, 1.0), abs=1e-5)
    assert wilson_interval(5, 10) == pytest.approx((0.23659, 0.76341), abs=1e-5)


def test_intervals_stay_within_0_and_1_and_contain_the_rate():
    for trials in (1, 2, 3, 10, 256, 100_000):
        for successes in {0, 1, trials // 3, trials - 1, trials}:
            low, high = wilson_interval(successes, trials)
            assert 0.0 <= low < high <= 1.0
            assert low - 1e-12 <= successes / trials <= high + 1e-12


# Catches: samples of one question counted as if they were independent; max(...) left out.
def test_the_interval_accounts_for_correlated_answers():
    for successes in range(50):  # exactly, so that evaluate.py repeats the figures of a run
        rates = [1] * successes + [0] * (49 - successes)
        assert success_interval(rates, 1) == wilson_interval(successes, 49)
    # Four equal answers to each of 11 questions are worth 11 answers.
    answers = [1, 0, 0, 1, 1, 0, 1, 1, 0, 1, 1]
    fourfold = success_interval([4 * a for a in answers], 4)
    assert fourfold == pytest.approx(wilson_interval(7, 11))
    # Each question exactly half solved: not more certain than 22 independent answers.
    assert success_interval([1] * 11, 2) == pytest.approx(wilson_interval(11, 22))
    # Rates 0, 1/2, 1: mean 1/2, variance 1/6 (independent pairs have 1/8), so they are worth
    # 3 (1/4) / (1/6) = 4.5 answers.
    assert success_interval([0, 1, 2], 2) == pytest.approx(score_bounds(0.5, 4.5), abs=2e-6)
    assert success_interval([0] * 5, 8) == pytest.approx(wilson_interval(0, 5))
    assert success_interval([8] * 5, 8) == pytest.approx(wilson_interval(5, 5))


# ---------------------------------------------------------------- pass@k, comparing two models


# Catches: k and samples swapped; "1 -" left out.
@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_choices_with_a_success(samples):
    for successes in range(samples + 1):
        answers = [1] * successes + [0] * (samples - successes)
        for k in range(1, samples + 1):
            choices = [any(choice) for choice in itertools.combinations(answers, k)]
            expected = sum(choices) / len(choices)
            assert pass_at_k(samples, successes, k) == pytest.approx(expected, abs=1e-12)


# Catches: >= -> >; np.abs or abs left out; np.roll in one direction only.
@pytest.mark.parametrize(
    "differences",
    [[0], [1], [-1], [1] * 5, [1, -1, 1, -1], [0, 0, 3, -1, 2], [-4, 1, 1, 2], [-2] * 9],
    ids=str,
)
def test_the_p_value_is_the_share_of_sign_choices_that_are_as_extreme(differences):
    choices = itertools.product(*[(d, -d) for d in differences])
    sums = [abs(sum(signed)) for signed in choices]
    expected = float(Fraction(sum(s >= abs(sum(differences)) for s in sums), len(sums)))
    assert paired_p_value(differences) == pytest.approx(expected, abs=1e-12)
    assert paired_p_value([-d for d in differences]) == pytest.approx(expected, abs=1e-12)


def test_with_one_sample_the_p_value_is_that_of_mcnemars_test():
    # 8 questions better, 2 worse, 30 equal: 2 (C(10,0) + C(10,1) + C(10,2)) / 2^10 = 2 * 56 / 1024
    assert paired_p_value([1] * 8 + [-1] * 2 + [0] * 30) == pytest.approx(112 / 1024, abs=1e-12)
    assert paired_p_value([0] * 5) == 1.0


def two_models() -> tuple[list[Episode], list[Episode]]:
    """Three questions, two answers each; successes per question: 0, 1, 2 and 2, 1, 1."""
    first, second = [], []
    for question_id, (a, b) in enumerate([((0, 0), (1, 1)), ((1, 0), (0, 1)), ((1, 1), (1, 0))]):
        first += [episode(question_id, answer=float(x), total=x + 0.1, length=4) for x in a]
        second += [
            episode(question_id, answer=float(x), total=float(x), length=6, finished=bool(x))
            for x in b
        ]
    return first, second


# Catches: a - b.
def test_two_models_are_compared_question_by_question():
    first, second = two_models()
    assert success_counts(first) == [0, 1, 2]
    assert success_counts(second[::-1]) == [2, 1, 1]
    # The differences are 2, 0 and -1. Every choice of signs of ± 2 ± 1 has a sum of 1 or more.
    comparison = {"difference": 1 / 6, "questions_better": 1, "questions_worse": 1, "p": 1.0}
    assert compare_models(first, second) == comparison
    assert compare_models(second, first)["difference"] == -1 / 6


def test_the_summary_of_a_model():
    _, second = two_models()
    summary = model_summary(second, ["three", "two", "three"])
    by_kind = summary["by_kind"]
    assert list(by_kind) == ["three", "two"]
    assert by_kind["three"] == outcome_by_hand([2, 1], success=0.75)
    assert by_kind["two"] == outcome_by_hand([1], success=0.5)
    assert summary["pass_at"] == {1: pytest.approx(4 / 6), 2: 1.0}
    assert summary["samples"] == 2
    assert model_summary(second, [""] * 3)["by_kind"].keys() == {""}
    assert {name: summary[name] for name in by_kind["two"]} == pytest.approx(
        outcome_by_hand([2, 1, 1], success=4 / 6)
    )


def outcome_by_hand(counts: list[int], *, success: float) -> dict:
    """Of the second model, whose reward and finished share equal its success rate."""
    low, high = success_interval(counts, 2)
    return {
        "success": success,
        "success_low": low,
        "success_high": high,
        "reward": success,
        "mean_length": 6.0,
        "finished": success,
        "questions": len(counts),
    }


# ---------------------------------------------------------------- a step

STATS = UpdateStats(
    loss=-0.25, grad_norm=1.5, num_tokens=9, logprob_diff_mean=1e-3, logprob_diff_max=2e-2
)


def metrics_of(episodes: list[Episode], stats: UpdateStats = STATS, *, num_answers: int = 2):
    return step_metrics(
        episodes,
        stats,
        learning_rate=3e-4,
        num_answers=num_answers,
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


# Catches: pstdev -> stdev (0.707 in the first group); one deviation over the whole batch; entropy
# averaged over answers, not tokens (0.875); mean_terminated_length over all answers (4.5).
def test_the_metrics_of_a_step_by_hand():
    assert metrics_of(step()) == pytest.approx(
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


def test_a_step_without_a_finished_answer():
    metrics = metrics_of([episode(finished=False, total=0.0), episode(finished=False, total=1.0)])
    assert metrics["completions/mean_terminated_length"] == 0.0
    assert metrics["completions/clipped_ratio"] == 1.0


def test_a_skipped_step_says_why():
    assert not {"skipped", "skipped_questions"} & metrics_of(step()).keys()
    stats = replace(STATS, skipped="the loss is not finite", broken_questions=[1])
    metrics = metrics_of(step(), stats)
    assert metrics["skipped"] == "the loss is not finite"
    assert metrics["skipped_questions"] == [1]


def test_a_part_that_an_answer_lacks_counts_as_zero():
    episodes = [episode(error=1.0), episode(format=1.0), episode(), episode(format=1.0)]
    metrics = metrics_of(episodes, num_answers=4)
    assert (metrics["rewards/error"], metrics["rewards/format"]) == (0.25, 0.5)


# Catches: the test for finite rewards left out of `stds` (statistics raises on a NaN).
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_reported(broken):
    totals = [1.0, broken, 1.0, 1.0]
    metrics = metrics_of([episode(i // 2, total=total) for i, total in enumerate(totals)])
    assert not math.isfinite(metrics["reward"])
    assert math.isnan(metrics["reward_std"])
    assert metrics["frac_reward_zero_std"] == 0.5


# Catches: max and min swapped; the advantage of another answer; prompts indexed by answer.
def test_the_best_the_worst_and_the_longest_answer_are_samples():
    episodes = [
        episode(0, length=3, total=0.1, text="a", format=1.0),
        episode(0, length=9, total=0.5, text="longest", finished=False),
        episode(1, length=5, total=1.1, text="best", answer=1.0),
        episode(1, length=2, total=-1.0, text="worst"),
    ]
    samples = pick_samples(episodes, [0.5, -0.25, 1.5, -1.75], ["first?", "second?"])
    kinds = [(s["kind"], s["text"], s["question"], s["advantage"]) for s in samples]
    assert kinds == [
        ("best", "best", "second?", 1.5),
        ("worst", "worst", "second?", -1.75),
        ("longest", "longest", "first?", -0.25),
    ]
    rest = [{k: s[k] for k in ("reward", "parts", "length", "finished")} for s in samples]
    assert rest[0] == {"reward": 1.1, "parts": {"answer": 1.0}, "length": 5, "finished": True}
    assert rest[2] == {"reward": 0.5, "parts": {}, "length": 9, "finished": False}


def test_among_equal_answers_the_first_is_the_sample():
    samples = pick_samples([episode(text="a"), episode(text="b")], [0.0, 0.0], ["?"])
    assert [sample["text"] for sample in samples] == ["a", "a", "a"]


FINE = {
    "frac_reward_zero_std": 0.5,
    "completions/clipped_ratio": 0.1,
    "sampling/logp_difference_mean": 1e-3,
    "rewards/answer": 0.0,
}
EQUAL = FINE | {"frac_reward_zero_std": 1.0}
UNCOUNTED = {name: value for name, value in FINE.items() if name != "rewards/answer"}


@pytest.mark.parametrize(
    ("recent", "advice"),
    [
        ([EQUAL] * 20, "training.batch_size"),
        ([FINE, FINE | {"completions/clipped_ratio": 1.0}], "training.max_gen_len"),
        ([FINE, FINE | {"sampling/logp_difference_mean": 0.11}], "model.dtype"),
        ([UNCOUNTED], '{"answer": 1.0}'),
    ],
    ids=["equal rewards", "unfinished", "mismatch", "uncounted"],
)
def test_a_diagnosis_says_what_to_try(recent, advice):
    (warning,) = diagnose(recent)
    assert advice in warning


@pytest.mark.parametrize(
    "recent",
    [
        [FINE] * 20,
        [EQUAL] * 19,
        [*[EQUAL] * 19, FINE],
        [FINE, *[EQUAL] * 19],
        [UNCOUNTED | {"rewards/error": 1.0}],
    ],
    ids=["fine", "only 19 steps", "newest differs", "oldest differs", "only errors"],
)
def test_there_is_no_diagnosis_without_a_reason(recent):
    assert diagnose(recent) == set()


# Catches: the middle kept; the count taken before the cut.
def test_of_a_long_answer_the_middle_is_left_out():
    text = 5000 * "a" + 1234 * "b" + 5000 * "c"
    for sample in pick_samples([episode(text=text), episode(text="d")], [0.0, 0.0], [text])[::2]:
        expected = 5000 * "a" + " [… 1,234 characters …] " + 5000 * "c"
        assert sample["text"] == sample["question"] == expected
    assert pick_samples([episode(text=10_000 * "a")], [0.0], ["?"])[0]["text"] == 10_000 * "a"


def test_the_samples_of_a_long_run_are_thinned_out():
    assert all(keeps_samples(step) for step in range(1000))
    assert [s for s in range(1000, 1030) if keeps_samples(s)] == [1000, 1010, 1020]
    assert [s for s in range(12_300, 12_600) if keeps_samples(s)] == [12_300, 12_400, 12_500]
    assert sum(map(keeps_samples, range(10**5))) == 1000 + 2 * 900


# ---------------------------------------------------------------- an evaluation, the docs


def test_the_metrics_of_an_evaluation_by_hand():
    answers = [*step(), episode(length=2, total=1.0, answer=1.0)]
    metrics = evaluation_metrics([replace(e, question_id=i) for i, e in enumerate(answers)])
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


def test_docs_metrics_explains_every_metric():
    page = METRICS_PAGE.read_text()
    stats = replace(STATS, skipped="a reason")
    episodes = [episode(total=r, answer=r, format=r, error=r) for r in (0.0, 1.0)]
    names = metrics_of(episodes, stats) | evaluation_metrics(episodes)
    assert len(names) > 25
    assert not {name for name in names if f"| `{name}`" not in page and f", `{name}`" not in page}
