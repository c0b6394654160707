"""A run: everything around the loop of train.py, so that it can run unattended for days.

It locks the output directory, handles signals, writes logs and checkpoints, resumes, and turns
every way to end into one message and an exit code. A checkpoint is taken between a step and the
evaluation that follows it.
"""

import argparse
import contextlib
import math
import os
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

import gpu
from data_types import Episode, Question, SingleProcess, UpdateStats
from flat import norm
from grpo import draw_problems, episode_advantages, make_question
from harness import console, cpu
from harness.checkpoint import (
    NotSaved,
    TrainerState,
    checkpoint_path,
    checkpoints,
    find_checkpoint,
    raise_on_all_ranks,
    save_checkpoint,
)
from harness.config import Config, as_yaml, load_config
from harness.cuda import check_cuda, is_out_of_memory, why_no_cuda
from harness.distributed import RankFailure, RankLost, Torchrun
from harness.log import RunLog
from harness.metrics import (
    RECENT_STEPS,
    diagnose,
    evaluation_metrics,
    keeps_samples,
    pick_samples,
    step_metrics,
)
from harness.plan import GIB, absent_model, find_shape, make_plan
from harness.process import Interrupted, OutputLock, Signals
from harness.rewards import isolated_reward, load_problems, load_task, try_task
from optimizer import AdamW
from published_format import read_json
from qwen2_model import Qwen2Config, Transformer
from tokenizer import Tokenizer

# Ranks may differ in these: each machine has its own paths and memory.
LOCAL_KEYS = ("output_dir", "model.path", "model.memory_gib", "data.path")

# A resumed run may not change these: it would be a different run.
FIXED_KEYS = (
    "task",
    "data",
    "model.dtype",
    "training.seed",
    "training.batch_size",
    "training.num_questions_per_batch",
)
SUCCESS = ("eval/success", "eval/success_low", "eval/success_high", "eval/questions")
TINY_RUN = "uv run train.py --config config_tiny.yaml"
UNEXPECTED = 70  # exit code for a bug in this program; Python prints its traceback


class Finished(Exception):
    """The program has done what it was asked for."""


class Stopped(Exception):
    """The run cannot go on."""


class Run:
    """`with Run() as run:` call open(), begin() and steps(); run.exit_code then says how it ended.

    open() sets config, task, problems (training and held-out), reward, plan, and model_dir, the
    directory to load model and tokenizer from (a base model or a checkpoint).
    """

    def __enter__(self) -> "Run":
        self.exit_code, self.phase, self.plan, self.has_begun = 0, "preparation", None, False
        self.signals, self.world = Signals(), SingleProcess()
        self._closing = contextlib.ExitStack()
        console.prepare_streams()
        if _num_launched() > 1:
            self.world = Torchrun()
            self._closing.callback(self.world.close)
        if self.world.rank > 0:  # rank 0 prints for all of them
            devnull = self._closing.enter_context(open(os.devnull, "w"))
            self._closing.enter_context(contextlib.redirect_stdout(devnull))
        return self

    # ------------------------------------------------------------ the start

    def open(self, argv: list[str] | None) -> None:
        """Read the command line and the config, lock the output directory, find where to begin.

        Raises ValueError or OSError for a user error, and Finished after --plan and --try-task.
        """
        arguments = parse_arguments(argv)
        if arguments.try_task:
            _show_task(load_config(arguments.config, arguments.overrides))
            raise Finished
        if arguments.plan:
            config = load_config(arguments.config, arguments.overrides)
            shape = find_shape(config.model.path)
            console.log(make_plan(config, shape, cards=arguments.plan).table())
            raise Finished
        self._open_directory(arguments)
        config = self.config
        _prepare_process(config)
        self.task = load_task(config.task)
        self.problems = self._load_problems()
        training = config.training
        self.reward = isolated_reward(
            config.task,
            timeout=training.reward_timeout,
            errors=training.reward_errors,
            check=self._check,
        )
        self._closing.callback(self.reward.close)
        shape = Qwen2Config.from_json(self.model_dir / "config.json")
        held_out = len(self.problems[1])
        self.plan = make_plan(config, shape, cards=self.world.size, held_out=held_out)
        if config.model.device == "cuda":
            check_cuda(config, self.plan)
        tokenizer = Tokenizer.from_pretrained(self.model_dir)
        for problems in self.problems:
            try_task(self.task, problems[0], tokenizer, self.reward)

    def _open_directory(self, arguments: argparse.Namespace) -> None:
        """Lock the output directory. Set config, state and model_dir of a new or resumed run."""
        overrides = arguments.overrides
        if arguments.resume:  # the others apply to the config of the resumed run
            overrides = [text for text in overrides if text.startswith("output_dir=")]
        config = load_config(arguments.config, overrides)
        self.directory = Path(config.output_dir)
        self.checkpoints = self.directory / "checkpoints"
        self.config_path = self.directory / "config.yaml"
        if self.world.rank == 0:
            self.lock = OutputLock(self.directory)
            self._closing.callback(self.lock.release)
        found = self.config_path.exists(), self._has_trained()
        holds_run, has_trained = self.world.all_gather_objects(found)[0]
        is_seen = self.directory.is_dir() and self.config_path.exists() == holds_run
        seen = self.world.all_gather_objects(is_seen)
        if not all(seen):
            raise ValueError(
                f"output_dir={self.directory} is not the same directory on ranks 0 and "
                f"{seen.index(False)}; all ranks must see one, on a shared file system"
            )
        if holds_run and has_trained and not arguments.resume:
            raise ValueError(
                f"output_dir={self.directory} holds a run; add --resume to continue it, or choose "
                "another output_dir"
            )
        self.state = TrainerState(step=0, optimizer_steps=0, log_sizes={}, config={})
        self._optimizer_state = None
        if holds_run and arguments.resume:
            self._resume(arguments.overrides)
            return
        if holds_run:
            console.log(f"{self.directory} holds a run without a training step: starting over")
        if arguments.resume:
            if _num_launched() == 1:
                raise FileNotFoundError(
                    f"output_dir={self.directory} of {arguments.config} holds no run to resume; "
                    "add the run's own --config or output_dir, or start without --resume"
                )
            # torchrun restarts a run with the command that started it.
            console.log(f"output_dir={self.directory} holds no run yet: starting one")
            config = load_config(arguments.config, arguments.overrides)
        self.config, self.model_dir = config, Path(config.model.path)

    def _resume(self, overrides: list[str]) -> None:
        """Continue the run in the directory: from its newest good checkpoint, if it has one."""
        old = load_config(self.config_path)
        new = load_config(self.config_path, overrides)
        self.config = new.model_copy(update={"output_dir": str(self.directory)})
        self.model_dir = Path(new.model.path)
        found = find_checkpoint(self.checkpoints, self.world)
        if found:
            self.model_dir, self.state, self._optimizer_state = found
            console.log(f"resuming from {self.model_dir}")
        else:
            console.log("no checkpoint yet: starting over")
        old_values = self.state.config or old.model_dump(mode="json")
        for key, before, now in differences(old_values, self.config.model_dump(mode="json")):
            if key.startswith(FIXED_KEYS):
                raise ValueError(
                    f"{key} was {before!r} in the run to resume and is {now!r} now; it cannot "
                    "change: restore it, or start a new run with another output_dir"
                )
            effect = ""
            if found and key == "model.path":
                effect = ", but the weights are those of the checkpoint"
            console.log(f"note: {key} changes from {before!r} to {now!r}{effect}")
        if self.state.step > new.training.max_steps:
            raise ValueError(
                f"the run is at step {self.state.step}, beyond "
                f"training.max_steps={new.training.max_steps}; raise it"
            )
        if self.state.step == new.training.max_steps and self._is_evaluated():
            setting = f"training.max_steps={self.state.step}"
            console.log(f"{self.directory} is finished; to train on, raise {setting}")
            raise Finished

    def _has_trained(self) -> bool:
        """Whether the directory holds a checkpoint, or the log of a training step."""
        if checkpoints(self.checkpoints):
            return True
        metrics = self.directory / "metrics.jsonl"
        return metrics.exists() and b'"loss"' in metrics.read_bytes()

    def _is_evaluated(self) -> bool:
        """Whether the model of the checkpoint has been evaluated: the line follows its own."""
        metrics = b""
        if self.world.rank == 0 and (self.directory / "metrics.jsonl").exists():
            metrics = (self.directory / "metrics.jsonl").read_bytes()
        next_line = metrics[self.state.log_sizes.get("metrics.jsonl", 0) :].partition(b"\n")[0]
        is_evaluated = b'"eval/success"' in next_line and next_line.endswith(b"}")
        return self.world.all_gather_objects(is_evaluated)[0]

    def _load_problems(self) -> tuple:
        """Load the task's problems. Raises FileNotFoundError that names everything missing."""
        missing = []
        if self.config.model.device == "cuda" and (reason := _why_no_gpu()):
            missing.append(f"{reason}, or train without one: {TINY_RUN}")
        if not self.model_dir.exists():
            missing.append(absent_model(self.model_dir))
        try:
            problems = load_problems(self.task, self.config.data)
        except FileNotFoundError as error:
            missing.append(str(error))
        if missing:
            raise FileNotFoundError("\n".join(missing))
        return problems

    def begin(self, model: Transformer, tokenizer: Tokenizer, optimizer: AdamW) -> None:
        """Check that the parts fit together, restore the optimizer state and open the logs."""
        if tokenizer.stop_conflict:
            console.log(f"note: {tokenizer.stop_conflict}")
        self._check_made_for(tokenizer)
        if self._optimizer_state:
            steps = self.state.optimizer_steps
            optimizer.load_state_dict({"steps": steps, **self._optimizer_state})
            self._optimizer_state = None  # frees the memory
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.state.config = self.config.model_dump(mode="json")
        self.first, self.last = self.state.step, self.config.training.max_steps
        self.saved_step, self.skipped_in_a_row = self.first, 0
        self.latest: dict[str, console.Progress] = {}  # by name, for example "rollout"
        self.recent, self.warned = [], set()  # metrics of the last steps; warnings given so far
        if self.world.size > 1:
            self._check_that_ranks_agree()
        if self.world.rank == 0:
            self._write_config()
            progress = console.Progress("start", self._check)
            self.run_log = RunLog(self.directory, self.state.log_sizes, progress)
            self._closing.callback(self.run_log.close)
            # The lines of training steps do not have these metrics.
            records = self.run_log.read("metrics.jsonl")
            self.evaluations = [r for r in records if None not in map(r.get, SUCCESS)]
        self.has_begun = True
        (train, held_out), ranks = self.problems, self.world.size
        console.log(
            f"{self.directory}: {sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M weights, "
            f"{len(train):,} training and {len(held_out):,} held-out questions, {self.last} steps, "
            f"{ranks} process{'' if ranks == 1 else 'es'}"
        )

    def _check_that_ranks_agree(self) -> None:
        """Raises ValueError, naming what differs, if the ranks would not compute the same step."""
        training, train_problems = self.config.training, self.problems[0]
        count, first_step = training.num_questions_per_batch, self.first + 1
        problems = draw_problems(train_problems, first_step, count=count, seed=training.seed)
        questions = [make_question(self.task, problem, self.tokenizer) for problem in problems]
        prompts = repr([question.prompt_token_ids for question in questions]).encode()
        local = self.config.model_dump(mode="json") | {
            "checksum of the first prompts": zlib.crc32(prompts),
            # A sum of integers is exact in any order. In pieces, because it copies them to int64.
            "sum of the weights' bits": sum(
                int(piece.sum(dtype=torch.int64))
                for piece in self.optimizer.weights.view(torch.int16).split(2**24)
            ),
        }
        first, *others = self.world.all_gather_objects(local)
        for rank, other in enumerate(others, 1):
            for key, a, b in differences(first, other):
                if key in LOCAL_KEYS:
                    continue
                raise ValueError(
                    f"{key} is {a!r} on rank 0 and {b!r} on rank {rank}; start all ranks with the "
                    "same command, the same code and the same files"
                )

    def _write_config(self) -> None:
        partial = self.directory / "config.yaml.partial"
        partial.write_text(as_yaml(self.config), encoding="utf-8")
        partial.rename(self.config_path)

    def _check_made_for(self, tokenizer: Tokenizer) -> None:
        """Compare the task's prompt with the one that a model from warm_start.py was trained on."""
        path = self.model_dir / "made_for.json"
        if not path.exists():
            return
        made_for = read_json(path)
        if made_for.get("task") != self.config.task:
            console.log(
                f"warning: {self.model_dir} was made for task={made_for.get('task')!s:.100} and "
                f"has learned nothing about {self.config.task}"
            )
            return
        try:
            prompt = self.task.render_prompt(made_for["problem"], tokenizer)
            is_same = tokenizer.encode(prompt) == made_for["prompt_token_ids"]
        except (LookupError, TypeError, AttributeError):  # a problem of another form
            is_same = False
        if not is_same:
            raise ValueError(
                f"{self.model_dir} was made for another prompt or tokenizer; remove it and make it "
                f"again: uv run warm_start.py --out {self.model_dir}"
            )

    # ------------------------------------------------------------ the loop

    def steps(self) -> Iterator[int]:
        """The numbers of the steps that are left; the first step of a run is 1."""
        for step in range(self.first + 1, self.last + 1):
            if (step - 1 - self.first) % RECENT_STEPS == 0:
                console.log(console.heading())
            yield step

    @contextlib.contextmanager
    def progress(self, name: str) -> Iterator[console.Progress]:
        """Measure a rollout, an update or an evaluation. progress.update() may end the run."""
        self.phase = name
        progress = console.Progress(name, self._check, hidden=self.world.rank > 0)
        self.latest[name] = progress
        packed = contextlib.nullcontext()
        if name != "update":  # rollout and evaluation decode
            answers = math.ceil(self.config.training.batch_size / self.world.size)
            packed = cpu.packed_for_decoding(self.model, answers)
        start = time.perf_counter()
        with packed:
            yield progress
        progress.seconds["all"] = time.perf_counter() - start

    def _check(self) -> None:
        self.signals.check()
        if self.world.size > 1:
            self.world.check()

    def finish_step(
        self, step: int, questions: list[Question], episodes: list[Episode], stats: UpdateStats
    ) -> None:
        """Write what the step computed and cost; save a checkpoint if one is due.

        Raises Stopped, FloatingPointError or OSError if the run cannot go on.
        """
        training = self.config.training
        if not math.isfinite(norm(self.optimizer.weights)):
            raise FloatingPointError(
                f"step {step} made weights that are not finite (norm of its gradient: "
                f"{stats.grad_norm:.3g}); lower training.learning_rate"
            )
        # The step counts as done when its log is on disk; until then the weights are not saved.
        self.phase, timings = "log", self._timings(step, episodes)
        if self.world.rank == 0 and not self.lock.is_lost():
            metrics = self._write_step(step, questions, episodes, stats, timings)
            self.state.log_sizes = dict(self.run_log.sizes)
        self.state.step, self.phase = step, "report"
        if self.world.rank == 0:
            self._check_directory()
            self._report_step(metrics | {"seconds": timings["seconds"]})
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if stats.broken_questions else 0
        if self.skipped_in_a_row == training.max_skipped_steps:
            raise Stopped(
                f"{self.skipped_in_a_row} steps in a row were skipped: {stats.skipped} "
                f"(questions {stats.broken_questions})"
            )
        if step % training.ckpt_save_interval == 0 or step == self.last:
            self._save()

    def _timings(self, step: int, episodes: list[Episode]) -> dict:
        """The line of a step in timings.jsonl. Counts are summed over all ranks."""
        rollout, update = self.latest["rollout"], self.latest["update"]
        counts = (rollout.counts["slot_steps"], update.counts["gradient"])
        slot_steps, tokens_run = map(sum, zip(*self.world.all_gather_objects(counts), strict=True))
        tokens = sum(len(e.response_token_ids) for e in episodes)
        seconds = rollout.seconds + update.seconds  # "all" is the sum of both
        phases = ("prefill", "decode", "reward", "gradient", "optimizer")
        return {
            "step": step,
            "seconds": seconds["all"],
            **{f"seconds/{phase}": seconds[phase] for phase in phases},
            "tokens_per_second/rollout": tokens / rollout.seconds["all"],
            "tokens_per_second/update": tokens_run / update.seconds["all"],
            "decode_waste": 1 - tokens / slot_steps,
            "memory/rollout": rollout.peak_bytes / GIB,
            "memory/update": update.peak_bytes / GIB,
        }

    def _write_step(
        self,
        step: int,
        questions: list[Question],
        episodes: list[Episode],
        stats: UpdateStats,
        timings: dict,
    ) -> dict:
        """Write the lines of a step to the log files. Returns that of metrics.jsonl."""
        optimizer = self.optimizer
        metrics = {"step": step} | step_metrics(
            episodes,
            stats,
            learning_rate=optimizer.lr,
            num_answers=len(episodes) // len(questions),
            weights_changed=0.0 if stats.skipped else optimizer.weights_changed,
            weights_changed_fp32=0.0 if stats.skipped else optimizer.weights_changed_fp32,
        )
        self.run_log.write("metrics.jsonl", metrics)
        if keeps_samples(step):
            prompts = [question.prompt for question in questions]
            samples = pick_samples(episodes, episode_advantages(episodes), prompts)
            self.run_log.write("samples.jsonl", *({"step": step} | sample for sample in samples))
        self.run_log.write("timings.jsonl", timings)
        return metrics

    def _report_step(self, metrics: dict) -> None:
        """Show a step on the console and in TensorBoard, with warnings and the time left."""
        self.run_log.draw()
        console.log(console.step_line(metrics))
        self.recent = [*self.recent, metrics][-RECENT_STEPS:]
        for warning in diagnose(self.recent) - self.warned:
            console.log(f"warning: {warning}")
            self.warned.add(warning)
        if self.state.step == self.first + 3:
            self._report_cost(self.last - self.state.step)

    def _report_cost(self, steps_left: int) -> None:
        """Estimate the time left, and compare the memory plan with what was measured."""
        per_step = median(metrics["seconds"] for metrics in self.recent)
        left = console.duration(steps_left * per_step)
        console.log(f"about {per_step:.1f} s per step: {left} to go")
        if self.config.model.device == "cuda":
            for name, parts in (("rollout", self.plan.rollout), ("update", self.plan.update)):
                progress = self.latest[name]
                console.log(
                    f"{name}: {progress.peak_bytes / GIB:.2f} GiB at the peak, "
                    f"{sum(parts.values()) / GIB:.2f} planned; "
                    f"{progress.card_bytes / GIB:.2f} in use on the whole GPU"
                )

    def log_evaluation(self, step: int, episodes: list[Episode]) -> None:
        if self.world.rank > 0:
            return
        self._check_directory()
        metrics = {"step": step} | evaluation_metrics(episodes)
        seconds = self.latest["evaluation"].seconds["all"]
        self.run_log.write("metrics.jsonl", metrics)
        self.run_log.write("timings.jsonl", {"step": step, "seconds/evaluation": seconds})
        self.run_log.draw()
        self.evaluations.append(metrics)
        mean_length = metrics["eval/mean_length"]
        console.log(f"step {step}: {_success(metrics)}, mean length {mean_length:.0f}")
        first = self.evaluations[0]
        if metrics["eval/success_high"] < first["eval/success_low"]:
            console.log(
                f"warning: that is less than after step {first['step']}: the model gets worse; "
                "start again with a lower training.learning_rate"
            )

    def _check_directory(self) -> None:
        if self.lock.is_lost():
            raise Stopped(f"{self.directory} was removed or replaced while the run was using it")

    def _save(self) -> None:
        """Save a checkpoint. After a skipped step no older one is removed.

        Weights that lead to skipped steps may be finite and still bad.
        """
        with raise_on_all_ranks(self.world):
            if self.world.rank == 0 and self.lock.is_replaced():
                raise NotSaved(f"{self.directory} may belong to another run now")
        start, parts = time.perf_counter(), (self.model, self.tokenizer, self.optimizer)
        keep = None if self.skipped_in_a_row else self.config.training.keep_checkpoints
        save_checkpoint(self.checkpoints, *parts, self.state, keep=keep)
        self.saved_step = self.state.step
        if self.world.rank == 0:
            if not self.config_path.exists():  # the directory was removed and is made again
                self._write_config()
            record = {"step": self.saved_step, "seconds/checkpoint": time.perf_counter() - start}
            self.run_log.write("timings.jsonl", record)
            self.run_log.draw()

    # ------------------------------------------------------------ the end

    def __exit__(self, kind, error, traceback) -> bool:
        """Save what can be saved, close everything, and explain the end of the run."""
        message, self.exit_code = self._explain(error)
        is_expected = self.exit_code != UNEXPECTED  # if not, Python prints the traceback
        with self._closing:
            if self.world.size > 1:
                error = self._tell_other_ranks(error, message)
                message, self.exit_code = self._explain(error)
            if self.has_begun:
                message += self._outcome() if error is None else self._save_finished_steps(error)
        is_reporter = isinstance(error, RankLost) and error.reason  # rank 0 may be the lost one
        if message and (self.world.rank == 0 or is_reporter):
            show = console.show_error if self.exit_code else console.log
            show(message.strip())
        return is_expected

    def _explain(self, error: BaseException | None) -> tuple[str, int]:
        """The message and the exit code."""
        if error is None or isinstance(error, Finished):
            return "", 0
        if isinstance(error, RankFailure):
            return error.reason, error.exit_code
        if isinstance(error, Interrupted):
            return "interrupted", 128 + self.signals.received
        if isinstance(error, ValueError) or (isinstance(error, OSError) and not self.has_begun):
            return f"error: {error}", 2
        if is_out_of_memory(error):
            first_line = str(error).partition("\n")[0] or type(error).__name__
            message = f"error: out of memory in the {self.phase} ({first_line})"
            if self.plan is None:
                return f"{message}; close other programs, or use fewer problems", 1
            return (
                f"{message}; set model.memory_gib below {self.plan.budget / GIB:.1f} for a smaller "
                f"plan. The plan was\n{self.plan.table()}"
            ), 1
        if isinstance(error, Stopped | OSError | FloatingPointError):
            return f"error: {error}", 1
        return "", UNEXPECTED

    def _tell_other_ranks(self, error: BaseException | None, message: str) -> BaseException | None:
        """Make all ranks end together: for the same reason, and only when all have arrived."""
        try:
            if error is None or isinstance(error, Finished):
                self.world.all_gather_objects(None)
            elif not isinstance(error, RankFailure):
                self.world.fail(message or f"error: {error!r}", self.exit_code)
        except RankFailure as failure:
            return failure
        return error

    def _save_finished_steps(self, error: BaseException) -> str:
        """Save the steps since the last checkpoint if it is safe, and say what is saved.

        An error in the update may have left the weights half updated. With several ranks, any error
        may have done so, but a signal stops all of them at the same point. In the phase "log", the
        weights are those of a step that is not in self.state yet.
        """
        if self.phase == "log":
            is_safe = False
        elif isinstance(error, RankFailure):
            is_safe = error.is_signal
        else:
            is_safe = isinstance(error, Interrupted) or self.phase != "update"
        failure = ""
        if is_safe:
            try:
                if self.world.all_gather_objects(self._has_unsaved_steps())[0]:
                    self._save()
            except (OSError, RankFailure) as reason:
                if str(reason) != str(error):  # a save that failed may fail again
                    failure = f": {reason}"
        text, path = "", checkpoint_path(self.checkpoints, self.saved_step)
        if self._has_unsaved_steps():
            text = f"\nthe steps after {self.saved_step} are lost{failure}"
        if path.is_dir():
            text += f"\n{path} is saved; continue with the same command and --resume"
        return text

    def _has_unsaved_steps(self) -> bool:
        if self.state.step > self.saved_step:
            return True
        was_removed = not checkpoint_path(self.checkpoints, self.saved_step).is_dir()
        return self.saved_step > 0 and was_removed

    def _outcome(self) -> str:
        """What the run has achieved: its first and its last evaluation."""
        if self.world.rank > 0:
            return ""
        path = checkpoint_path(self.checkpoints, self.saved_step)
        text = f"{path} is the trained model, in the published format"
        if self.evaluations:
            first, last = self.evaluations[0], self.evaluations[-1]
            outcome = "\n".join(f"after step {e['step']}, {_success(e)}" for e in (first, last))
            text = f"{outcome}\n{text}"
            best = max(self.evaluations, key=lambda e: e["eval/success"])
            best_path = checkpoint_path(self.checkpoints, best["step"])
            if best["eval/success"] > last["eval/success"] and best_path.is_dir():
                text += f"\n{best_path} did best: {_success(best)}"
        return text


def _num_launched() -> int:
    """The number of processes of torchrun. A WORLD_SIZE without a RANK is left over from others."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """config, resume, plan (the number of GPUs, None without --plan) and overrides."""
    parser = argparse.ArgumentParser(description="Train a Qwen2.5 model with GRPO.")
    path = os.path.expanduser  # a shell does not expand the "~" in --config=~/a.yaml
    parser.add_argument("--config", type=path, default="config.yaml", help="default: config.yaml")
    mode = parser.add_mutually_exclusive_group()
    text = "continue the run in output_dir with its own config"
    mode.add_argument("--resume", action="store_true", help=text)
    text = "print two prompts of the task and its rewards of made-up answers, and exit"
    mode.add_argument("--try-task", action="store_true", help=text)
    num_ranks = str(_num_launched())
    text = "print the memory that the run needs on each of CARDS GPUs (default: 1), and exit"
    mode.add_argument("--plan", nargs="?", const=num_ranks, metavar="CARDS", help=text)
    text = "for example training.learning_rate=5e-6"
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help=text)
    arguments = parser.parse_intermixed_args(argv)
    if arguments.plan is not None:
        if "=" in arguments.plan:  # an override, which argparse has taken for the number of GPUs
            arguments.overrides.insert(0, arguments.plan)
            arguments.plan = num_ranks
        cards = arguments.plan
        if not cards.isdecimal() or int(cards) == 0:
            raise ValueError(f"--plan {cards}: wanted the number of GPUs, for example --plan 4")
        arguments.plan = int(cards)
    return arguments


def _prepare_process(config: Config) -> None:
    """Must run before the device is used for the first time."""
    if config.model.device == "cuda":
        gpu.prepare_process()
        return
    cpu.prepare_process()
    if warning := cpu.warn_of_slow_dtype(getattr(torch, config.model.dtype)):
        console.log(f"warning: {warning}")


def _show_task(config: Config) -> None:
    """Print the prompt of a training and a held-out problem, and the rewards of some answers."""
    task, model_dir = load_task(config.task), Path(config.model.path)
    if not model_dir.exists():
        raise FileNotFoundError(absent_model(model_dir))
    tokenizer = Tokenizer.from_pretrained(model_dir)
    timeout = config.training.reward_timeout
    with contextlib.closing(isolated_reward(config.task, timeout=timeout, errors="stop")) as reward:
        for problems in load_problems(task, config.data):
            console.log(try_task(task, problems[0], tokenizer, reward))


def _why_no_gpu() -> str:
    """Why the ranks on this machine cannot have a GPU each, and the way out; empty if they can."""
    if reason := why_no_cuda():
        return reason
    ranks, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if ranks > gpus:
        return (
            f"torchrun started {ranks} processes here, but there are {gpus} CUDA devices; lower "
            "--nproc-per-node"
        )
    return ""


def _success(metrics: dict) -> str:
    return (
        f"{metrics['eval/success']:.1%} of {metrics['eval/questions']:.0f} held-out questions "
        f"solved (95 % interval {metrics['eval/success_low']:.1%} … "
        f"{metrics['eval/success_high']:.1%})"
    )


def differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple]:
    """(dotted key, old value, new value) for each value that differs between two configs."""
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b
