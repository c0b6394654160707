"""The run: config -> loop (questions, rollout, update, log, evaluate, checkpoint).

    uv run train.py [--config FILE] [--resume] [key.path=value ...]

Everything random is a function of (training.seed, purpose, step), so a run needs no random state to be resumed, and
evaluation draws from nobody's stream. A checkpoint stands between a step and the evaluation that follows it.
"""

import argparse
import dataclasses
import hashlib
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import yaml
from tqdm import tqdm

from checkpoint import (
    RunLock,
    checkpoint_path,
    checkpoints,
    find_damage,
    load_trainer_state,
    remove_half_written,
    save_checkpoint,
)
from config import Config, load_config
from data_types import Question
from evaluate import evaluate
from grpo import episode_advantages, rollout, update_policy
from metrics import evaluation_metrics, pick_samples, step_metrics
from optimizer import AdamW
from qwen2_model import Transformer
from runlog import RunLog
from tasks import guard_reward, load_task, make_question
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
    parser = argparse.ArgumentParser(description="Train a Qwen2.5 model with GRPO.")
    parser.add_argument("--config", default="config.yaml", help="YAML file with the hyperparameters (default: config.yaml)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in output_dir")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="for example training.learning_rate=5e-6")
    arguments = parser.parse_intermixed_args(argv)
    try:
        return Run(load_config(arguments.config, arguments.overrides), resume=arguments.resume).train()
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


class Run:
    def __init__(self, config: Config, *, resume: bool):
        self.config, self.directory = config, Path(config.output_dir)
        if config.model.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("model.device=cuda, but no CUDA device is here; train on the CPU with --config config_tiny.yaml")
        self.task = load_task(config.task)
        self.checkpoints = self.directory / "checkpoints"
        if (self.directory / "config.yaml").exists() and not resume:
            raise ValueError(f"output_dir={self.directory} holds a run already; go on with it by --resume, or choose another output_dir=…")
        if resume and not (self.directory / "config.yaml").exists():
            raise FileNotFoundError(f"output_dir={self.directory} holds no run to resume; start it without --resume")
        train_problems, test_problems = self.task.load_problems(config.data)
        model_directory = Path(config.model.path)
        if not model_directory.exists():
            self._make_base_model(model_directory)
        self.lock = RunLock(self.directory)
        saved, checkpoint = self._find_checkpoint() if resume else (None, None)
        source = checkpoint or model_directory
        self.tokenizer = Tokenizer.from_pretrained(source)
        self.model = Transformer.from_pretrained(source, device=config.model.device, dtype=getattr(torch, config.model.dtype))
        self.optimizer = AdamW(
            self.model.parameters(), lr=config.training.learning_rate, betas=tuple(config.optimizer.betas),
            eps=config.optimizer.eps, weight_decay=config.optimizer.weight_decay, offload=config.optimizer.offload,
        )  # fmt: skip
        if saved:
            self.optimizer.load_state_dict(saved["optimizer"])
        self.place = saved["place"] if saved else {"step": 0, "log_sizes": {}}
        self.place["config"] = dataclasses.asdict(config)
        self.train_problems, self.order = train_problems, None  # order: (number of the pass, its permutation)
        self.test_questions = [self._question(problem) for problem in test_problems]
        self._check_lengths()
        self.reward = guard_reward(self.task.reward_function, timeout=config.training.reward_timeout, errors=config.training.reward_errors)
        (self.directory / "config.yaml").write_text(yaml.safe_dump(self.place["config"], sort_keys=False))
        self.log = RunLog(self.directory, self.place["log_sizes"])
        self.signals = SignalWatch()
        self.skipped_in_a_row = 0

    def train(self) -> int:
        """Returns the process's exit code."""
        training = self.config.training
        first, last = self.place["step"], training.max_steps
        print(f"{self.directory}: {sum(p.numel() for p in self.model.parameters()) / 1e6:.1f} M weights, "
              f"{len(self.train_problems):,} training and {len(self.test_questions)} held-out questions, steps {first + 1} … {last}")
        try:
            for step in range(first + 1, last + 1):
                if (step - 1) % training.eval_interval == 0:
                    self._evaluate(step - 1)
                if (step - 1 - first) % 20 == 0:
                    print("  ".join(f"{column:>{len(form.format(0))}}" for column, (_, form) in CONSOLE.items()))
                self._step(step)
                if step % training.ckpt_save_interval == 0 or step == last:
                    self._save()
            self._evaluate(last)
        except Interrupted:
            self.log.close()
            if self.place["step"]:
                self._save()
            print(f"\ninterrupted after step {self.place['step']}; go on with the same command and --resume")
            return 128 + self.signals.received
        self.log.close()
        print(f"done: {checkpoint_path(self.checkpoints, last)} is a model directory")
        return 0

    def _step(self, step: int) -> None:
        training, clock = self.config.training, time.perf_counter()
        num_answers = training.batch_size // training.num_questions_per_batch
        questions = self._draw_questions(step)
        costs = []
        with self._bar("rollout", training.batch_size, "answer") as bar:
            episodes = rollout(
                self.model, self.tokenizer, questions, num_answers=num_answers, max_gen_len=training.max_gen_len,
                temperature=training.temperature, reward_function=self.reward, generator=self._generator("rollout", step),
                progress=lambda ended, _: bar(ended), on_stats=costs.append,
            )  # fmt: skip
        rollout_seconds = time.perf_counter() - clock
        with self._bar("update", None, "token") as bar:
            stats = update_policy(
                self.model, self.optimizer, episodes, max_grad_norm=training.max_grad_norm,
                skip_unfinished=training.skip_unfinished_episodes, temperature=training.temperature,
                vocab_size=self.tokenizer.vocab_size, micro_batch_tokens=training.micro_batch_tokens, progress=bar,
            )  # fmt: skip
        seconds = time.perf_counter() - clock
        metrics = {"step": step} | step_metrics(episodes, stats, learning_rate=self.optimizer.lr, num_answers=num_answers)
        self.log.write("metrics.jsonl", metrics)
        for sample in pick_samples(episodes, episode_advantages(episodes), [q.prompt for q in questions]):
            self.log.write("samples.jsonl", {"step": step} | sample)
        tokens = sum(len(e.response_token_ids) for e in episodes)
        self.log.write("timings.jsonl", {
            "step": step, "seconds": seconds, "seconds/prefill": costs[0].prefill_seconds, "seconds/decode": costs[0].decode_seconds,
            "seconds/reward": costs[0].reward_seconds, "seconds/update": seconds - rollout_seconds,
            "tokens_per_second/rollout": tokens / rollout_seconds, "wasted_row_steps": costs[0].wasted_row_steps / costs[0].row_steps,
        })  # fmt: skip
        print("  ".join(form.format((metrics | {"seconds": seconds})[key]) for key, form in CONSOLE.values())
              + (f"  no step: {stats.skipped}" if stats.skipped else ""), flush=True)
        self.place |= {"step": step, "log_sizes": self.log.sizes()}

    def _evaluate(self, step: int) -> None:
        with self._bar("evaluate", len(self.test_questions), "answer") as bar:
            episodes = evaluate(
                self.model, self.tokenizer, self.test_questions, max_gen_len=self.config.training.max_gen_len,
                reward_function=self.reward, generator=self._generator("evaluation", 0), progress=lambda ended, _: bar(ended),
            )  # fmt: skip
        metrics = evaluation_metrics(episodes)
        self.log.write("metrics.jsonl", {"step": step} | metrics)
        print(f"step {step}: {metrics['eval/success']:.1%} of {metrics['eval/questions']} held-out questions solved "
              f"(95 % interval {metrics['eval/success_low']:.1%} … {metrics['eval/success_high']:.1%}), "
              f"mean length {metrics['eval/mean_length']:.0f}", flush=True)

    def _save(self) -> None:
        save_checkpoint(self.checkpoints, self.place["step"], self.model, self.tokenizer, self.optimizer, self.place,
                        keep=self.config.training.keep_checkpoints)

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
        digest = hashlib.sha256(f"{self.config.training.seed}/{purpose}/{step}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    @contextmanager
    def _bar(self, name: str, total: int | None, unit: str) -> Iterator:
        """A progress bar on a terminal, gone when done; every advance is a moment at which a signal is heard."""
        with tqdm(desc=name, total=total, unit=unit, leave=False, disable=None) as bar:

            def advance(amount: int) -> None:
                bar.update(amount - bar.n if total else amount)
                self.signals.check()

            yield advance

    def _make_base_model(self, directory: Path) -> None:
        if self.config.warm_start is None:
            raise FileNotFoundError(
                f"model.path={directory} does not exist. Fetch the model with\n"
                f"  uv run hf download Qwen/{directory.name} --local-dir {directory}\n"
                "or train without any download: uv run train.py --config config_tiny.yaml"
            )
        from warm_start import make_base_model

        steps = self.config.warm_start.steps
        print(f"{directory} does not exist: making the small base model ({steps} supervised steps)")
        with tqdm(desc="warm start", total=steps, unit="step", leave=False, disable=None) as bar:

            def progress(step: int, loss: float) -> None:
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")

            make_base_model(self.config, progress=progress)

    def _find_checkpoint(self) -> tuple[dict | None, Path | None]:
        """The newest undamaged checkpoint, if this config may continue it."""
        remove_half_written(self.checkpoints)
        for checkpoint in reversed(checkpoints(self.checkpoints)):
            if damage := find_damage(checkpoint):
                print(f"passing over {checkpoint}: {damage}")
                continue
            saved = load_trainer_state(checkpoint)
            self._compare_config(saved["place"]["config"])
            print(f"resuming from {checkpoint}")
            return saved, checkpoint
        print("no checkpoint yet: starting over")
        return None, None

    def _compare_config(self, saved: dict) -> None:
        for key, old, new in _differences(saved, dataclasses.asdict(self.config)):
            if key.startswith(FIXED_KEYS):
                raise ValueError(f"{key} was {old!r} in the run to resume and is {new!r} now; it cannot change: restore it, or start "
                                 "a new run with another output_dir=…")
            print(f"note: {key} changes from {old!r} to {new!r}")

    def _check_lengths(self) -> None:
        questions = self.test_questions + self._draw_questions(1)
        longest = max(len(q.prompt_token_ids) for q in questions)
        limit = self.model.config.max_position_embeddings
        if longest + self.config.training.max_gen_len > limit:
            raise ValueError(f"a prompt of {longest} tokens and training.max_gen_len={self.config.training.max_gen_len} exceed the model's "
                             f"max_position_embeddings={limit}; lower training.max_gen_len to {limit - longest}")


def _differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple]:
    for key in old.keys() | new.keys():
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


if __name__ == "__main__":
    sys.exit(main())
