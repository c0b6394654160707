"""What a step and an evaluation report, as pure functions of the episodes. docs/metrics.md defines every name."""

import math
from statistics import fmean, pstdev

from data_types import Episode, UpdateStats


def step_metrics(episodes: list[Episode], stats: UpdateStats, *, learning_rate: float, num_answers: int) -> dict[str, float]:
    """Everything that a step computed. Statistics of answers are over all of them, unfinished ones included."""
    rewards = [e.reward.total for e in episodes]
    groups = [rewards[i : i + num_answers] for i in range(0, len(rewards), num_answers)]
    lengths = [len(e.response_token_ids) for e in episodes]
    finished = [len(e.response_token_ids) for e in episodes if e.is_finished]
    parts = {name for e in episodes for name in e.reward.parts}
    metrics = {
        "reward": fmean(rewards),
        "reward_std": fmean(pstdev(group) if all(map(math.isfinite, group)) else math.nan for group in groups),
        "frac_reward_zero_std": fmean(float(len(set(group)) == 1) for group in groups),
        **{f"rewards/{name}": fmean(e.reward.parts.get(name, 0.0) for e in episodes) for name in sorted(parts)},
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": fmean(finished) if finished else 0.0,
        "completions/clipped_ratio": 1 - len(finished) / len(episodes),
        "entropy": sum(e.entropy * n for e, n in zip(episodes, lengths, strict=True)) / sum(lengths),
        "loss": stats.loss,
        "grad_norm": stats.grad_norm,
        "learning_rate": learning_rate,
        "num_tokens": stats.num_tokens,
        "sampling/logp_difference_mean": stats.logprob_diff_mean,
        "sampling/logp_difference_max": stats.logprob_diff_max,
        "weights_changed": stats.weights_changed,
        "weights_changed_fp32": stats.weights_changed_fp32,
    }
    if stats.skipped:
        metrics |= {"skipped": stats.skipped, "skipped_questions": stats.broken_questions}
    return metrics


def evaluation_metrics(episodes: list[Episode]) -> dict[str, float]:
    """The part "answer" of the reward is what counts as success."""
    successes = sum(e.reward.parts.get("answer", 0.0) == 1.0 for e in episodes)
    low, high = wilson_interval(successes, len(episodes))
    return {
        "eval/success": successes / len(episodes),
        "eval/success_low": low,
        "eval/success_high": high,
        "eval/reward": fmean(e.reward.total for e in episodes),
        "eval/mean_length": fmean(len(e.response_token_ids) for e in episodes),
        "eval/finished": fmean(float(e.is_finished) for e in episodes),
        "eval/questions": len(episodes),
    }


def wilson_interval(successes: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % confidence interval of a share (Wilson, JASA 22, 1927); it stays within 0..1 and holds near both ends."""
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def pick_samples(episodes: list[Episode], advantages: list[float], prompts: list[str]) -> list[dict]:
    """The best, the worst and the longest answer of a step, as samples.jsonl keeps them."""
    chosen = {
        "best": max(range(len(episodes)), key=lambda i: episodes[i].reward.total),
        "worst": min(range(len(episodes)), key=lambda i: episodes[i].reward.total),
        "longest": max(range(len(episodes)), key=lambda i: len(episodes[i].response_token_ids)),
    }
    return [
        {"kind": kind, "question": prompts[episodes[i].question_id], "text": episodes[i].text,
         "reward": episodes[i].reward.total, "parts": episodes[i].reward.parts, "advantage": advantages[i],
         "length": len(episodes[i].response_token_ids), "finished": episodes[i].is_finished}
        for kind, i in chosen.items()
    ]  # fmt: skip
