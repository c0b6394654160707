"""GRPO training: draw questions, sample a group of answers to each, score them, take one step.

    uv run train.py [--config FILE] [--resume | --plan [CARDS] | --try-task] [key.path=value ...]

grpo.py has the algorithm and its equations; this is the loop.

`run` (harness/run.py) takes care of everything around it: it locks the output directory, writes
logs and checkpoints, and loads the task that the config names. After a stop signal, the next
progress.update raises an exception, which leaves the block `with Run()`; `run` then saves a
checkpoint and sets the exit code.

A resumed run loads its last good checkpoint, truncates its logs to that step and repeats everything
after it, including an evaluation that followed the checkpoint. The seed, the purpose of a draw and
the step determine each random number, so on a CPU its results equal those of an uninterrupted run
bit for bit.
"""

import os
import sys

# Before torch reads it: a thread that waits for another spins for microseconds, then sleeps. With
# GNU OpenMP's default, a step beside another busy program takes ten times as long (bench/LOG.md).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from generate import seeded_generator
from grpo import draw_problems, make_question, rollout, update_policy
from harness.run import Run
from optimizer import AdamW
from qwen2_model import Transformer
from tokenizer import Tokenizer


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0: success, 1: the run had to stop, 2: user error, 128 + n: signal n."""
    with Run() as run:
        run.open(argv)
        config, task, training = run.config, run.task, run.config.training
        dtype = getattr(torch, config.model.dtype)
        # model_dir is the base model, or the checkpoint that is resumed.
        tokenizer = Tokenizer.from_pretrained(run.model_dir)
        model = Transformer.from_pretrained(run.model_dir, device=config.model.device, dtype=dtype)
        optimizer = AdamW(
            model.parameters(),
            lr=training.learning_rate,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            offload=config.optimizer.offload,
            world=run.world,
        )
        train_problems, test_problems = run.problems
        held_out = [make_question(task, problem, tokenizer) for problem in test_problems]
        run.begin(model, tokenizer, optimizer)
        num_answers = training.batch_size // training.num_questions_per_batch

        def evaluate(step: int) -> None:
            """Sample one answer to each held-out question, always with the same random numbers."""
            with run.progress("evaluation") as progress:
                episodes = rollout(
                    model,
                    tokenizer,
                    held_out,
                    num_answers=1,
                    max_gen_len=training.max_gen_len,
                    temperature=1.0,
                    reward_function=run.reward,
                    generator=seeded_generator(training.seed, "evaluation"),
                    cache_bytes=run.plan.evaluation_cache_bytes,
                    world=run.world,
                    progress=progress,
                )
            run.log_evaluation(step, episodes)

        for step in run.steps():
            if (step - 1) % training.eval_interval == 0:
                evaluate(step - 1)
            problems = draw_problems(
                train_problems, step, count=training.num_questions_per_batch, seed=training.seed
            )
            questions = [make_question(task, problem, tokenizer) for problem in problems]
            with run.progress("rollout") as progress:
                episodes = rollout(
                    model,
                    tokenizer,
                    questions,
                    num_answers=num_answers,
                    max_gen_len=training.max_gen_len,
                    temperature=training.temperature,
                    reward_function=run.reward,
                    generator=seeded_generator(training.seed, "rollout", step),
                    cache_bytes=run.plan.cache_bytes,
                    world=run.world,
                    progress=progress,
                )
            # A linear warm-up, then a constant learning rate.
            warmup = min(1.0, step / max(1, training.warmup_steps))
            optimizer.lr = training.learning_rate * warmup
            with run.progress("update") as progress:
                stats = update_policy(
                    model,
                    optimizer,
                    episodes,
                    max_grad_norm=training.max_grad_norm,
                    skip_unfinished=training.skip_unfinished_episodes,
                    temperature=training.temperature,
                    vocab_size=tokenizer.vocab_size,
                    micro_batch_tokens=training.micro_batch_tokens,
                    recompute_layers=run.plan.recompute_layers,
                    world=run.world,
                    progress=progress,
                )
            # Also saves a checkpoint when one is due.
            run.finish_step(step, questions, episodes, stats)
        evaluate(training.max_steps)
    return run.exit_code


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # so that a log file shows each step at once
    sys.exit(main())
