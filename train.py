"""GRPO (Group Relative Policy Optimization), the whole loop: draw questions, sample a group of answers to each, score them, learn.

    uv run train.py [--config FILE] [--resume | --plan [CARDS] | --check] [key.path=value ...]

An answer's advantage is its reward less the mean of its group, in units of the group's standard deviation (group_advantages). The
update raises the log-probability of each token in proportion to its answer's advantage, and lowers it where that is negative. The
group takes the place of a value network; with one step a batch there is no ratio to clip; why there is no KL term: grpo.py.

Everything else about a run is the business of `run` (harness/run.py): it locks the output directory, writes logs and checkpoints,
and where a signal asks it to stop it raises an exception that ends the `with` block and no more. A resumed run goes on from its
last good checkpoint: it cuts its logs back to that step and makes the steps after it again, on a CPU with the same result to the
bit, because all that is random follows from the seeds, a purpose and the step (in an evaluation: from the first two).
"""

import sys

import torch

from generate import seeded_generator
from grpo import rollout, update_policy
from harness.run import Run
from harness.tasks import draw_problems, make_question
from optimizer import AdamW
from qwen2_model import Transformer
from tokenizer import Tokenizer


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 for a run that had to stop (the disk is full), 2 for what the user can mend, 128 + n for signal n."""
    with Run() as run:
        config = run.open(argv)
        training, task = config.training, run.task
        tokenizer = Tokenizer.from_pretrained(
            run.source
        )  # of the base model, or of the checkpoint to go on from
        model = Transformer.from_pretrained(
            run.source, device=config.model.device, dtype=getattr(torch, config.model.dtype)
        )
        optimizer = AdamW(
            model.parameters(),
            lr=training.learning_rate,
            betas=tuple(config.optimizer.betas),
            eps=config.optimizer.eps,
            weight_decay=config.optimizer.weight_decay,
            offload=config.optimizer.offload,
            processes=run.processes,
        )
        train_problems, test_problems = run.problems
        held_out = [make_question(task, problem, tokenizer) for problem in test_problems]
        run.begin(
            model, tokenizer, optimizer, held_out
        )  # they fit together, or it raises; restores the optimizer
        num_answers = (
            training.batch_size // training.num_questions_per_batch
        )  # to each question; batch_size counts answers

        def evaluate(step: int) -> None:
            """One answer to each held-out question, at temperature 1, with the same random numbers each time."""
            with run.phase("evaluation") as watch:
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
                    watch=watch,
                )
            run.log_evaluation(step, episodes)

        for step in run.steps():
            if (step - 1) % training.eval_interval == 0:
                evaluate(
                    step - 1
                )  # the model after step - 1; a resumed run does it again, its line has been cut off
            problems = draw_problems(
                train_problems, step, count=training.num_questions_per_batch, seed=training.seed
            )
            questions = [make_question(task, problem, tokenizer) for problem in problems]
            with run.phase("rollout") as watch:
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
                    watch=watch,
                )
            optimizer.lr = training.learning_rate * min(
                1.0, step / max(1, training.warmup_steps)
            )  # warm-up, then constant
            with run.phase("update") as watch:
                stats = update_policy(
                    model,
                    optimizer,
                    episodes,
                    max_grad_norm=training.max_grad_norm,
                    skip_unfinished=training.skip_unfinished_episodes,
                    temperature=training.temperature,
                    vocab_size=tokenizer.vocab_size,
                    micro_batch_tokens=training.micro_batch_tokens,
                    checkpoint_layers=run.plan.checkpoint_layers,
                    watch=watch,
                )
            run.log_step(step, questions, episodes, stats)  # and saves a checkpoint when one is due
        evaluate(training.max_steps)
    return run.exit_code


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each step when it is done
    sys.exit(main())
