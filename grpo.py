"""Group Relative Policy Optimization: rollout -> advantages -> loss -> one policy-gradient step.

Dimension key: N questions, M answers a question, B = N * M answers, S tokens, T = S - 1 targets, V vocabulary.
"""

import math
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from data_types import Episode, Question, Reward, UpdateStats
from qwen2_model import KVCache, Transformer
from tokenizer import Tokenizer


def log_probs(logits_PV: Tensor, temperature: float, vocab_size: int) -> Tensor:
    return F.log_softmax(logits_PV[:, :vocab_size] / temperature, dim=-1)


@torch.no_grad()
def rollout(model: Transformer, tokenizer: Tokenizer, questions: list[Question], *, num_answers: int, max_gen_len: int,
            temperature: float, reward_function: Callable[..., Reward], generator: torch.Generator) -> list[Episode]:
    device = model.head_weight_VE.device
    rows = [q for q in questions for _ in range(num_answers)]
    B, longest = len(rows), max(len(q.prompt_token_ids) for q in rows)
    cache = KVCache(model.config, batch_size=B, max_len=longest + max_gen_len, device=device, dtype=model.head_weight_VE.dtype)
    prompts_BS = torch.full((B, longest), tokenizer.pad_id, device=device)
    lengths_B = torch.tensor([len(q.prompt_token_ids) for q in rows], device=device)
    for b, q in enumerate(rows):
        prompts_BS[b, : len(q.prompt_token_ids)] = torch.tensor(q.prompt_token_ids)
    uniforms_BG = torch.rand(B, max_gen_len, generator=generator).to(device)
    logits_BV = model.next_token_logits(prompts_BS, cache, lengths_B=lengths_B)
    ids, logps, ents = [], [], []
    done_B = torch.zeros(B, dtype=torch.bool)
    stop = torch.tensor(sorted(tokenizer.stop_ids))
    for t in range(max_gen_len):
        lp = log_probs(logits_BV, temperature, tokenizer.vocab_size)
        p = lp.exp()
        cdf = p.cumsum(-1)
        token_B = torch.searchsorted(cdf, uniforms_BG[:, t : t + 1] * cdf[:, -1:], right=True)[:, 0].clamp(max=tokenizer.vocab_size - 1)
        ids.append(token_B)
        logps.append(lp.gather(1, token_B[:, None])[:, 0])
        ents.append(-(p * lp).sum(-1))
        done_B |= torch.isin(token_B, stop)
        if done_B.all() or t == max_gen_len - 1:
            break
        logits_BV = model.next_token_logits(token_B[:, None], cache)
    ids, logps, ents = torch.stack(ids, 1).tolist(), torch.stack(logps, 1).tolist(), torch.stack(ents, 1).tolist()
    episodes = []
    for b, q in enumerate(rows):
        n = next((i + 1 for i, x in enumerate(ids[b]) if x in tokenizer.stop_ids), len(ids[b]))
        finished = ids[b][n - 1] in tokenizer.stop_ids
        text = tokenizer.decode(ids[b][: n - 1] if finished else ids[b][:n])
        episodes.append(Episode(b // num_answers, q.prompt_token_ids, ids[b][:n], logps[b][:n], finished, text,
                                reward_function(text, **q.problem), sum(ents[b][:n]) / n))
    return episodes


def group_advantages(rewards_NM: Tensor, eps: float = 1e-4) -> Tensor:
    """Standardise rewards within each question's group (DeepSeekMath, arXiv:2402.03300, eq. 3).

    rewards_NM: N questions x M answers. Population standard deviation.
    Returns float32 (N, M), unitless; exactly 0 for a group whose rewards are all equal.
    Raises ValueError if M < 2: a group of one has nothing to compare with.
    """
    if rewards_NM.ndim != 2 or rewards_NM.shape[1] < 2:
        raise ValueError(f"rewards of shape {tuple(rewards_NM.shape)}; wanted (questions, answers) with at least 2 answers")
    rewards_NM = rewards_NM.float()
    centred_NM = rewards_NM - rewards_NM.mean(dim=1, keepdim=True)
    advantages_NM = centred_NM / (rewards_NM.std(dim=1, keepdim=True, correction=0) + eps)
    equal_N1 = (rewards_NM == rewards_NM[:, :1]).all(dim=1, keepdim=True)
    return advantages_NM.masked_fill(equal_N1, 0.0)  # the rounding of the mean must not become an advantage


def episode_advantages(episodes: list[Episode]) -> list[float]:
    groups: dict[int, list[int]] = {}
    for i, e in enumerate(episodes):
        groups.setdefault(e.question_id, []).append(i)
    adv = [0.0] * len(episodes)
    for members in groups.values():
        for i, a in zip(members, group_advantages(torch.tensor([[episodes[i].reward.total for i in members]]))[0].tolist(), strict=True):
            adv[i] = a
    return adv


def update_policy(model: Transformer, optimizer: torch.optim.Optimizer, episodes: list[Episode], *, max_grad_norm: float,
                  skip_unfinished: bool, temperature: float = 1.0, vocab_size: int | None = None, micro_batch_size: int = 32) -> UpdateStats:
    vocab_size = vocab_size or model.config.vocab_size
    adv = episode_advantages(episodes)
    kept = [(e, a) for e, a in zip(episodes, adv, strict=True) if e.is_finished or not skip_unfinished]
    count = sum(len(e.response_token_ids) for e, _ in kept)
    loss = diff = 0.0
    dmax = 0.0
    kept.sort(key=lambda x: len(x[0].response_token_ids))
    for i in range(0, len(kept), micro_batch_size):
        part = kept[i : i + micro_batch_size]
        S = max(len(e.prompt_token_ids) + len(e.response_token_ids) for e, _ in part)
        tokens = torch.zeros(len(part), S, dtype=torch.long)
        mask = torch.zeros(len(part), S)
        old = torch.zeros(len(part), S)
        for b, (e, a) in enumerate(part):
            n, m = len(e.prompt_token_ids), len(e.response_token_ids)
            tokens[b, : n + m] = torch.tensor(e.prompt_token_ids + e.response_token_ids)
            mask[b, n : n + m] = 1
            old[b, n : n + m] = torch.tensor(e.response_logprobs)
        A = torch.tensor([a for _, a in part])
        lp = log_probs(model(tokens[:, :-1]).flatten(0, 1), temperature, vocab_size)
        lp = lp.gather(1, tokens[:, 1:].flatten()[:, None]).view(len(part), -1)
        L = -(lp * mask[:, 1:] * A[:, None]).sum() / count
        L.backward()
        loss += L.item()
        d = ((lp.detach() - old[:, 1:]).abs() * mask[:, 1:])
        diff += d.sum().item(); dmax = max(dmax, d.max().item())
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm).item()
    optimizer.step()
    optimizer.zero_grad()
    return UpdateStats(loss, norm, count, diff / count, dmax)
