"""What a step and an evaluation report, as pure functions of the episodes. docs/metrics.md defines every name."""

import math
from collections import Counter
from fractions import Fraction
from statistics import fmean, mean, pstdev, pvariance

import numpy as np

from data_types import Episode, UpdateStats

MISMATCH = 0.1  # nats; bf16 rounding alone stays well below
UNCOUNTED = (
    'no reward has a part "answer", so success cannot be counted and is shown as nan or 0 %: let the task return '
    'Reward(total, {"answer": 1.0}) for a solved question, and 0.0 for another'
)


def step_metrics(
    episodes: list[Episode], stats: UpdateStats, *, learning_rate: float, num_answers: int
) -> dict[str, float]:
    """Everything that a step computed. Statistics of answers are over all of them, unfinished ones included."""
    rewards = [e.reward.total for e in episodes]
    groups = [rewards[i : i + num_answers] for i in range(0, len(rewards), num_answers)]
    lengths = [len(e.response_token_ids) for e in episodes]
    finished = [len(e.response_token_ids) for e in episodes if e.is_finished]
    parts = {name for e in episodes for name in e.reward.parts}
    skipped = (
        {"skipped": stats.skipped, "skipped_questions": stats.broken_questions}
        if stats.skipped
        else {}
    )
    return {
        "reward": sum(rewards) / len(rewards),  # fmean refuses infinities of both signs
        "reward_std": fmean(
            pstdev(group) if all(map(math.isfinite, group)) else math.nan for group in groups
        ),
        "frac_reward_zero_std": fmean(float(len(set(group)) == 1) for group in groups),
        **{
            f"rewards/{name}": fmean(e.reward.parts.get(name, 0.0) for e in episodes)
            for name in sorted(parts)
        },
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": fmean(finished) if finished else 0.0,
        "completions/clipped_ratio": 1 - len(finished) / len(episodes),
        "entropy": sum(e.entropy * n for e, n in zip(episodes, lengths, strict=True))
        / sum(lengths),
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "learning_rate": learning_rate,
        "num_tokens": stats.num_tokens,
        "sampling/logp_difference_mean": stats.logprob_diff_mean,
        "sampling/logp_difference_max": stats.logprob_diff_max,
        "weights_changed": stats.weights_changed,
        "weights_changed_fp32": stats.weights_changed_fp32,
        **skipped,
    }


def pick_samples(
    episodes: list[Episode], advantages: list[float], prompts: list[str]
) -> list[dict]:
    """The best, the worst and the longest answer of a step, as samples.jsonl keeps them."""
    scored = list(zip(episodes, advantages, strict=True))
    chosen = {
        "best": max(scored, key=lambda pair: pair[0].reward.total),
        "worst": min(scored, key=lambda pair: pair[0].reward.total),
        "longest": max(scored, key=lambda pair: len(pair[0].response_token_ids)),
    }
    return [
        {
            "kind": kind,
            "question": prompts[e.question_id],
            "text": e.text,
            "reward": e.reward.total,
            "parts": e.reward.parts,
            "advantage": advantage,
            "length": len(e.response_token_ids),
            "finished": e.is_finished,
        }
        for kind, (e, advantage) in chosen.items()
    ]


def smells(recent: list[dict[str, float]]) -> set[str]:
    """What the last twenty steps' metrics (newest last) suggest is wrong, in words that say what to try."""
    found = set()
    if len(recent) == 20 and all(m["frac_reward_zero_std"] == 1 for m in recent):
        found.add(
            "for 20 steps every group had equal rewards, so nothing was learned: the task is too easy or too hard for this "
            "model, or the groups are too small; look at samples.jsonl, and try a larger training.batch_size"
        )
    if not recent[-1].keys() & {"rewards/answer", "rewards/error"}:
        found.add(UNCOUNTED)
    if recent[-1]["completions/clipped_ratio"] == 1:
        found.add(
            "no answer finished: raise training.max_gen_len, or look at samples.jsonl for answers that run in circles"
        )
    if recent[-1]["sampling/logp_difference_mean"] > MISMATCH:
        found.add(
            f"sampler and trainer differ by more than {MISMATCH} nats a token: they no longer are the same policy; try "
            "model.dtype=float32, and report it if that does not help"
        )
    return found


# ---------------------------------------------------------------- evaluations


def evaluation_metrics(episodes: list[Episode]) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in outcome(episodes).items()}


def model_summary(episodes: list[Episode], kinds: list[str]) -> dict:
    """What evaluate.py reports of a model; kinds: of each problem, as its task calls them."""
    samples, counts = len(episodes) // len(kinds), success_counts(episodes)
    ks = sorted({samples, *(2**i for i in range(samples.bit_length()))})
    return {
        **outcome(episodes),
        "samples": samples,
        "by_kind": {
            kind: outcome([e for e in episodes if kinds[e.question_id] == kind])
            for kind in sorted(set(kinds))
        },
        "pass_at": {k: fmean(pass_at_k(samples, count, k) for count in counts) for k in ks},
    }


def outcome(episodes: list[Episode]) -> dict[str, float]:
    """Equally many answers to each question; the part "answer" of the reward is what counts as success."""
    counts = success_counts(episodes)
    low, high = success_interval(counts, len(episodes) // len(counts))
    return {
        "success": sum(counts) / len(episodes),
        "success_low": low,
        "success_high": high,
        "reward": fmean(e.reward.total for e in episodes),
        "mean_length": fmean(len(e.response_token_ids) for e in episodes),
        "finished": fmean(float(e.is_finished) for e in episodes),
        "questions": len(counts),
    }


def success_counts(episodes: list[Episode]) -> list[int]:
    """How many answers to each question succeeded, in the order of the questions' ids."""
    counts = Counter()
    for episode in episodes:
        counts[episode.question_id] += episode.reward.parts.get("answer", 0.0) == 1.0
    return [counts[question_id] for question_id in sorted(counts)]


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, JASA 22, 1927); it stays within 0..1 and holds near both ends."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def success_interval(successes: list[int], samples: int) -> tuple[float, float]:
    """95 % interval of the success rate, from how many of `samples` answers to each question succeeded.

    Answers to one question resemble each other: the Wilson interval is taken at the number of independent answers that would
    spread as the questions' means do (Kish's design effect; Franco et al., J. Survey Stat. Methodol. 7, 2019). Counted in
    fractions, so that with one sample it is the Wilson interval to the bit.
    """
    rates = [Fraction(count, samples) for count in successes]
    share = mean(rates)
    binomial = share * (1 - share)
    spread = max(
        pvariance(rates), binomial / samples
    )  # of one question's mean: never less than independent answers have
    effective = len(rates) * binomial / spread if spread else len(rates)
    return wilson_interval(float(share * effective), float(effective))


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers succeeds (Chen et al. 2021, arXiv:2107.03374, eq. 1)."""
    return 1 - math.comb(samples - successes, k) / math.comb(samples, k)


def paired_p_value(differences: list[int]) -> float:
    """Two-sided p of "both models are equally good", from (successes of one - successes of the other) on each question.

    Fisher's randomisation test (The Design of Experiments, 1935, section 21): if they are equally good, each difference
    might as well have had the other sign; the distribution of the sum over all choices is exact. With one sample: McNemar's test.
    """
    bound = sum(map(abs, differences))
    chances = np.zeros(2 * bound + 1)  # of each sum in -bound..bound
    chances[bound] = 1.0
    for difference in differences:
        chances = (
            np.roll(chances, difference) + np.roll(chances, -difference)
        ) / 2  # sums so far keep clear of the ends
    as_extreme = np.abs(np.arange(-bound, bound + 1)) >= abs(sum(differences))
    return min(1.0, float(chances[as_extreme].sum()))


def compare_models(first: list[Episode], second: list[Episode]) -> dict:
    """The second model against the first, on the same questions with equally many answers."""
    differences = [
        b - a for a, b in zip(success_counts(first), success_counts(second), strict=True)
    ]
    return {
        "difference": sum(differences) / len(first),
        "questions_better": sum(d > 0 for d in differences),
        "questions_worse": sum(d < 0 for d in differences),
        "p": paired_p_value(differences),
    }
