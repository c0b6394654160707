"""Group Relative Policy Optimization (GRPO, DeepSeekMath, arXiv:2402.03300).

1. Sample M answers to each of N questions and score them (rollout).
2. Compare the answers to a question with each other: the advantage of an answer is its reward minus
   the mean of its group, divided by the standard deviation of the group (group_advantages). The
   group takes the place of a value network.
3. Push log π of each token up or down in proportion to the advantage of its answer
   (update_policy).

Departures from the paper:
1. One step per batch, so the policy that is trained is the policy that sampled. The importance
   ratio is 1 and its gradient is that of log π, so a clipped ratio would change nothing. Sampler
   and trainer differ only by rounding; each step measures how much (logprob_diff_mean).
2. No KL term and no reference model; DAPO (arXiv:2503.14476) has none either. The reward is a rule,
   which is harder to exploit than a learned reward model.
3. Every response token of the batch has the same weight, as in DAPO's token-level loss. With a mean
   per answer, a token of a short answer would weigh more than one of a long answer.
4. Answers that were cut off by the length budget can be left out of the loss, as in DAPO's overlong
   filtering. They still count in the mean and the standard deviation of their group.

An episode is one answer with its reward. A micro-batch joins prompts and answers into one sequence,
in which the answers to a question share its prompt: a prompt token sees its own prompt so far, an
answer token sees its prompt and its own answer so far (packing.py).

Dimension key: N questions, M answers per question, S tokens of a micro-batch, P response tokens of
               a micro-batch, C response tokens of a chunk, E hidden size, V rows of the head (more
               than the tokenizer has entries).
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from data_types import Episode, NoProgress, Question, Reward, SingleProcess, UpdateStats
from flat import ALIGNMENT, norm, zero_gradient
from generate import SamplingParams, check_length, generate, scale_and_mask_, seeded_generator
from packing import MicroBatch, pack_micro_batches, packed_attention
from qwen2_model import Transformer, head_logits
from tokenizer import Tokenizer

TILE = 128  # tokens: matrix products of a GPU work in tiles of this size and waste a partial one

# Size of the float32 logits of a chunk. Smaller chunks take less memory. But each chunk is one bf16
# addition to the gradient of the head, and each addition rounds: the gradient over 40,000 tokens is
# off by 2.5 % with 64 MB, by 1.9 % with 160 MB and by 1.3 % in one piece.
LOGIT_CHUNK_BYTES = {"cpu": 64 * 1000**2, "cuda": 160 * 1000**2}


# ---------------------------------------------------------------- questions


def draw_problems(problems: Sequence[dict], step: int, *, count: int, seed: int) -> list[dict]:
    """The problems of a step (from 1 on). Each pass over the problems has its own random order."""
    drawn = []
    for i in range((step - 1) * count, step * count):
        order = _shuffled(len(problems), seed, i // len(problems))
        drawn.append(problems[order[i % len(problems)]])
    return drawn


@functools.lru_cache(maxsize=2)
def _shuffled(num_problems: int, seed: int, pass_index: int) -> list[int]:
    generator = seeded_generator(seed, "order", pass_index)
    return torch.randperm(num_problems, generator=generator).tolist()


def make_question(task: ModuleType, problem: dict[str, Any], tokenizer: Tokenizer) -> Question:
    prompt = task.render_prompt(problem, tokenizer)
    return Question(prompt, tokenizer.encode(prompt), problem)


# ---------------------------------------------------------------- rollout


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
    world: SingleProcess = SingleProcess(),
    progress: NoProgress = NoProgress(),
) -> list[Episode]:
    """Sample num_answers answers to each question and score them.

    Answer j to question i is episode i * num_answers + j and has question_id i. An answer may take
    max_gen_len tokens, whatever the length of its prompt; an answer cut off at that length is
    scored as it is. Each rank works on its shard of the questions, and all ranks return all
    episodes. cache_bytes is the memory for the KV cache. Each token gets the same random number
    whatever the number of ranks and the memory.

    Raises ValueError, naming the question, if a prompt leaves no room for an answer.
    """
    for question in questions:
        name = f"the prompt of the problem {question.problem!r:.300}"
        check_length(model.config, len(question.prompt_token_ids), max_gen_len, name)
    prompts = [question.prompt_token_ids for question in questions]
    params = SamplingParams(max_gen_len, temperature, tokenizer.vocab_size, tokenizer.stop_ids)
    completions = generate(
        model,
        prompts,
        params,
        num_answers=num_answers,
        generator=generator,
        cache_bytes=cache_bytes,
        world=world,
        progress=progress,
    )
    first_question = world.shards(len(questions))[world.rank].start
    episodes = []
    with progress.phase("reward", len(completions)):
        for i, completion in enumerate(completions):
            question_id = first_question + i // num_answers
            question, ids = questions[question_id], completion.token_ids
            # The stop token is trained on, but the reward function does not see it.
            text = tokenizer.decode(ids[:-1] if completion.is_finished else ids)
            episode = Episode(
                question_id=question_id,
                prompt_token_ids=question.prompt_token_ids,
                response_token_ids=ids,
                response_logprobs=completion.logprobs,
                is_finished=completion.is_finished,
                text=text,
                reward=reward_function(text, **question.problem),
                entropy=completion.entropy,
            )
            episodes.append(episode)
            progress.update(1)
    return list(itertools.chain.from_iterable(world.all_gather_objects(episodes)))


# ---------------------------------------------------------------- advantages


def group_advantages(rewards_NM: Tensor, eps: float = 1e-4) -> Tensor:
    """Standardise rewards within the group of each question (arXiv:2402.03300, section 4.1.2).

    A_ij = (r_ij - mean_j r_ij) / (std_j r_ij + eps), with the population standard deviation.

    rewards_NM: N questions x M answers.
    Returns float32 (N, M), unitless; exactly 0 for a group whose rewards are all equal.
    Raises ValueError if M < 2: a group of one has nothing to compare with.
    """
    if rewards_NM.ndim != 2 or rewards_NM.shape[1] < 2:
        raise ValueError(
            f"rewards have shape {tuple(rewards_NM.shape)}; "
            "wanted (questions, answers) with at least 2 answers per question"
        )
    rewards_NM = rewards_NM.float()
    std_N1 = rewards_NM.std(dim=1, keepdim=True, correction=0)
    advantages_NM = (rewards_NM - rewards_NM.mean(dim=1, keepdim=True)) / (std_N1 + eps)
    # The mean of equal rewards has a rounding error, which must not become an advantage.
    all_equal_N1 = (rewards_NM == rewards_NM[:, :1]).all(dim=1, keepdim=True)
    return advantages_NM.masked_fill(all_equal_N1, 0.0)


def episode_advantages(episodes: list[Episode]) -> list[float]:
    """The advantage of each episode within its group, which includes the unfinished answers.

    The episodes may be in any order. Each group needs at least two.
    """
    groups: dict[int, list[int]] = {}  # question_id -> indices of its episodes
    for i, episode in enumerate(episodes):
        groups.setdefault(episode.question_id, []).append(i)
    advantages = [0.0] * len(episodes)
    for indices in groups.values():
        rewards_1M = torch.tensor([[episodes[i].reward.total for i in indices]])
        for i, advantage in zip(indices, group_advantages(rewards_1M)[0].tolist(), strict=True):
            advantages[i] = advantage
    return advantages


# ---------------------------------------------------------------- log-probabilities


def token_logprobs(
    hidden_PE: Tensor, head_VE: Tensor, targets_P: Tensor, *, temperature: float, vocab_size: int
) -> Tensor:
    """log π(target) at each position, differentiable with respect to hidden_PE and head_VE.

    π is softmax(logits[:vocab_size] / temperature), as in the sampler.

    hidden_PE: the hidden state that predicts each target. head_VE: the weight of the vocabulary
    head. Returns (P,), in nats, float32 or wider. The full logits (P, V) never exist at once.
    """
    return TokenLogprobs.apply(hidden_PE, head_VE, targets_P, temperature, vocab_size)


class TokenLogprobs(torch.autograd.Function):
    """token_logprobs in chunks. The backward pass recomputes the logits of each chunk."""

    @staticmethod
    def forward(
        ctx,
        hidden_PE: Tensor,
        head_VE: Tensor,
        targets_P: Tensor,
        temperature: float,
        vocab_size: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden_PE, head_VE, targets_P)
        ctx.temperature, ctx.vocab_size = temperature, vocab_size
        wide = torch.promote_types(head_VE.dtype, torch.float32)
        logprobs_P = torch.empty(len(hidden_PE), dtype=wide, device=hidden_PE.device)
        for chunk in _chunks(len(hidden_PE), head_VE):
            logits_CV = head_logits(hidden_PE[chunk], head_VE).to(wide)
            scale_and_mask_(logits_CV, temperature, vocab_size)
            logprobs_CV = torch.log_softmax(logits_CV, dim=-1, out=logits_CV)
            logprobs_P[chunk] = logprobs_CV.gather(1, targets_P[chunk, None])[:, 0]
            del logits_CV, logprobs_CV  # free this chunk before the next one is allocated
        return logprobs_P

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_P: Tensor):
        """d log π(target) / d logits = (onehot(target) - π) / temperature."""
        hidden_PE, head_VE, targets_P = ctx.saved_tensors
        grad_hidden_PE, grad_head_VE = torch.empty_like(hidden_PE), torch.zeros_like(head_VE)
        for chunk in _chunks(len(hidden_PE), head_VE):
            logits_CV = head_logits(hidden_PE[chunk], head_VE).to(grad_P.dtype)
            scale_and_mask_(logits_CV, ctx.temperature, ctx.vocab_size)
            grad_C1 = grad_P[chunk, None] / ctx.temperature
            grad_CV = torch.softmax(logits_CV, dim=-1, out=logits_CV).mul_(-grad_C1)
            grad_CV.scatter_add_(1, targets_P[chunk, None], grad_C1)
            grad_CV = grad_CV.to(head_VE.dtype)
            torch.mm(grad_CV, head_VE, out=grad_hidden_PE[chunk])
            grad_head_VE.addmm_(grad_CV.t(), hidden_PE[chunk])
            del logits_CV, grad_CV
        return grad_hidden_PE, grad_head_VE, None, None, None


def _chunks(num_tokens: int, head_VE: Tensor) -> Iterator[slice]:
    size = max(1, LOGIT_CHUNK_BYTES[head_VE.device.type] // (4 * len(head_VE)))
    if size > TILE:
        size -= size % TILE
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def policy_logprobs(
    model: Transformer,
    micro_batch: MicroBatch,
    *,
    temperature: float,
    vocab_size: int,
    recompute_layers: int = 0,
) -> Tensor:
    """log π (P,) of every response token of a micro-batch, nats, differentiable.

    Prompt tokens are not among the targets, so they are never trained.
    """
    attention = packed_attention(micro_batch, model.config, model.head_weight_VE.dtype)
    hidden_1SE = model.hidden_states(
        micro_batch.tokens_S[None],
        micro_batch.positions_S[None],
        attention,
        recompute_layers=recompute_layers,
    )
    # The shift by one: a token is predicted at the position before it, which for the first token of
    # an answer is the end of its prompt.
    hidden_PE = hidden_1SE[0, micro_batch.logit_positions_P]
    return token_logprobs(
        hidden_PE,
        model.head_weight_VE,
        micro_batch.targets_P,
        temperature=temperature,
        vocab_size=vocab_size,
    )


# ---------------------------------------------------------------- update


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
    recompute_layers: int = 0,
    world: SingleProcess = SingleProcess(),
    progress: NoProgress = NoProgress(),
) -> UpdateStats:
    """Take one policy-gradient step on a batch of episodes.

    loss = - sum_ij m_ij A_ij sum_t log π(a_ij[t]) / sum_ij m_ij |a_ij|

    A_ij is the advantage of answer a_ij (group_advantages) and |a_ij| its length, including the
    stop token. m_ij is 0 for an unfinished answer if skip_unfinished is set, else 1. The
    denominator counts the kept tokens of the whole batch, so micro-batching does not reweight them.
    Answers with advantage 0 count in it but need no forward pass. Temperature and vocab_size are
    those of the rollout.

    The step is skipped, and UpdateStats.skipped says why, if no answer is kept, every kept
    advantage is 0, the gradient is 0, or a value is not finite. For a value that is not finite,
    broken_questions lists the suspects. If progress.update raises (Ctrl-C), weights and optimizer
    state are unchanged.

    With several ranks, each runs its share of the micro-batches. The gradients are summed across
    ranks, so every rank sees the same loss and norm and takes the same decision.
    """
    if vocab_size is None:
        vocab_size = model.config.vocab_size
    advantages = episode_advantages(episodes)  # over all answers, before any is left out
    pairs = zip(episodes, advantages, strict=True)
    kept = [(e, advantage) for e, advantage in pairs if e.is_finished or not skip_unfinished]
    answers = [(e, advantage) for e, advantage in kept if advantage != 0]
    num_tokens = sum(len(e.response_token_ids) for e, _ in kept)
    stats = _skip_before_update(episodes, kept, answers, num_tokens)
    if stats is not None:
        return stats

    gradient = zero_gradient(model.parameters())  # one flat tensor; every .grad is a view of it
    micro_batches = list(pack_micro_batches(answers, micro_batch_tokens, world.size))
    local = range(world.rank, len(micro_batches), world.size)
    results = []
    with progress.phase("gradient", sum(len(micro_batches[i].tokens_S) for i in local)):
        for i in local:
            micro_batch = micro_batches[i].to(gradient.device)
            logprobs_P = policy_logprobs(
                model,
                micro_batch,
                temperature=temperature,
                vocab_size=vocab_size,
                recompute_layers=recompute_layers,
            )
            loss = -(micro_batch.advantages_P * logprobs_P).sum() / num_tokens
            loss.backward()  # adds to the gradient
            # The sampler's log-probabilities are not in the loss; this measures the mismatch.
            difference_P = (logprobs_P.detach() - micro_batch.sampler_logprobs_P).abs()
            results.append((i, loss.item(), difference_P.cpu()))
            progress.update(len(micro_batch.tokens_S))
            del logprobs_P, loss  # free this graph before the next one is built

    stats = _sum_over_ranks(gradient, micro_batches, results, num_tokens, world)
    if not stats.skipped:
        if stats.grad_norm > max_grad_norm:  # clip by norm
            for parameter in model.parameters():
                parameter.grad.mul_(max_grad_norm / stats.grad_norm)
        with progress.phase("optimizer", 1):
            optimizer.step()
    optimizer.zero_grad()  # frees the memory of the gradient
    return stats


def _skip_before_update(
    episodes: list[Episode],
    kept: list[tuple[Episode, float]],
    answers: list[tuple[Episode, float]],
    num_tokens: int,
) -> UpdateStats | None:
    """The stats of a step that is skipped before its gradient is computed, or None to go ahead."""
    broken = set()
    for e in episodes:
        if not all(math.isfinite(x) for x in [e.reward.total, *e.response_logprobs]):
            broken.add(e.question_id)
    if broken:
        return UpdateStats(
            loss=math.nan,
            grad_norm=math.nan,
            num_tokens=num_tokens,
            logprob_diff_mean=math.nan,
            logprob_diff_max=math.nan,
            skipped="a reward or a sampled log-probability is not finite",
            broken_questions=sorted(broken),
        )
    if not answers:
        reason = "every kept answer has advantage 0" if kept else "no answer is finished"
        return UpdateStats(loss=0.0, grad_norm=0.0, num_tokens=num_tokens, skipped=reason)
    return None


def _sum_over_ranks(
    gradient: Tensor,
    micro_batches: list[MicroBatch],
    results: list[tuple[int, float, Tensor]],
    num_tokens: int,
    world: SingleProcess,
) -> UpdateStats:
    """Sum gradient and loss over all ranks, and decide whether the step can be taken.

    results: for each micro-batch of this rank, its index, its loss and the absolute difference (P,)
    between the log π of trainer and sampler.
    """
    # Sorted by micro-batch, so that the sums do not depend on which rank ran which.
    gathered = sorted(itertools.chain(*world.all_gather_objects(results)), key=lambda r: r[0])
    gradient_shard = world.reduce_scatter(gradient, world.shards(len(gradient), ALIGNMENT))
    grad_norm = math.hypot(*world.all_gather_objects(norm(gradient_shard)))
    total_loss = sum(loss for _, loss, _ in gathered)
    difference = torch.cat([difference_P for _, _, difference_P in gathered])
    skipped, broken = "", set()
    if not (math.isfinite(total_loss) and math.isfinite(grad_norm)):
        skipped = "the loss or the gradient is not finite"
        suspects = [i for i, loss, _ in gathered if not math.isfinite(loss)]
        for i in suspects or range(len(micro_batches)):
            broken.update(micro_batches[i].question_ids)
    elif grad_norm == 0:
        skipped = "the gradient is 0"
    return UpdateStats(
        loss=total_loss,
        grad_norm=grad_norm,
        num_tokens=num_tokens,
        logprob_diff_mean=float(difference.mean()),
        logprob_diff_max=float(difference.max()),
        skipped=skipped,
        broken_questions=sorted(broken),
    )
