"""What a step and an evaluation report, computed from episodes; docs/metrics.md explains it."""

import math
from collections import Counter
from fractions import Fraction
from statistics import fmean, mean, pstdev, pvariance

import numpy as np

from data_types import Episode, UpdateStats

MISMATCH = 0.1  # nats per token; rounding in bfloat16 alone stays well below
RECENT_STEPS = 20  # how many steps diagnose() sees at most
MAX_SAMPLE = 10_000  # characters of a prompt or an answer that samples.jsonl holds
UNCOUNTED = (
    'no reward has a part "answer", so success cannot be counted and is shown as "-" or 0 %: '
    'let the task return Reward(total, {"answer": 1.0}) for a correct answer, else 0.0'
)


def step_metrics(
    episodes: list[Episode],
    stats: UpdateStats,
    *,
    learning_rate: float,
    num_answers: int,
    weights_changed: float,
    weights_changed_fp32: float,
) -> dict[str, float]:
    """The line of a step in metrics.jsonl. Unfinished answers count in every mean over answers."""
    rewards = [e.reward.total for e in episodes]
    groups = [rewards[i : i + num_answers] for i in range(0, len(rewards), num_answers)]
    stds = [pstdev(g) if all(map(math.isfinite, g)) else math.nan for g in groups]
    parts = sorted({name for e in episodes for name in e.reward.parts})
    lengths = [len(e.response_token_ids) for e in episodes]
    finished = [len(e.response_token_ids) for e in episodes if e.is_finished]
    entropies = [e.entropy * n for e, n in zip(episodes, lengths, strict=True)]
    metrics = {
        "reward": sum(rewards) / len(rewards),  # fmean raises on inf and -inf together
        "reward_std": fmean(stds),
        "frac_reward_zero_std": fmean(float(len(set(group)) == 1) for group in groups),
        **{f"rewards/{p}": fmean(e.reward.parts.get(p, 0.0) for e in episodes) for p in parts},
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": fmean(finished) if finished else 0.0,
        "completions/clipped_ratio": 1 - len(finished) / len(episodes),
        "entropy": sum(entropies) / sum(lengths),
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "learning_rate": learning_rate,
        "num_tokens": stats.num_tokens,
        "sampling/logp_difference_mean": stats.logprob_diff_mean,
        "sampling/logp_difference_max": stats.logprob_diff_max,
        "weights_changed": weights_changed,
        "weights_changed_fp32": weights_changed_fp32,
    }
    if stats.skipped:
        metrics |= {"skipped": stats.skipped, "skipped_questions": stats.broken_questions}
    return metrics


def pick_samples(
    episodes: list[Episode], advantages: list[float], prompts: list[str]
) -> list[dict]:
    """The best, the worst and the longest answer of a step, as lines of samples.jsonl.

    Of a long text, the middle is left out.
    """
    scored = list(zip(episodes, advantages, strict=True))
    chosen = {
        "best": max(scored, key=lambda pair: pair[0].reward.total),
        "worst": min(scored, key=lambda pair: pair[0].reward.total),
        "longest": max(scored, key=lambda pair: len(pair[0].response_token_ids)),
    }
    samples = []
    for kind, (e, advantage) in chosen.items():
        sample = {"kind": kind, "question": shorten(prompts[e.question_id]), "advantage": advantage}
        samples.append(sample | answer_record(e) | {"text": shorten(e.text)})
    return samples


def shorten(text: str) -> str:
    if (left_out := len(text) - MAX_SAMPLE) <= 0:
        return text
    half = MAX_SAMPLE // 2
    return f"{text[:half]} [… {left_out:,} characters …] {text[-half:]}"


def keeps_samples(step: int) -> bool:
    """Whether samples.jsonl holds this step, so that it stays small in a run of any length.

    It holds every step below 1,000, every tenth from there on, every hundredth from 10,000 on, etc.
    """
    return step % 10 ** max(0, len(str(step)) - 3) == 0


def answer_record(episode: Episode) -> dict:
    """One answer as a log or a report holds it."""
    return {
        "text": episode.text,
        "reward": episode.reward.total,
        "parts": episode.reward.parts,
        "length": len(episode.response_token_ids),
        "finished": episode.is_finished,
    }


def diagnose(recent: list[dict[str, float]]) -> set[str]:
    """Warnings, with advice. recent: metrics of at most RECENT_STEPS steps, newest last."""
    found, newest = set(), recent[-1]
    if len(recent) == RECENT_STEPS and all(m["frac_reward_zero_std"] == 1 for m in recent):
        found.add(
            f"for {RECENT_STEPS} steps all answers to each question had equal rewards, so nothing "
            "was learned: the task is too easy or too hard for this model, or the groups are too "
            "small; look at samples.jsonl, and try a larger training.batch_size"
        )
    if not newest.keys() & {"rewards/answer", "rewards/error"}:
        found.add(UNCOUNTED)
    if newest["completions/clipped_ratio"] == 1:
        found.add(
            "no answer finished: raise training.max_gen_len, or look in samples.jsonl for answers "
            "that repeat themselves"
        )
    if newest["sampling/logp_difference_mean"] > MISMATCH:
        found.add(
            f"the log-probabilities of sampler and trainer differ by more than {MISMATCH} nats per "
            "token, so the gradient is not that of the policy that sampled; try "
            "model.dtype=float32, and report it if that does not help"
        )
    return found


# ---------------------------------------------------------------- evaluations


def evaluation_metrics(episodes: list[Episode]) -> dict[str, float]:
    return {f"eval/{name}": value for name, value in outcome(episodes).items()}


def model_summary(episodes: list[Episode], kinds: list[str]) -> dict:
    """What evaluate.py reports about a model; kinds holds the kind of each problem."""
    samples, counts = len(episodes) // len(kinds), success_counts(episodes)
    ks = sorted({samples, *(2**i for i in range(samples.bit_length()))})
    by_kind = {
        kind: outcome([e for e in episodes if kinds[e.question_id] == kind])
        for kind in sorted(set(kinds))
    }
    pass_at = {k: fmean(pass_at_k(samples, count, k) for count in counts) for k in ks}
    return outcome(episodes) | {"samples": samples, "by_kind": by_kind, "pass_at": pass_at}


def outcome(episodes: list[Episode]) -> dict[str, float]:
    """Success, its 95 % interval and more; every question must have the same number of answers."""
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


def succeeded(episode: Episode) -> bool:
    return episode.reward.parts.get("answer", 0.0) == 1.0


def success_counts(episodes: list[Episode]) -> list[int]:
    """The number of successful answers to each question, ordered by question_id."""
    counts = Counter()
    for episode in episodes:
        counts[episode.question_id] += succeeded(episode)
    return [counts[question_id] for question_id in sorted(counts)]


def wilson_interval(successes: float, trials: float, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a success rate (Wilson, JASA 22, 1927).

    It stays within 0..1 and keeps its coverage for rates near 0 and 1.
    """
    rate = successes / trials
    centre = rate + z * z / (2 * trials)
    spread = z * math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def success_interval(successes: list[int], samples: int) -> tuple[float, float]:
    """95 % interval of the success rate, from the successes among `samples` answers per question.

    Answers to the same question are correlated. This is the Wilson interval for the effective
    sample size: the number of independent answers whose mean would vary as much (Kish's design
    effect; Franco et al., J. Survey Stat. Methodol. 7, 2019). Fractions make it exactly
    wilson_interval if samples is 1.
    """
    rates = [Fraction(count, samples) for count in successes]
    rate = mean(rates)
    binomial = rate * (1 - rate)
    variance = max(pvariance(rates), binomial / samples)  # at least that of independent answers
    effective = len(rates) * binomial / variance if variance else len(rates)
    return wilson_interval(float(rate * effective), float(effective))


def pass_at_k(samples: int, successes: int, k: int) -> float:
    """Unbiased estimate of the chance that one of k answers succeeds (arXiv:2107.03374, eq. 1)."""
    return 1 - math.comb(samples - successes, k) / math.comb(samples, k)


def paired_p_value(differences: list[int]) -> float:
    """Two-sided p-value of "both models are equally good".

    differences: for each question, the successes of one model minus those of the other. The test
    is Fisher's exact randomisation test (The Design of Experiments, 1935, section 21): under the
    hypothesis each difference has either sign with equal chance. With one sample per question it is
    McNemar's exact test.
    """
    bound = sum(map(abs, differences))
    chances = np.zeros(2 * bound + 1)  # of each possible sum, from -bound to bound
    chances[bound] = 1.0
    for difference in differences:  # np.roll wraps only zeros around: no sum exceeds bound
        chances = (np.roll(chances, difference) + np.roll(chances, -difference)) / 2
    as_extreme = np.abs(np.arange(-bound, bound + 1)) >= abs(sum(differences))
    return min(1.0, float(chances[as_extreme].sum()))


def compare_models(first: list[Episode], second: list[Episode]) -> dict:
    """The second model minus the first: same questions, same number of answers to each."""
    pairs = zip(success_counts(first), success_counts(second), strict=True)
    differences = [b - a for a, b in pairs]
    return {
        "difference": sum(differences) / len(first),
        "questions_better": sum(d > 0 for d in differences),
        "questions_worse": sum(d < 0 for d in differences),
        "p": paired_p_value(differences),
    }
