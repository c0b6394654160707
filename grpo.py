"""Group Relative Policy Optimization: rollout -> advantages -> loss -> one policy-gradient step.

How this departs from the GRPO of DeepSeekMath (arXiv:2402.03300), and why:
1. One step a batch, so the policy that samples is the policy that learns: the importance ratio is 1 and needs no clip.
2. No KL term and no reference model (DAPO, arXiv:2503.14476): the reward is a rule, which cannot be exploited by drift.
3. Every response token of the batch weighs the same (DAPO's token-level loss); a mean per answer favours short ones.
4. Answers cut off by the length budget can be left out of the loss (DAPO's overlong filtering), but not out of the
   group's statistics: leaving them out there would shift the mean that the others are compared with.

Dimension key: N questions, M answers a question, P response tokens, C of a chunk, R of a block, E hidden size, V vocabulary.
"""

import math
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from data_types import Episode, Question, Reward, RolloutStats, UpdateStats
from generate import generate, log_probs
from packing import Row, attend_within, pack_rows
from qwen2_model import Transformer
from tokenizer import Tokenizer

# Logits of one chunk of the loss, counted in float32. Each chunk adds to the head's gradient once. In bf16 that rounds: over
# 40,000 tokens the gradient is off by 2.5 % at 64 MB and V = 151,936 and by 1.9 % at 160 MB, where the products themselves leave
# 1.3 %; a gradient is noisier than that by far.
LOGIT_CHUNK_BYTES = {"cpu": 64 * 1000**2, "cuda": 160 * 1000**2}
# Of a chunk, so much at a time becomes log-probabilities in float32 and then its gradient: on the CPU it stays in the cache.
LOGIT_BLOCK_BYTES = {"cpu": 5 * 1000**2, "cuda": 40 * 1000**2}


def rollout(
    model: Transformer,
    tokenizer: Tokenizer,
    questions: list[Question],
    *,
    num_answers: int,
    max_gen_len: int,
    temperature: float,
    reward_function: Callable[..., Reward],
    generator: torch.Generator,
    cache_bytes: int | None = None,
    progress: Callable[[int, int], None] = lambda ended, steps: None,
    on_stats: Callable[[RolloutStats], None] = lambda stats: None,
) -> list[Episode]:
    """Sample num_answers answers to each question and score them (steps 2 and 3 of the algorithm in the README).

    Answer j to question i is episode i * num_answers + j, with question_id i. Every answer has the same budget of
    max_gen_len response tokens, whatever its prompt's length. cache_bytes, progress: see generate.
    """
    samples, stats = generate(
        model, [q.prompt_token_ids for q in questions], num_answers=num_answers, max_gen_len=max_gen_len,
        temperature=temperature, vocab_size=tokenizer.vocab_size, stop_ids=tokenizer.stop_ids, generator=generator,
        cache_bytes=cache_bytes, progress=progress,
    )  # fmt: skip
    clock = time.perf_counter()
    episodes = []
    for i, sample in enumerate(samples):
        question = questions[i // num_answers]
        text = tokenizer.decode(sample.token_ids[:-1] if sample.is_finished else sample.token_ids)
        episodes.append(
            Episode(
                question_id=i // num_answers,
                prompt_token_ids=question.prompt_token_ids,
                response_token_ids=sample.token_ids,
                response_logprobs=sample.logprobs,
                is_finished=sample.is_finished,
                text=text,
                reward=reward_function(text, **question.problem),
                entropy=sample.entropy,
            )
        )
    on_stats(RolloutStats(stats.prefill_seconds, stats.decode_seconds, time.perf_counter() - clock,
                          stats.row_steps, stats.row_steps - stats.tokens))
    return episodes


def group_advantages(rewards_NM: Tensor, eps: float = 1e-4) -> Tensor:
    """Standardise rewards within each question's group (DeepSeekMath, arXiv:2402.03300, section 4.1.2).

    rewards_NM: N questions x M answers. Population standard deviation.
    Returns float32 (N, M), unitless; exactly 0 for a group whose rewards are all equal.
    Raises ValueError if M < 2: a group of one has nothing to compare with.
    """
    if rewards_NM.ndim != 2 or rewards_NM.shape[1] < 2:
        raise ValueError(f"rewards of shape {tuple(rewards_NM.shape)}; wanted (questions, answers) with at least 2 answers each")
    rewards_NM = rewards_NM.float()
    spread_N1 = rewards_NM.std(dim=1, keepdim=True, correction=0)
    advantages_NM = (rewards_NM - rewards_NM.mean(dim=1, keepdim=True)) / (spread_N1 + eps)
    equal_N1 = (rewards_NM == rewards_NM[:, :1]).all(dim=1, keepdim=True)
    return advantages_NM.masked_fill(equal_N1, 0.0)  # the rounding of the mean must not become an advantage


def episode_advantages(episodes: list[Episode]) -> list[float]:
    """The advantage of each episode within the group of its question_id; over all answers, unfinished ones included."""
    groups: dict[int, list[int]] = {}
    for i, episode in enumerate(episodes):
        groups.setdefault(episode.question_id, []).append(i)
    advantages = [0.0] * len(episodes)
    for members in groups.values():
        rewards_1M = torch.tensor([[episodes[i].reward.total for i in members]])
        for i, advantage in zip(members, group_advantages(rewards_1M)[0].tolist(), strict=True):
            advantages[i] = advantage
    return advantages


def token_loss(
    hidden_PE: Tensor, head_VE: Tensor, targets_P: Tensor, coefficients_P: Tensor, grad_head_VE: Tensor, *,
    project: Callable[[Tensor], Tensor], temperature: float, vocab_size: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """loss = sum_p c_p log π(target_p) and its gradient, without ever holding more than a chunk of logits.

    The loss is linear in the log-probabilities, so the gradient of a chunk is known as soon as its logits are,
        d loss / d logits_p = c_p (onehot(target_p) - π_p) / temperature:
    it is taken on the spot, where the logits stand if they have its dtype, and nothing is kept or computed again.

    project(hidden) -> logits (P, V), to be overwritten. Adds the head's gradient to grad_head_VE in place, because another
    matrix of its size would be the largest thing in memory. Returns the loss (scalar), log π(target_p) (P,) float32, and
    the gradient of hidden_PE.
    """
    rows = max(1, LOGIT_CHUNK_BYTES[head_VE.device.type] // (4 * head_VE.shape[0]))
    grad_hidden_PE = torch.empty_like(hidden_PE)
    logprobs_P = hidden_PE.new_empty(len(hidden_PE), dtype=torch.promote_types(head_VE.dtype, torch.float32))
    for hidden_CE, targets_C, coefficients_C, logprobs_C, grad_hidden_CE in zip(
        *(t.split(rows) for t in (hidden_PE, targets_P, coefficients_P, logprobs_P, grad_hidden_PE)), strict=True
    ):
        grad_CV = _logits_gradient(project(hidden_CE), targets_C, coefficients_C, logprobs_C, dtype=head_VE.dtype,
                                   temperature=temperature, vocab_size=vocab_size)
        torch.mm(grad_CV, head_VE, out=grad_hidden_CE)
        grad_head_VE.addmm_(grad_CV.t(), hidden_CE)
        del grad_CV  # what is large dies before its successor is made
    return (coefficients_P * logprobs_P).sum(), logprobs_P, grad_hidden_PE


def _logits_gradient(
    logits_CV: Tensor, targets_C: Tensor, coefficients_C: Tensor, logprobs_C: Tensor, *,
    dtype: torch.dtype, temperature: float, vocab_size: int,
) -> Tensor:
    """d loss / d logits (C, V) in `dtype`, written over the logits where that is theirs; fills logprobs_C."""
    rows = max(1, LOGIT_BLOCK_BYTES[logits_CV.device.type] // (4 * logits_CV.shape[1]))
    grad_CV = logits_CV if logits_CV.dtype == dtype else torch.empty_like(logits_CV, dtype=dtype)
    scales_C = coefficients_C.to(logprobs_C.dtype) / temperature
    for logits_RV, targets_R1, scales_R1, logprobs_R1, grad_RV in zip(
        *(t.split(rows) for t in (logits_CV, targets_C[:, None], scales_C[:, None], logprobs_C[:, None], grad_CV)), strict=True
    ):
        log_probs_RV = log_probs(logits_RV.to(logprobs_C.dtype), temperature, vocab_size)
        logprobs_R1.copy_(log_probs_RV.gather(1, targets_R1))
        grad_RV.copy_(log_probs_RV.exp_().mul_(-scales_R1).scatter_add_(1, targets_R1, scales_R1))
        del log_probs_RV
    return grad_CV


def zero_gradient(model: Transformer) -> None:
    """Matrices of zeros for accumulate_gradient to add to; made all at once, they leave no holes in memory."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


def accumulate_gradient(
    model: Transformer, row: Row, *, num_tokens: int, temperature: float, vocab_size: int, checkpoint_layers: int = 0
) -> tuple[Tensor, Tensor]:
    """Add a row's share of the gradient of - sum A log π / num_tokens to the weights' .grad, which stands already.

    Returns that share of the loss, and |log π - the sampler's log π| of its response tokens (P,).
    """
    attend = attend_within(row.runs, len(row.tokens_S), row.tokens_S.device)
    hidden_1SE = model.hidden_states(row.tokens_S[None], row.positions_S[None], attend, checkpoint_layers=checkpoint_layers)
    hidden_PE, head_VE = hidden_1SE[0, row.sources_P], model.head_weight_VE
    with torch.no_grad():
        loss, logprobs_P, grad_hidden_PE = token_loss(
            hidden_PE, head_VE, row.targets_P, -row.advantages_P / num_tokens, head_VE.grad,
            project=model.logits, temperature=temperature, vocab_size=vocab_size,
        )  # fmt: skip
    hidden_PE.backward(grad_hidden_PE)
    return loss, (logprobs_P - row.sampler_logprobs_P).abs()


def update_policy(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    episodes: list[Episode],
    *,
    max_grad_norm: float,
    skip_unfinished: bool,
    temperature: float = 1.0,
    vocab_size: int | None = None,
    micro_batch_tokens: int = 8192,
    checkpoint_layers: int = 0,
    progress: Callable[[int], None] = lambda tokens: None,
) -> UpdateStats:
    """One policy-gradient step on a batch of episodes (steps 4 to 6 of the algorithm in the README).

    loss = - sum_ij m_ij sum_t A_ij log π(a_ij[t]) / sum_ij m_ij |a_ij|, with m_ij = 0 for an unfinished answer if
    skip_unfinished, else 1. The denominator is fixed for the whole batch, so micro-batches reweight nothing; answers
    whose advantage is 0 count in it but are not run. Temperature and vocab_size are those of the rollout.
    Makes no step, and says why in `skipped`, where nothing is kept, every kept advantage is 0, or a number is not finite;
    broken_questions then names the questions behind it. If progress raises, weights and optimizer are as they were.
    """
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    clock = time.perf_counter()
    advantages = episode_advantages(episodes)
    kept = [i for i, e in enumerate(episodes) if e.is_finished or not skip_unfinished]
    run = [i for i in kept if advantages[i] != 0]
    num_tokens = sum(len(episodes[i].response_token_ids) for i in kept)
    if broken := {e.question_id for e in episodes if not _is_finite(e)}:
        return _no_step(num_tokens, "a reward or a sampled log-probability is not finite", broken)
    if not run:
        return _no_step(num_tokens, "every kept answer has advantage 0" if kept else "no answer is finished")
    zero_gradient(model)
    loss, tokens_run, differences, broken = 0.0, 0, [], set()
    for row in pack_rows([episodes[i] for i in run], [advantages[i] for i in run], micro_batch_tokens):
        row_loss, difference_P = accumulate_gradient(
            model, row.to(model.head_weight_VE.device), num_tokens=num_tokens, temperature=temperature, vocab_size=vocab_size,
            checkpoint_layers=checkpoint_layers,
        )  # fmt: skip
        loss += float(row_loss)
        tokens_run += len(row.tokens_S)
        differences.append(difference_P)
        if not math.isfinite(row_loss):
            broken |= set(row.question_ids)
        progress(len(row.tokens_S))
    grad_norm = clip_gradient(model, max_grad_norm)
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        optimizer.zero_grad(set_to_none=True)
        return _no_step(num_tokens, "the loss or the gradient is not finite", broken or {episodes[i].question_id for i in run})
    gradient_seconds, clock = time.perf_counter() - clock, time.perf_counter()
    changed = optimizer.step()
    stored, exact = changed if isinstance(changed, tuple) else (math.nan, math.nan)  # only our optimizer counts
    optimizer.zero_grad(set_to_none=True)
    difference_P = torch.cat(differences)
    return UpdateStats(
        loss=loss, grad_norm=grad_norm, num_tokens=num_tokens,
        logprob_diff_mean=float(difference_P.mean()), logprob_diff_max=float(difference_P.max()),
        weights_changed=stored, weights_changed_fp32=exact,
        tokens_run=tokens_run, gradient_seconds=gradient_seconds, optimizer_seconds=time.perf_counter() - clock,
    )  # fmt: skip


def clip_gradient(model: Transformer, max_norm: float) -> float:
    """Scale the gradient down to max_norm; returns its norm before, taken in float32 whatever the weights' dtype."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    pieces = [piece for grad in grads for piece in grad.view(-1).split(2**20)]  # each is copied as float32
    norms = torch.empty(len(pieces), device=grads[0].device)  # in place: results of their own would lie between the copies
    for i, piece in enumerate(pieces):
        torch.linalg.vector_norm(piece, dtype=torch.float32, out=norms[i])
    norm = float(torch.linalg.vector_norm(norms))
    if norm > max_norm:
        for grad in grads:
            grad.mul_(max_norm / norm)
    return norm


def _is_finite(episode: Episode) -> bool:
    return math.isfinite(episode.reward.total) and all(map(math.isfinite, episode.response_logprobs))


def _no_step(num_tokens: int, reason: str, broken: Iterable[int] = ()) -> UpdateStats:
    return UpdateStats(loss=0.0, grad_norm=0.0, num_tokens=num_tokens, skipped=reason, broken_questions=sorted(broken))
