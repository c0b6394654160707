"""Score models on the held-out questions, let a person ask one, and look at the samples of a run.

    uv run evaluate.py MODEL [MODEL2] [--samples K] [--json FILE] [--config FILE] [key.path=value ...]
    uv run evaluate.py MODEL --ask "3 5 7 = 22"
    uv run evaluate.py RUN --show

MODEL is a model directory as published, a checkpoint, or a run, which stands for its newest checkpoint. A run and its
checkpoints bring their own config; for anything else it is config.yaml, unless --config names another.
"""

import argparse
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from statistics import fmean
from types import ModuleType

import torch
from tqdm import tqdm

from checkpoint import checkpoints, find_damage
from config import Config, load_config
from data_types import Episode, Question, Reward
from generate import log_probs, sample
from grpo import rollout
from metrics import paired_p_value, pass_at_k, success_interval
from qwen2_model import KVCache, Transformer
from runlog import printable
from tasks import guard_reward, load_task, make_question
from tokenizer import Tokenizer

GREEN, RED, DIM = "32", "31", "2"  # terminal attributes


def evaluate(
    model: Transformer, tokenizer: Tokenizer, questions: list[Question], *, max_gen_len: int,
    reward_function: Callable[..., Reward], generator: torch.Generator, samples: int = 1,
    progress: Callable[[int, int], None] = lambda ended, steps: None,
) -> list[Episode]:  # fmt: skip
    """Answers to held-out questions, sampled at temperature 1 whatever the training's; `samples` to each question."""
    return rollout(model, tokenizer, questions, num_answers=samples, max_gen_len=max_gen_len, temperature=1.0,
                   reward_function=reward_function, generator=generator, progress=progress)


def seeded_generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """Random numbers that are a function of these three and of nothing else."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------- what was measured


def summarize(episodes: list[Episode], problems: list[dict]) -> dict:
    """The figures of one model; problem i was answered by episodes i * K … (i + 1) * K - 1, with K samples each.

    An answer is a success if the part "answer" of its reward is 1. Intervals: see metrics.success_interval.
    """
    samples, counts = len(episodes) // len(problems), success_counts(episodes)
    sizes = [len(p["numbers"]) if isinstance(p.get("numbers"), list) else 0 for p in problems]

    def success(counts: list[int]) -> dict:
        low, high = success_interval(counts, samples)
        return {"questions": len(counts), "success": sum(counts) / (samples * len(counts)), "low": low, "high": high}

    return {
        **success(counts),
        "by_numbers": {n: success([c for c, size in zip(counts, sizes, strict=True) if size == n]) for n in sorted({*sizes} - {0})},
        "pass@k": {k: fmean(pass_at_k(samples, c, k) for c in counts)
                   for k in sorted({samples, *(2**i for i in range(samples.bit_length()))})},
        "reward": fmean(e.reward.total for e in episodes),
        "mean_length": fmean(len(e.response_token_ids) for e in episodes),
        "finished": fmean(float(e.is_finished) for e in episodes),
    }  # fmt: skip


def success_counts(episodes: list[Episode]) -> list[int]:
    """How many answers to each question succeeded."""
    counts = [0] * (1 + episodes[-1].question_id)
    for episode in episodes:
        counts[episode.question_id] += episode.reward.parts.get("answer", 0.0) == 1.0
    return counts


def compare(first: list[Episode], second: list[Episode]) -> dict:
    """The second model against the first, on the same questions and the same random numbers."""
    differences = [b - a for a, b in zip(success_counts(first), success_counts(second), strict=True)]
    return {"difference": sum(differences) / len(first), "p": paired_p_value(differences),
            "questions_better": sum(d > 0 for d in differences), "questions_worse": sum(d < 0 for d in differences)}  # fmt: skip


def table(names: list[str], summaries: list[dict]) -> str:
    """One column a model."""

    def success(s: dict) -> str:
        return f"{s['success']:.1%} ({s['low']:.1%} … {s['high']:.1%})"

    rows = [("", names), ("success, 95 % interval", [success(s) for s in summaries])]
    for n, part in summaries[0]["by_numbers"].items() if len(summaries[0]["by_numbers"]) > 1 else ():
        rows.append((f"  {n} numbers ({part['questions']} questions)", [success(s["by_numbers"][n]) for s in summaries]))
    rows += [(f"pass@{k}", [f"{s['pass@k'][k]:.1%}" for s in summaries]) for k in summaries[0]["pass@k"]]
    rows += [("mean reward", [f"{s['reward']:.3f}" for s in summaries]),
             ("mean length", [f"{s['mean_length']:.1f} tokens" for s in summaries]),
             ("finished", [f"{s['finished']:.1%}" for s in summaries])]  # fmt: skip
    widths = [max(len(label) for label, _ in rows), *(max(len(cells[i]) for _, cells in rows) for i in range(len(names)))]
    return "\n".join("  ".join(f"{cell:<{w}}" for cell, w in zip([label, *cells], widths, strict=True)).rstrip() for label, cells in rows)


def answer_record(episode: Episode, problem: dict) -> dict:
    """One answer as --json keeps it: everything that the figures are counted from."""
    return {"question": episode.question_id, "problem": problem, "success": episode.reward.parts.get("answer", 0.0) == 1.0,
            "reward": episode.reward.total, "parts": episode.reward.parts, "length": len(episode.response_token_ids),
            "finished": episode.is_finished, "text": episode.text}  # fmt: skip


# ---------------------------------------------------------------- models


def locate_model(path: str) -> tuple[Path, Path | None]:
    """The model directory that a path stands for, and the config of the run it comes from, if it comes from one."""
    directory = Path(path)
    if (directory / "config.json").exists():
        config = directory.parent.parent / "config.yaml" if directory.parent.name == "checkpoints" else None
        return directory, config
    whole = [checkpoint for checkpoint in checkpoints(directory / "checkpoints") if not find_damage(checkpoint)]
    if not whole:
        raise FileNotFoundError(f"{path} is neither a model directory (with config.json) nor a run with a checkpoint "
                                "(checkpoints/step-…); give one that is")
    return whole[-1], directory / "config.yaml"


def load_model(config: Config, directory: Path) -> tuple[Transformer, Tokenizer]:
    if config.model.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("model.device=cuda, but no CUDA device is here; add model.device=cpu")
    model = Transformer.from_pretrained(directory, device=config.model.device, dtype=getattr(torch, config.model.dtype))
    return model, Tokenizer.from_pretrained(directory)


def score(config: Config, task: ModuleType, problems: list[dict], directory: Path, samples: int) -> list[Episode]:
    """Answers of one model. The random numbers are those of the evaluations in train.py, the same for every model."""
    model, tokenizer = load_model(config, directory)
    questions = [make_question(task, problem, tokenizer) for problem in problems]
    reward = guard_reward(task.reward_function, timeout=config.training.reward_timeout, errors=config.training.reward_errors)
    with tqdm(desc=str(directory), total=len(questions) * samples, unit="answer", leave=False, disable=None) as bar:
        return evaluate(model, tokenizer, questions, max_gen_len=config.training.max_gen_len, reward_function=reward, samples=samples,
                        generator=seeded_generator(config.training.seed, "evaluation"), progress=lambda ended, _: bar.update(ended - bar.n))


# ---------------------------------------------------------------- one question, thought aloud


def ask(config: Config, task: ModuleType, directory: Path, text: str) -> None:
    """Print the model's answer to a question as it comes, then what the task makes of it."""
    if not hasattr(task, "parse_question"):
        raise ValueError(f"--ask: task={config.task} lacks parse_question(text) -> problem; add it to the task's file")
    problem = task.parse_question(text)
    model, tokenizer = load_model(config, directory)
    question, max_gen_len = make_question(task, problem, tokenizer), config.training.max_gen_len
    print(printable(question.prompt.rpartition("\n")[2]), end="", flush=True)
    ids, answer = [], ""
    generator = seeded_generator(config.training.seed, "ask")
    for piece in text_pieces(stream(model, tokenizer, question.prompt_token_ids, max_gen_len=max_gen_len, generator=generator, seen=ids), tokenizer.decode):
        answer += piece
        print(printable(piece), end="", flush=True)
