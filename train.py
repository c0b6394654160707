"""The run: config -> loop (questions, rollout, update, log, evaluate, checkpoint).

    uv run train.py [--config FILE] [--resume | --plan] [key.path=value ...]

Everything random is a function of (training.seed, purpose, step), so a run needs no random state to be resumed, and
evaluation draws from nobody's stream. A checkpoint stands between a step and the evaluation that follows it.
"""

import argparse
import dataclasses
import json
import math
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import fmean

import torch
import yaml
from tqdm import tqdm

from data_types import Question, UpdateStats
from evaluate import evaluate, seeded_generator
from grpo import episode_advantages, rollout, update_policy
from harness.checkpoint import (
    checkpoint_path,
    checkpoints,
    find_damage,
    load_trainer_state,
    lock_directory,
    remove_half_written,
    save_checkpoint,
)
from harness.config import Config, load_config
from harness.logs import RunLog
from harness.metrics import evaluation_metrics, pick_samples, smells, step_metrics
from harness.plan import GIB, find_shape, make_plan, prepare_process
from harness.tasks import guard_reward, load_task, make_question
from optimizer import AdamW
from qwen2_model import Qwen2Config, Transformer
from tokenizer import Tokenizer

# What a resumed run may not change: it would no longer be the same run.
FIXED_KEYS = ("task", "data", "model.dtype", "training.seed", "training.batch_size", "training.num_questions_per_batch")
CONSOLE = {  # column: (metric, format)
    "step": ("step", "{:>5d}"), "reward": ("reward", "{:7.3f}"), "success": ("rewards/answer", "{:8.1%}"),
    "format": ("rewards/format", "{:7.1%}"), "equal": ("frac_reward_zero_std", "{:6.0%}"),
    "length": ("completions/mean_length", "{:7.1f}"), "cut off": ("completions/clipped_ratio", "{:8.1%}"),
    "entropy": ("entropy", "{:8.3f}"), "|grad|": ("grad_norm", "{:7.3f}"), "Δlogp": ("sampling/logp_difference_mean", "{:8.1e}"),
    "s/step": ("seconds", "{:7.2f}"),
}  # fmt: skip


class RunStopped(Exception):
    """The run cannot go on; its last checkpoint is good."""


class Interrupted(BaseException):
    """A signal asked the run to stop; raised where nothing half-done is lost."""


class SignalWatch:
    """Remembers the first SIGINT or SIGTERM, to be acted on at the next token or micro-batch; a second ends the process."""

    def __init__(self):
        self.received = None
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._receive)

    def _receive(self, signum, frame) -> None:
        self.received = signum
        for s in (signal.SIGINT, signal.SIGTERM):
            signal.signal(s, signal.SIG_DFL)

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted


def main(argv: list[str] | None = None) -> int:
    """Exit code: 0, 1 for a run that had to stop, 2 for what the user can mend, 128 + n for signal n."""
    parser = argparse.ArgumentParser(description="Train a Qwen2.5 model with GRPO.")
    parser.add_argument("--config", default="config.yaml", help="YAML file with the hyperparameters (default: config.yaml)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in output_dir")
    parser.add_argument("--plan", action="store_true", help="print the memory that the run would need, and end")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for example training.learning_rate=5e-6")
    arguments = parser.parse_intermixed_args(argv)
    signals = SignalWatch()
    try:
        config = load_config(arguments.config, arguments.overrides)
        if arguments.plan:
            print(make_plan(config, find_shape(config.model.path)).table())
            return 0
        prepare_process(config.model.device)
        with lock_directory(Path(config.output_dir)):
            return Run(config, signals, resume=arguments.resume).train()
    except Interrupted:
        return 128 + signals.received
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunStopped, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


class Run:
    def __init__(self, config: Config, signals: SignalWatch, *, resume: bool):
        self.config, self.signals, self.directory = config, signals, Path(config.output_dir)
        self.checkpoints = self.directory / "checkpoints"
        has_run = (self.directory / "config.yaml").exists()
        if has_run and not resume:
            raise ValueError(f"output_dir={self.directory} holds a run; go on with it by --resume, or choose another output_dir=…")
        if resume and not has_run:
            raise FileNotFoundError(f"output_dir={self.directory} holds no run to resume; start it without --resume")
        checkpoint = self._find_checkpoint() if resume else None
        saved = load_trainer_state(checkpoint) if checkpoint else None
        if saved:
            self._compare_config(saved["place"]["config"])
        self.task = load_task(config.task)
        self.reward = guard_reward(
            self.task.reward_function, timeout=config.training.reward_timeout, errors=config.training.reward_errors
        )
        self.train_problems, test_problems = self.task.load_problems(config.data)
        if checkpoint is None and not Path(config.model.path).exists():
            self._make_base_model(Path(config.model.path))
        self._load(checkpoint or Path(config.model.path), saved)
        self.peaks = {}  # bytes, of the latest rollout and update
        self.recent, self.warned = [], set()  # figures of the last twenty steps; warnings given
        self.order = None  # (number of the pass over the training problems, its permutation)
        self.test_questions = [self._question(problem) for problem in test_problems]
        self._check_lengths()
        self.place = saved["place"] if saved else {"step": 0, "log_sizes": {}}
        self.place["config"] = dataclasses.asdict(config)
        (self.directory / "config.yaml").write_text(yaml.safe_dump(self.place["config"], sort_keys=False))
        self.log = RunLog(self.directory, self.place["log_sizes"])

    def _load(self, source: Path, saved: dict | None) -> None:
        config = self.config
        self.plan = make_plan(config, Qwen2Config.from_json(source / "config.json"))
        self.tokenizer = Tokenizer.from_pretrained(source)
        self.model = Transformer.from_pretrained(source, device=config.model.device, dtype=getattr(torch, config.model.dtype))
        if self.tokenizer.vocab_size > self.model.config.vocab_size:
            raise ValueError(f"{source}: the tokenizer has {self.tokenizer.vocab_size} entries, the model only "
                             f"{self.model.config.vocab_size} rows; they belong to different models")
        self.optimizer = AdamW(
            self.model.parameters(), lr=config.training.learning_rate, betas=tuple(config.optimizer.betas),
            eps=config.optimizer.eps, weight_decay=config.optimizer.weight_decay, offload=config.optimizer.offload,
        )  # fmt: skip
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])

    def train(self) -> int:
        """Returns the process's exit code."""
        training = self.config.training
        first, last = self.place["step"], training.max_steps
        print(f"{self.directory}: {sum(p.numel() for p in self.model.parameters()) / 1e6:,.1f} M weights, "
              f"{len(self.train_problems):,} training and {len(self.test_questions)} held-out questions, {last} steps")
        skipped_in_a_row = 0
        bar = tqdm(desc="run", initial=first, total=last, unit="step", position=1, leave=False, disable=None)
        try:
            for step in range(first + 1, last + 1):
                if (step - 1) % training.eval_interval == 0:
                    self._evaluate(step - 1)
                if (step - 1 - first) % 20 == 0:
                    tqdm.write("  ".join(f"{column:>{len(form.format(0))}}" for column, (_, form) in CONSOLE.items()))
                stats = self._step(step)
                bar.update()
                skipped_in_a_row = skipped_in_a_row + 1 if stats.broken_questions else 0
                if step % training.ckpt_save_interval == 0 or step == last or skipped_in_a_row == training.max_skipped_steps:
                    self._save()
                if skipped_in_a_row == training.max_skipped_steps:
                    raise RunStopped(f"{skipped_in_a_row} steps in a row were skipped: {stats.skipped} (questions "
                                     f"{stats.broken_questions}); {self.checkpoints} has the weights of the last good step")
                if step == first + 2:
                    self._report_cost(last - step)
            self._evaluate(last)
        except Interrupted:
            if self.place["step"]:
                self._save()
            print(f"\ninterrupted after step {self.place['step']}; go on with the same command and --resume")
            return 128 + self.signals.received
        except torch.OutOfMemoryError as error:
            raise RunStopped(f"the GPU's memory is full in the {self.phase} ({str(error).splitlines()[0]}); lower "
                             "model.memory_gib, which makes the plan smaller, and --resume. The plan was\n"
                             + self.plan.table()) from None
        finally:
            bar.close()
            self.log.close()
        self._report_outcome()
        return 0

    def _step(self, step: int) -> UpdateStats:
        training = self.config.training
        num_answers = training.batch_size // training.num_questions_per_batch
        questions, costs = self._draw_questions(step), []
        with self._phase("rollout", training.batch_size, "answer") as (bar, rollout_cost):
            episodes = rollout(
                self.model, self.tokenizer, questions, num_answers=num_answers, max_gen_len=training.max_gen_len,
                temperature=training.temperature, reward_function=self.reward, generator=self._generator("rollout", step),
                cache_bytes=self.plan.cache_bytes, progress=lambda ended, _: bar(ended), on_stats=costs.append,
            )  # fmt: skip
        with self._phase("update", None, "token") as (bar, update_cost):
            stats = update_policy(
                self.model, self.optimizer, episodes, max_grad_norm=training.max_grad_norm,
                skip_unfinished=training.skip_unfinished_episodes, temperature=training.temperature,
                vocab_size=self.tokenizer.vocab_size, micro_batch_tokens=training.micro_batch_tokens,
                checkpoint_layers=self.plan.checkpoint_layers, progress=bar,
            )  # fmt: skip
        metrics = {"step": step} | step_metrics(episodes, stats, learning_rate=self.optimizer.lr, num_answers=num_answers)
        self.log.write("metrics.jsonl", metrics)
        for sample in pick_samples(episodes, episode_advantages(episodes), [q.prompt for q in questions]):
            self.log.write("samples.jsonl", {"step": step} | sample)
        seconds = rollout_cost["seconds"] + update_cost["seconds"]
        self.log.write("timings.jsonl", {
            "step": step, "seconds": seconds,
            "seconds/prefill": costs[0].prefill_seconds, "seconds/decode": costs[0].decode_seconds,
            "seconds/reward": costs[0].reward_seconds, "seconds/gradient": stats.gradient_seconds,
            "seconds/optimizer": stats.optimizer_seconds,
            "tokens_per_second/rollout": sum(len(e.response_token_ids) for e in episodes) / rollout_cost["seconds"],
            "tokens_per_second/update": stats.tokens_run / update_cost["seconds"],
            "wasted_row_steps": costs[0].wasted_row_steps / costs[0].row_steps,
            "memory/rollout": rollout_cost["peak_bytes"] / GIB, "memory/update": update_cost["peak_bytes"] / GIB,
        })  # fmt: skip
        shown = metrics | {"seconds": seconds}
        tqdm.write("  ".join(form.format(shown.get(key, math.nan)) for key, form in CONSOLE.values())
                   + (f"  no step: {stats.skipped}" if stats.skipped else ""))
        self.recent = [*self.recent[-19:], shown]
        for warning in smells(self.recent) - self.warned:
            tqdm.write(f"warning: {warning}")
            self.warned.add(warning)
        self.place |= {"step": step, "log_sizes": self.log.sizes()}
        return stats

    def _evaluate(self, step: int) -> None:
        with self._phase("evaluation", len(self.test_questions), "answer") as (bar, cost):
            episodes = evaluate(
                self.model, self.tokenizer, self.test_questions, max_gen_len=self.config.training.max_gen_len,
                reward_function=self.reward, generator=self._generator("evaluation", 0),
                cache_bytes=self.plan.evaluation_cache_bytes, progress=lambda ended, _: bar(ended),
            )  # fmt: skip
        metrics = evaluation_metrics(episodes)
        self.log.write("metrics.jsonl", {"step": step} | metrics)
        self.log.write("timings.jsonl", {"step": step, "seconds/evaluation": cost["seconds"]})
        tqdm.write(f"step {step}: {_success(metrics)}, mean length {metrics['eval/mean_length']:.0f}")

    def _save(self) -> None:
        clock = time.perf_counter()
        save_checkpoint(self.checkpoints, self.place["step"], self.model, self.tokenizer, self.optimizer, self.place,
                        keep=self.config.training.keep_checkpoints)
        self.log.write("timings.jsonl", {"step": self.place["step"], "seconds/checkpoint": time.perf_counter() - clock})

    def _report_cost(self, steps_left: int) -> None:
        """After two steps: what a step takes, and the plan against what was measured."""
        per_step = fmean(shown["seconds"] for shown in self.recent)
        tqdm.write(f"about {per_step:.1f} s a step: {steps_left * per_step / 3600:.2f} hours to go")
        if self.config.model.device == "cuda":
            peaks = {"rollout": self.peaks["rollout"], "update": self.peaks["update"]}
            for phase, peak in peaks.items():
                planned = sum(getattr(self.plan, phase).values())
                tqdm.write(f"{phase}: {peak / GIB:.2f} GiB at the peak, {planned / GIB:.2f} planned")

    def _report_outcome(self) -> None:
        with open(self.directory / "metrics.jsonl") as f:
            evaluations = [record for record in map(json.loads, f) if "eval/success" in record]
        print(f"before: {_success(evaluations[0])}\nafter:  {_success(evaluations[-1])}")
        print(f"{checkpoint_path(self.checkpoints, self.place['step'])} is the trained model, in the published format")

    def _draw_questions(self, step: int) -> list[Question]:
        """The questions of a step: the next ones of a shuffled pass over the training problems, and so on pass after pass."""
        count, total = self.config.training.num_questions_per_batch, len(self.train_problems)
        questions = []
        for place in range((step - 1) * count, step * count):
            if self.order is None or self.order[0] != place // total:
                self.order = place // total, torch.randperm(total, generator=self._generator("order", place // total))
            questions.append(self._question(self.train_problems[int(self.order[1][place % total])]))
        return questions

    def _question(self, problem: dict) -> Question:
        return make_question(self.task, problem, self.tokenizer)

    def _generator(self, purpose: str, step: int) -> torch.Generator:
        return seeded_generator(self.config.training.seed, purpose, step)

    @contextmanager
    def _phase(self, name: str, total: int | None, unit: str) -> Iterator:
        """Time and peak memory of a phase, and a progress bar on a terminal, gone when done.

        Every advance of the bar is a moment at which a signal is heard.
        """
        self.phase, cost, clock = name, {}, time.perf_counter()
        on_cuda = self.config.model.device == "cuda"
        if on_cuda:
            torch.cuda.reset_peak_memory_stats()
        with tqdm(desc=name, total=total, unit=unit, position=0, leave=False, disable=None) as bar:

            def advance(amount: int) -> None:
                bar.update(amount - bar.n if total else amount)
                self.signals.check()

            yield advance, cost
        if on_cuda:
            torch.cuda.synchronize()
        cost["seconds"] = time.perf_counter() - clock
        cost["peak_bytes"] = torch.cuda.max_memory_allocated() if on_cuda else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
        self.peaks[name] = cost["peak_bytes"]

    def _make_base_model(self, directory: Path) -> None:
        if self.config.warm_start is None:
            raise FileNotFoundError(
                f"model.path={directory} does not exist. Fetch the model with\n"
                f"  uv run hf download Qwen/{directory.name} --local-dir {directory}\n"
                "or train without any download: uv run train.py --config config_tiny.yaml"
            )
        from warm_start import make_base_model

        steps = self.config.warm_start.steps
        print(f"{directory} does not exist: making the small base model ({steps} supervised steps, some minutes)")
        with tqdm(desc="warm start", total=steps, unit="step", leave=False, disable=None) as bar:

            def progress(step: int, loss: float) -> None:
                self.signals.check()
                bar.update()
                if step % 100 == 99:
                    tqdm.write(f"supervised step {step + 1} of {steps}: loss {loss:.3f}")

            make_base_model(self.config, progress=progress)

    def _find_checkpoint(self) -> Path | None:
        """The newest undamaged checkpoint of this run."""
        remove_half_written(self.checkpoints)
        for checkpoint in reversed(checkpoints(self.checkpoints)):
            if damage := find_damage(checkpoint):
                print(f"passing over {checkpoint}: {damage}")
                continue
            print(f"resuming from {checkpoint}")
            return checkpoint
        if checkpoints(self.checkpoints):
            raise ValueError(f"every checkpoint in {self.checkpoints} is damaged; put a good one back, or remove them all "
                             "to start over")
        print("no checkpoint yet: starting over")
        return None

    def _compare_config(self, saved: dict) -> None:
        for key, old, new in _differences(saved, dataclasses.asdict(self.config)):
            if key.startswith(FIXED_KEYS):
                raise ValueError(f"{key} was {old!r} in the run to resume and is {new!r} now; it cannot change: restore it, or "
                                 "start a new run with another output_dir=…")
            print(f"note: {key} changes from {old!r} to {new!r}")

    def _check_lengths(self) -> None:
        questions = self.test_questions + self._draw_questions(1)
        longest = max(len(q.prompt_token_ids) for q in questions)
        limit = self.model.config.max_position_embeddings
        if longest + self.config.training.max_gen_len > limit:
            raise ValueError(f"a prompt of {longest} tokens and training.max_gen_len={self.config.training.max_gen_len} exceed the "
                             f"model's max_position_embeddings={limit}; lower training.max_gen_len to {limit - longest}")


def _success(metrics: dict) -> str:
    return (f"{metrics['eval/success']:.1%} of {metrics['eval/questions']} held-out questions solved "
            f"(95 % interval {metrics['eval/success_low']:.1%} … {metrics['eval/success_high']:.1%})")


def _differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple]:
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # a log file shows each step when it is done
    sys.exit(main())
