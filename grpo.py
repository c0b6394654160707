"""Group Relative Policy Optimization (DeepSeekMath, arXiv:2402.03300): rollout -> advantages -> loss -> one policy-gradient step.

1. Sample M answers to each of N questions, and score each (rollout).
2. Compare the answers to a question with each other: the advantage is the reward less the group's mean, in units of its standard
   deviation (group_advantages). The group takes the place of a value network.
3. Raise log π of each token of an answer in proportion to the answer's advantage (token_loss, update_policy).

How this departs from the paper, and why:
1. One step a batch, so the policy that samples is the policy that learns, up to rounding, which is measured: the importance ratio
   π / π_sampler is 1, the gradient of the ratio is that of log π, and there is nothing to clip.
2. No KL term and no reference model, as in DAPO (arXiv:2503.14476): the reward is a rule, no learned model that could be exploited.
3. Every response token weighs the same (DAPO's token-level loss, here over the whole batch): with a mean per answer a token of a
   short answer would weigh more than one of a long answer.
4. Answers cut off by the length budget can be left out of the loss (DAPO's overlong filtering), but not out of the
   group's statistics: leaving them out there would shift the mean that the others are compared with.

An episode is one answer with its reward; a row is a micro-batch: prompts and answers in one sequence, where a token sees only its
own prompt and answer (packing.py). `watch` shows progress, raises where a signal asks to stop, and knows the processes that share
the work (data_types.py).
Dimension key: N questions, M answers a question, S tokens of a packed row, P response tokens in it, C of a chunk of them,
               E hidden size, V rows of the head, of which the first vocab_size stand for tokens.
"""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from data_types import UNWATCHED, Episode, Question, Reward, UpdateStats, Watch
from flat import ALIGNMENT, norm, zero_gradient
from generate import Sampling, generate, log_probs
from packing import Row, attend_within, pack_rows
from qwen2_model import Transformer
from tokenizer import Tokenizer

# Of the float32 logits of a chunk of the loss; a bf16 copy for their gradient comes on top. Smaller: less memory. Larger: fewer
# additions to the head's gradient, which round in bf16: relative to the exact gradient of 40,000 tokens it is 2.5 % off at 64 MB,
# 1.9 % at 160, and 1.3 % by the rounding of the products alone.
LOGIT_CHUNK_BYTES = {"cpu": 64 * 1000**2, "cuda": 160 * 1000**2}


# ---------------------------------------------------------------- sample and score


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
    watch: Watch = UNWATCHED,
) -> list[Episode]:
    """Sample num_answers answers to each question and score them.

    Answer j to question i is episode i * num_answers + j, with question_id i. Every answer has the same budget of
    max_gen_len response tokens, whatever its prompt's length; one that is cut off there is scored as it stands.
    cache_bytes: what the KV cache may take. Of several processes each samples and scores the answers to its part of the questions,
    and all get all episodes. Neither changes by which random number a token is drawn.
    """
    sampling = Sampling(max_gen_len, temperature, tokenizer.vocab_size, tokenizer.stop_ids)
    prompts, processes = [question.prompt_token_ids for question in questions], watch.processes
    samples = generate(
        model,
        prompts,
        sampling,
        num_answers=num_answers,
        generator=generator,
        cache_bytes=cache_bytes,
        watch=watch,
    )
    first = (
        processes.parts_of(len(questions))[processes.rank].start * num_answers
    )  # samples are of this process's part
    episodes = []
    with watch.part("reward", len(samples)):
        for number, sample in enumerate(samples, first):
            question_id = number // num_answers
            question = questions[question_id]
            # The stop token is learned, but not scored.
            text = tokenizer.decode(
                sample.token_ids[:-1] if sample.is_finished else sample.token_ids
            )
            reward = reward_function(text, **question.problem)
            episodes.append(
                Episode(
                    question_id=question_id,
                    prompt_token_ids=question.prompt_token_ids,
                    response_token_ids=sample.token_ids,
                    response_logprobs=sample.logprobs,
                    is_finished=sample.is_finished,
                    text=text,
                    reward=reward,
                    entropy=sample.entropy,
                )
            )
            watch.advance(1)
    return processes.share(episodes)


# ---------------------------------------------------------------- compare


def group_advantages(rewards_NM: Tensor, eps: float = 1e-4) -> Tensor:
    """A_ij = (r_ij - mean_j r_ij) / (std_j r_ij + eps), within each question (arXiv:2402.03300, section 4.1.2).

    rewards_NM: N questions x M answers. Population standard deviation.
    Returns float32 (N, M), unitless; exactly 0 for a group whose rewards are all equal.
    Raises ValueError if M < 2: a group of one has nothing to compare with.
    """
    if rewards_NM.ndim != 2 or rewards_NM.shape[1] < 2:
        raise ValueError(
            f"rewards of shape {tuple(rewards_NM.shape)}; wanted (questions, answers) with at least 2 answers each"
        )
    rewards_NM = rewards_NM.float()
    spread_N1 = rewards_NM.std(dim=1, keepdim=True, correction=0)
    advantages_NM = (rewards_NM - rewards_NM.mean(dim=1, keepdim=True)) / (spread_N1 + eps)
    equal_N1 = (rewards_NM == rewards_NM[:, :1]).all(dim=1, keepdim=True)
    return advantages_NM.masked_fill(
        equal_N1, 0.0
    )  # the rounding of the mean must not become an advantage


def episode_advantages(episodes: list[Episode]) -> list[float]:
    """The advantage of each episode within its group, unfinished ones included. In any order, at least two a group."""
    rewards: dict[int, list[float]] = {}
    for e in episodes:
        rewards.setdefault(e.question_id, []).append(e.reward.total)
    advantages = {
        group: iter(group_advantages(torch.tensor([rewards_M]))[0].tolist())
        for group, rewards_M in rewards.items()
    }
    return [
        next(advantages[e.question_id]) for e in episodes
    ]  # each group's in the order in which its rewards were collected


# ---------------------------------------------------------------- the loss


def token_loss(logprobs_P: Tensor, row: Row, num_tokens: int) -> Tensor:
    """- sum_p A_p log π(token_p) / num_tokens: what these response tokens add to the batch's loss, nats per token.

    row: holds the advantage of the answer that each token belongs to. num_tokens: all kept response tokens of the batch,
    however it is cut into rows, so that every token of it weighs the same.
    """
    return -(row.advantages_P * logprobs_P).sum() / num_tokens


def row_loss(
    model: Transformer,
    row: Row,
    num_tokens: int,
    *,
    temperature: float,
    vocab_size: int,
    checkpoint_layers: int = 0,
) -> tuple[Tensor, Tensor]:
    """The token_loss of a row, for backward(), and log π of each of its response tokens (P,), float32, nats.

    π is the softmax of the first vocab_size logits / temperature, as in the sampler. The head's .grad must stand (zero_gradient).
    """
    attend = attend_within(row, model.config, model.head_weight_VE.dtype)
    hidden_1SE = model.hidden_states(
        row.tokens_S[None], row.positions_S[None], attend, checkpoint_layers=checkpoint_layers
    )
    # sources_P: where the hidden states stand that predict targets_P, one token before them.
    return ChunkedLoss.apply(
        hidden_1SE[0, row.sources_P], model, row, num_tokens, temperature, vocab_size
    )


class ChunkedLoss(torch.autograd.Function):
    """token_loss from hidden states, in which no more than a chunk of the logits (P, V) ever exists.

    The loss is a sum over tokens, so the forward pass takes the gradient of a chunk while its logits are there, and they are not
    computed again: with g_p = d loss / d log π(target_p), which autograd finds for whatever token_loss says,
        d loss / d logits_p = g_p (onehot(target_p) - π_p) / temperature.
    What that gives the head is added to its .grad at once (another matrix of its size would be the largest thing in memory);
    what it gives the hidden states is kept, and all that the backward pass does is to hand it on.
    """

    @staticmethod
    def forward(
        ctx,
        hidden_PE: Tensor,
        model: Transformer,
        row: Row,
        num_tokens: int,
        temperature: float,
        vocab_size: int,
    ):
        head_VE, losses, logprobs = model.head_weight_VE, [], []
        ctx.grad_hidden_PE, takes_gradient = torch.empty_like(hidden_PE), ctx.needs_input_grad[0]
        size = max(1, LOGIT_CHUNK_BYTES[head_VE.device.type] // (4 * len(head_VE)))
        # Made once for all chunks, because buffers that come and go in many sizes scatter over the heap: it grew by 0.8 GiB.
        # Logits and gradient may be of a narrower type than the probabilities between them.
        narrow_CV = head_VE.new_empty((min(size, len(hidden_PE)), len(head_VE)))
        wide_CV = narrow_CV.to(torch.promote_types(head_VE.dtype, torch.float32))
        chunks = zip(
            row.chunks(size), hidden_PE.split(size), ctx.grad_hidden_PE.split(size), strict=True
        )
        for chunk, hidden_CE, grad_hidden_CE in chunks:  # chunk: the row with C of its P tokens
            targets_C1, C = chunk.targets_P[:, None], len(hidden_CE)
            logits_CV = model.logits(hidden_CE, out=(wide_CV if head_VE.is_cuda else narrow_CV)[:C])
            logprobs_CV = log_probs(
                wide_CV[:C].copy_(logits_CV), temperature, vocab_size
            )  # in place; a card's product is wide
            logprobs_C = logprobs_CV.gather(1, targets_C1)[:, 0].requires_grad_()
            with torch.enable_grad():
                loss = token_loss(logprobs_C, chunk, num_tokens)
            losses.append(loss.detach())
            logprobs.append(logprobs_C.detach())
            if takes_gradient:
                grad_C1 = torch.autograd.grad(loss, logprobs_C)[0][:, None] / temperature
                grad_CV = narrow_CV[:C].copy_(
                    logprobs_CV.exp_().mul_(-grad_C1).scatter_add_(1, targets_C1, grad_C1)
                )
                torch.mm(grad_CV, head_VE, out=grad_hidden_CE)
                head_VE.grad.addmm_(grad_CV.t(), hidden_CE)
        logprobs_P = torch.cat(logprobs)
        ctx.mark_non_differentiable(logprobs_P)
        return torch.stack(losses).sum(), logprobs_P

    @staticmethod
    def backward(ctx, grad_loss: Tensor, _):
        if grad_loss != 1:
            raise ValueError(
                f"the head had its gradient when the loss was multiplied by {float(grad_loss):g}; do it in token_loss"
            )
        return ctx.grad_hidden_PE, None, None, None, None, None


# ---------------------------------------------------------------- learn


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
    watch: Watch = UNWATCHED,
) -> UpdateStats:
    """One policy-gradient step on a batch of episodes.

    loss = - sum_ij m_ij A_ij sum_t log π(a_ij[t]) / sum_ij m_ij |a_ij|, where a_ij is answer j to question i, and m_ij = 0 for an
    unfinished answer if skip_unfinished, else 1. The denominator is fixed for the whole batch, so micro-batches reweight nothing;
    answers whose advantage is 0 count in it but are not run. Temperature and vocab_size are those of the rollout.
    checkpoint_layers: so many layers keep less and are run twice (activation checkpointing, Transformer.hidden_states).
    Makes no step, and says why in `skipped`, where nothing is kept, every kept advantage or the gradient is 0, or a number is not
    finite; broken_questions then names the questions behind it, or all that were learned from where only the norm of the gradient
    is not finite. If watch.advance raises, weights and optimizer are as they were.

    Several processes (watch.processes, those of the optimizer) divide the rows among them, and the sum of their gradients is the
    gradient. All see the whole loss and the whole norm, so all decide alike; each then updates its part of the weights, and
    optimizer.step puts the parts together.
    """
    processes = watch.processes
    vocab_size = model.config.vocab_size if vocab_size is None else vocab_size
    answers = zip(episodes, episode_advantages(episodes), strict=True)
    kept = [(e, advantage) for e, advantage in answers if e.is_finished or not skip_unfinished]
    learned = [(e, advantage) for e, advantage in kept if advantage != 0]
    num_tokens = sum(len(e.response_token_ids) for e, _ in kept)
    if broken := {
        e.question_id
        for e in episodes
        if not all(map(math.isfinite, (e.reward.total, *e.response_logprobs)))
    }:
        return UpdateStats(
            math.nan,
            math.nan,
            num_tokens,
            math.nan,
            math.nan,
            broken_questions=sorted(broken),
            skipped="a reward or a sampled log-probability is not finite",
        )
    if not learned:
        return UpdateStats(
            0.0,
            0.0,
            num_tokens,
            skipped="every kept answer has advantage 0" if kept else "no answer is finished",
        )

    gradient = zero_gradient(
        model.parameters()
    )  # one flat tensor, of which every parameter's .grad is a view
    rows = list(pack_rows(learned, micro_batch_tokens, processes.size))
    own_rows = range(processes.rank, len(rows), processes.size)  # rows are about equally long
    results = []  # of each own row: its number, its loss, how far the trainer's log-probabilities are from the sampler's
    with watch.part("gradient", sum(len(rows[r].tokens_S) for r in own_rows)):
        for r in own_rows:
            row = rows[r].to(gradient.device)
            loss, logprobs_P = row_loss(
                model,
                row,
                num_tokens,
                temperature=temperature,
                vocab_size=vocab_size,
                checkpoint_layers=checkpoint_layers,
            )
            loss.backward()
            results.append((r, loss.item(), (logprobs_P - row.sampler_logprobs_P).abs().cpu()))
            watch.advance(len(row.tokens_S), tokens_run=len(row.tokens_S))
            del (
                loss,
                logprobs_P,
                row,
            )  # freed now, or they scatter the next row's activations over the memory

    results = sorted(
        processes.share(results), key=lambda result: result[0]
    )  # added in one order, whoever ran which row
    total_loss = sum(loss for _, loss, _ in results)
    broken = {
        question_id
        for r, loss, _ in results
        if not math.isfinite(loss)
        for question_id in rows[r].question_ids
    }
    own_gradient = processes.reduce_scatter(
        gradient, processes.parts_of(len(gradient), ALIGNMENT)
    )  # a view of its part
    grad_norm = math.hypot(*processes.share([norm(own_gradient)]))
    differences = torch.cat([differences for _, _, differences in results])
    stats = UpdateStats(
        loss=total_loss,
        grad_norm=grad_norm,
        num_tokens=num_tokens,
        logprob_diff_mean=float(differences.mean()),
        logprob_diff_max=float(differences.max()),
    )
    if not (math.isfinite(total_loss) and math.isfinite(grad_norm)):
        broken = broken or {e.question_id for e, _ in learned}
        stats = replace(
            stats, skipped="the loss or the gradient is not finite", broken_questions=sorted(broken)
        )
    elif grad_norm == 0:  # possible where token_loss is changed to a clipped ratio
        stats = replace(stats, skipped="the gradient is 0")
    else:
        if grad_norm > max_grad_norm:
            own_gradient.mul_(max_grad_norm / grad_norm)  # in place, where the optimizer finds it
        with watch.part("optimizer", 1):
            changed = optimizer.step()
        stored, exact = (
            changed if isinstance(changed, tuple) else (math.nan, math.nan)
        )  # our AdamW says what share has changed
        stats = replace(stats, weights_changed=stored, weights_changed_fp32=exact)
    optimizer.zero_grad()  # gives its memory back
    return stats
