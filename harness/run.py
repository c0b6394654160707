"""A run: what happens around the loop of train.py, so that it can be left alone for days.

It holds its output directory, hears signals, writes logs and checkpoints, goes on where a checkpoint stands, watches for
what goes wrong, and turns every way out into one message and an exit code. Weights that are good are saved on every way out.
A checkpoint stands between a step and the evaluation that follows it.
"""

import argparse
import contextlib
import itertools
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch

import gpu
from data_types import ALONE, Episode, Question, UpdateStats
from flat import flat_weights, norm
from generate import check_length
from grpo import draw_problems, episode_advantages, make_question
from harness import console, cpu
from harness.card import check_card, is_out_of_memory, why_no_card
from harness.check import check
from harness.checkpoint import NotSaved, Place, by_all, checkpoint_path, find_place, save_checkpoint
from harness.config import Config, load_config
from harness.console import say
from harness.metrics import evaluation_metrics, pick_samples, smells, step_metrics
from harness.output import Nowhere, OutputDirectory
from harness.parallel import Parting, Processes
from harness.plan import GIB, absent_model, find_shape, make_plan
from harness.rewards import isolated_reward, load_problems, load_task
from optimizer import AdamW
from published_format import read_json
from qwen2_model import Qwen2Config, Transformer
from tokenizer import Tokenizer

# What a resumed run may not change: it would no longer be the same run.
FIXED_KEYS = (
    "task",
    "data",
    "model.dtype",
    "training.seed",
    "training.batch_size",
    "training.num_questions_per_batch",
)
UNFORESEEN = 70  # a fault of this program: its traceback is shown
SHOWN = (
    "eval/success",
    "eval/success_low",
    "eval/success_high",
    "eval/questions",
)  # of an evaluation


class Finished(Exception):
    """There is nothing more to do, and nothing went wrong."""


class Stopped(Exception):
    """The run cannot go on; its last checkpoint is good."""


class Interrupted(BaseException):
    """A signal asked the run to stop; raised where nothing half-done is lost."""


class Signals:
    """Remembers the first SIGINT, SIGTERM or SIGHUP, to be acted on at the next token or micro-batch.

    A second SIGINT or SIGTERM ends the process at once; a second SIGHUP does nothing, because a closing terminal sends several.
    """

    HEARD = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self):
        self.received = None
        for signum in self.HEARD:
            signal.signal(signum, self._receive)

    def _receive(self, signum, frame) -> None:
        self.received = signum
        for s in self.HEARD:
            signal.signal(s, signal.SIG_IGN if s == signal.SIGHUP else signal.SIG_DFL)

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted


class Run:
    """with Run() as run: open it, begin it, take its steps; run.exit_code says how it ended."""

    def __enter__(self) -> "Run":
        self.signals, self.exit_code, self.phase_name = Signals(), 0, "start"
        self.closing = contextlib.ExitStack()
        self.plan, self.has_begun, self.processes = None, False, ALONE
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            self.processes = Processes()
            self.closing.callback(self.processes.close)
            if self.processes.rank > 0:
                self.closing.enter_context(
                    contextlib.redirect_stdout(self.closing.enter_context(open(os.devnull, "w")))
                )
        return self

    # ------------------------------------------------------------ the start

    def open(self, argv: list[str] | None) -> Config:
        """Read the command line and the config, hold the output directory, find where to begin, load task and problems.

        From here on: config, task, problems, reward, and source, the model directory to load. Raises ValueError or
        OSError naming what the user can mend.
        """
        parser = argparse.ArgumentParser(description="Train a Qwen2.5 model with GRPO.")
        parser.add_argument(
            "--config",
            default="config.yaml",
            help="YAML file with the hyperparameters (default: config.yaml)",
        )
        either = parser.add_mutually_exclusive_group()
        either.add_argument(
            "--resume",
            action="store_true",
            help="go on with the run in output_dir, by its own config",
        )
        either.add_argument(
            "--plan",
            nargs="?",
            const=os.environ.get("WORLD_SIZE", "1"),
            metavar="CARDS",
            help="print the memory that the run would need on each of so many cards (default: 1), and end",
        )
        either.add_argument(
            "--check",
            action="store_true",
            help="try the machine for a minute: does it agree, how long will a step take; and end",
        )
        parser.add_argument(
            "overrides",
            nargs="*",
            metavar="key.path=value",
            help="for example training.learning_rate=5e-6",
        )
        arguments = parser.parse_intermixed_args(argv)
        overrides = arguments.overrides
        if (
            arguments.plan and "=" in arguments.plan
        ):  # not the number of cards, which may be left out
            overrides, arguments.plan = (
                [arguments.plan, *overrides],
                os.environ.get("WORLD_SIZE", "1"),
            )
        if arguments.plan and not (arguments.plan.isdecimal() and int(arguments.plan) > 0):
            raise ValueError(
                f"--plan {arguments.plan}: wanted the number of cards, for example --plan 4"
            )
        named = [
            override for override in overrides if override.startswith("output_dir=")
        ]  # the rest is for the run's own config
        config = load_config(arguments.config, named if arguments.resume else overrides)
        if arguments.plan:
            say(make_plan(config, find_shape(config.model.path), cards=int(arguments.plan)).table())
            raise Finished
        if arguments.check:
            self._check_machine(config)
        self.directory = Path(config.output_dir)
        self.checkpoints, own_config = (
            self.directory / "checkpoints",
            self.directory / "config.yaml",
        )
        self.output = (
            OutputDirectory(self.directory, self.closing) if self.processes.rank == 0 else Nowhere()
        )
        found = any(self.processes.share([self.output.holds_run()]))
        if found and not arguments.resume:
            raise ValueError(
                f"output_dir={self.directory} holds a run; go on with it by --resume, or choose another output_dir=…"
            )
        if arguments.resume and not found:
            if "WORLD_SIZE" not in os.environ:
                raise FileNotFoundError(
                    f"output_dir={self.directory} holds no run to resume; start it without --resume"
                )
            say(
                f"output_dir={self.directory} holds no run yet: starting one"
            )  # a launcher starts again with the same command
            config = load_config(arguments.config, overrides)
        if found:
            config = load_config(own_config, overrides).model_copy(
                update={"output_dir": str(self.directory)}
            )
        self.place, self.saved_state = (
            Place(step=0, optimizer_steps=0, log_sizes={}, config={}),
            None,
        )
        self.source = Path(config.model.path)
        if found:
            self._find_place(load_config(own_config), config)
        _prepare_process(config)
        self.config, self.task = config, load_task(config.task)
        self._ask_for_what_is_missing()
        self.reward = isolated_reward(
            config.task,
            timeout=config.training.reward_timeout,
            errors=config.training.reward_errors,
        )
        self.closing.callback(self.reward.close)
        self._make_plan(
            config,
            Qwen2Config.from_json(self.source / "config.json"),
            held_out=len(self.problems[1]),
        )
        return config

    def _check_machine(self, config: Config) -> None:
        """What --check does instead of a run. Raises Finished, or Stopped where something does not agree."""
        self.phase_name, shape = "check", find_shape(config.model.path)
        _prepare_process(config)
        if config.model.device == "cuda" and (reason := why_no_card()):
            raise ValueError(f"{reason}; without a card, check --config config_tiny.yaml")
        self._make_plan(config, shape)
        if wrong := check(config, shape, self.plan, cards=self.processes.size):
            raise Stopped(wrong)
        raise Finished

    def _make_plan(self, config: Config, shape: Qwen2Config, **sizes: int) -> None:
        self.plan = make_plan(config, shape, cards=self.processes.size, **sizes)
        if config.model.device == "cuda":
            check_card(config, self.plan)

    def _find_place(self, old: Config, new: Config) -> None:
        """Go to the newest good checkpoint, if there is one. Raises ValueError for what cannot change on the way."""
        if found := find_place(self.checkpoints, self.processes):
            self.source, self.place, self.saved_state = found
        say(f"resuming from {self.source}" if found else "no checkpoint yet: starting over")
        for key, before, now in _differences(
            self.place.config or old.model_dump(mode="json"), new.model_dump(mode="json")
        ):
            if key.startswith(FIXED_KEYS):
                raise ValueError(
                    f"{key} was {before!r} in the run to resume and is {now!r} now; it cannot change: restore it, or "
                    "start a new run with another output_dir=…"
                )
            kept = (
                ", but the weights are those of the checkpoint"
                if found and key == "model.path"
                else ""
            )
            say(f"note: {key} changes from {before!r} to {now!r}{kept}")
        if self.place.step > new.training.max_steps:
            raise ValueError(
                f"the run is at step {self.place.step}, beyond training.max_steps={new.training.max_steps}; raise it"
            )

    def _ask_for_what_is_missing(self) -> None:
        """Load the problems, and name all at once that the user has to fetch."""
        config, missing = self.config, []
        if no_card := why_no_card() if config.model.device == "cuda" else "":
            missing.append(no_card)
        elif (
            config.model.device == "cuda"
            and (count := int(os.environ.get("LOCAL_WORLD_SIZE", 1))) > torch.cuda.device_count()
        ):
            missing.append(
                f"{count} processes were started here, but there are {torch.cuda.device_count()} CUDA devices; lower "
                "--nproc-per-node"
            )
        if not self.source.exists():
            missing.append(absent_model(self.source))
        try:
            self.problems = load_problems(self.task, config.data)
        except FileNotFoundError as error:
            missing.append(str(error))
        said = "".join(missing)
        if (no_card or "hf download" in said) and "config_tiny.yaml" not in said:
            missing.append(
                "or train without card and download: uv run train.py --config config_tiny.yaml"
            )
        if missing:
            raise FileNotFoundError("\n".join(missing))

    def begin(
        self, model: Transformer, tokenizer: Tokenizer, optimizer: AdamW, held_out: list[Question]
    ) -> None:
        """Check that the parts fit together and into memory; give the optimizer its state back; open the logs."""
        config = self.config
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"{self.source}: the tokenizer has {tokenizer.vocab_size} entries, the model only "
                f"{model.config.vocab_size} rows; they belong to different models"
            )
        self._check_what_it_was_made_for(tokenizer)
        self._check_lengths(model.config, tokenizer, held_out)
        if self.saved_state:
            optimizer.load_state_dict({"steps": self.place.optimizer_steps, **self.saved_state})
            self.saved_state = None
        self.first, self.last = self.place.step, config.training.max_steps
        self.place.config = config.model_dump(mode="json")
        self.output.write_config(config)
        self.output.open_log(self.place.log_sizes)
        self.model, self.tokenizer, self.optimizer = model, tokenizer, optimizer
        self.saved_step, self.skipped_in_a_row = self.first, 0
        self.watches: dict[str, console.PhaseWatch] = {}  # of each phase, the latest
        self.recent, self.warned = [], set()  # figures of the last twenty steps; warnings given
        self.processes.share([])  # all have begun, or none
        self.has_begun = True
        say(
            f"{self.directory}: {sum(p.numel() for p in model.parameters()) / 1e6:,.1f} M weights, "
            f"{len(self.problems[0]):,} training and {len(held_out)} held-out questions, {self.last} steps"
            + (f", {self.processes.size} processes" if self.processes.size > 1 else "")
        )

    def _check_lengths(
        self, shape: Qwen2Config, tokenizer: Tokenizer, held_out: list[Question]
    ) -> None:
        """Of every prompt that the run will use: now, and not after days."""
        training, first, count = (
            self.config.training,
            self.place.step,
            self.config.training.num_questions_per_batch,
        )
        all_drawn = first + 2 * -(-len(self.problems[0]) // count)  # two passes meet every problem
        steps = range(first + 1, min(training.max_steps, all_drawn) + 1)
        drawn = (
            make_question(self.task, problem, tokenizer)
            for step in steps
            for problem in draw_problems(self.problems[0], step, count=count, seed=training.seed)
        )
        total, hidden = len(held_out) + len(steps) * count, self.processes.rank > 0
        with console.bar("start: lengths of the prompts", total, "prompts", hidden=hidden) as shown:
            for question in itertools.chain(held_out, drawn):
                try:
                    check_length(shape, len(question.prompt_token_ids), training.max_gen_len)
                except ValueError as error:
                    raise ValueError(f"the problem {question.problem!r:.300}: {error}") from None
                shown.update()
                self.signals.check()

    def _check_what_it_was_made_for(self, tokenizer: Tokenizer) -> None:
        """The small base model knows the prompt that warm_start.py taught it, and nothing else."""
        path = self.source / "made_for.json"
        if not path.exists():
            return
        made_for, same = read_json(path), False
        if made_for.get("task") != self.config.task:
            say(
                f"warning: {self.source} was made for task={made_for.get('task')!s:.100} and knows nothing of {self.config.task}"
            )
            return
        with contextlib.suppress(
            LookupError, TypeError, AttributeError
        ):  # of a problem that is none of the task's
            same = (
                tokenizer.encode(self.task.render_prompt(made_for["problem"], tokenizer))
                == made_for["prompt_token_ids"]
            )
        if not same:
            raise ValueError(
                f"{self.source} was made for another prompt or tokenizer; make it anew: remove it, then "
                f"uv run warm_start.py --out {self.source}"
            )

    # ------------------------------------------------------------ the loop

    def steps(self) -> Iterator[int]:
        """The steps that are still to do, from 1 on."""
        for step in range(self.first + 1, self.last + 1):
            if (step - 1 - self.first) % 20 == 0:
                say(console.heading())
            yield step

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[console.PhaseWatch]:
        """A rollout, an update or an evaluation: its time, its peak of memory, and the moments at which a signal is heard."""
        device, watch = (
            self.config.model.device,
            console.PhaseWatch(name, self._check, self.processes),
        )
        self.watches[name], self.phase_name = watch, name
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        clock = time.perf_counter()
        samples, rows = name != "update", -(-self.config.training.batch_size // self.processes.size)
        with cpu.packed_for_decoding(self.model, rows) if samples else contextlib.nullcontext():
            yield watch
        watch.seconds["all"], watch.peak_bytes = (
            time.perf_counter() - clock,
            console.peak_bytes(device),
        )

    def _check(self) -> None:
        self.signals.check()
        if self.processes.size > 1:
            self.processes.check()

    def log_step(
        self, step: int, questions: list[Question], episodes: list[Episode], stats: UpdateStats
    ) -> None:
        """Write and show what a step computed and cost; save a checkpoint when one is due. Raises Stopped."""
        training, rollout, update = (
            self.config.training,
            self.watches["rollout"],
            self.watches["update"],
        )
        if not math.isfinite(norm(flat_weights(self.model.parameters()))):
            raise FloatingPointError(
                f"the update of step {step} made weights that are not finite (norm of its gradient: "
                f"{stats.grad_norm:.3g}); lower training.learning_rate"
            )
        self.place.step, update.critical = (
            step,
            False,
        )  # whatever happens to its log, the weights are this step's
        self._check_directory()
        num_answers = training.batch_size // training.num_questions_per_batch
        metrics = {"step": step} | step_metrics(
            episodes, stats, learning_rate=self.optimizer.lr, num_answers=num_answers
        )
        self.output.write("metrics.jsonl", metrics)
        for sample in pick_samples(
            episodes, episode_advantages(episodes), [q.prompt for q in questions]
        ):
            self.output.write("samples.jsonl", {"step": step} | sample)
        row_steps = sum(self.processes.share([rollout.counts["row_steps"]]))
        tokens_run = sum(self.processes.share([update.counts["tokens_run"]]))
        seconds, tokens = (
            rollout.seconds["all"] + update.seconds["all"],
            sum(len(e.response_token_ids) for e in episodes),
        )
        self.output.write(
            "timings.jsonl",
            {
                "step": step,
                "seconds": seconds,
                **{
                    f"seconds/{part}": (rollout.seconds + update.seconds)[part]
                    for part in ("prefill", "decode", "reward", "gradient", "optimizer")
                },
                "tokens_per_second/rollout": tokens / rollout.seconds["all"],
                "tokens_per_second/update": tokens_run / update.seconds["all"],
                "wasted_row_steps": 1 - tokens / row_steps,
                "memory/rollout": rollout.peak_bytes / GIB,
                "memory/update": update.peak_bytes / GIB,
            },
        )
        say(console.row(metrics | {"seconds": seconds}))
        self.recent = [*self.recent[-19:], metrics | {"seconds": seconds}]
        for warning in smells(self.recent) - self.warned:
            say(f"warning: {warning}")
            self.warned.add(warning)
        if step == self.first + 3:
            self._report_cost(self.last - step)
        self.place.log_sizes = self.output.sizes()
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if stats.broken_questions else 0
        if self.skipped_in_a_row == training.max_skipped_steps:
            raise Stopped(
                f"{self.skipped_in_a_row} steps in a row were skipped: {stats.skipped} "
                f"(questions {stats.broken_questions})"
            )
        if step % training.ckpt_save_interval == 0 or step == self.last:
            self._save()

    def log_evaluation(self, step: int, episodes: list[Episode]) -> None:
        self._check_directory()
        metrics = evaluation_metrics(episodes)
        self.output.write("metrics.jsonl", {"step": step} | metrics)
        self.output.write(
            "timings.jsonl",
            {"step": step, "seconds/evaluation": self.watches["evaluation"].seconds["all"]},
        )
        say(f"step {step}: {_success(metrics)}, mean length {metrics['eval/mean_length']:.0f}")

    def _report_cost(self, steps_left: int) -> None:
        """After three steps: what a step takes, and the plan against what was measured."""
        per_step = median(figures["seconds"] for figures in self.recent)
        say(f"about {per_step:.1f} s a step: {console.duration(steps_left * per_step)} to go")
        if self.config.model.device == "cuda":
            for phase in ("rollout", "update"):
                planned, peak = (
                    sum(getattr(self.plan, phase).values()),
                    self.watches[phase].peak_bytes,
                )
                say(
                    f"{phase}: {peak / GIB:.2f} GiB at the peak, {planned / GIB:.2f} planned; "
                    f"{self.watches[phase].card_bytes / GIB:.2f} in use on the card as a whole"
                )

    def _check_directory(self) -> None:
        if self.output.is_lost():
            raise Stopped(f"{self.directory} was removed or replaced while the run was going")

    def _save(self) -> None:
        """After steps that were skipped nothing older is removed: it may be the last from which the numbers stay finite."""
        with by_all(self.processes):
            if self.output.is_anothers():
                raise NotSaved(f"{self.directory} may belong to another run now")
        clock, keep = time.perf_counter(), self.config.training.keep_checkpoints
        save_checkpoint(
            self.checkpoints,
            self.model,
            self.tokenizer,
            self.optimizer,
            self.place,
            keep=None if self.skipped_in_a_row else keep,
        )
        self.saved_step = self.place.step
        if not self.output.holds_run():  # the directory was removed, and has just been made again
            self.output.write_config(self.config)
        self.output.write(
            "timings.jsonl",
            {"step": self.place.step, "seconds/checkpoint": time.perf_counter() - clock},
        )

    # ------------------------------------------------------------ the end

    def __exit__(self, kind, error, traceback) -> bool:
        """Save what is good, close all, and turn what happened into a message and an exit code."""
        message, self.exit_code = self._explain(error)
        foreseen = self.exit_code != UNFORESEEN  # else Python shows where it came up
        with self.closing:
            parting = self._tell_the_others(error, message) if self.processes.size > 1 else None
            lost = parting is not None and not parting.can_meet
            if parting is not None:
                message, self.exit_code = parting.reason, parting.code
            if self.has_begun:
                message += (
                    self._outcome()
                    if error is parting is None
                    else self._save_what_is_good(error, lost=lost)
                )
        if self.processes.rank == 0 or (lost and parting.reason):
            console.say_last(message.strip(), failed=self.exit_code in (1, 2, UNFORESEEN))
        return foreseen

    def _tell_the_others(self, error: BaseException | None, message: str) -> Parting | None:
        """All processes end for one reason, and all wait for the last to come to its end. None: there was nothing wrong."""
        try:
            if error is None:
                self.processes.share([])
            elif not isinstance(error, Parting):
                self.processes.leave(
                    message or ("" if isinstance(error, Finished) else f"error: {error!r}"),
                    self.exit_code,
                )
        except Parting as parting:
            error = parting
        return error

    def _explain(self, error: BaseException | None) -> tuple[str, int]:
        """What to say, and the exit code."""
        if error is None or isinstance(error, Finished):
            return "", 0
        if isinstance(error, Parting):
            return error.reason, error.code
        if isinstance(error, Interrupted):
            return "interrupted", 128 + self.signals.received
        if isinstance(error, ValueError) or (isinstance(error, OSError) and not self.has_begun):
            return f"error: {error}", 2
        if is_out_of_memory(error) and self.plan is not None:
            first_line = str(error).partition("\n")[0]
            return (
                f"error: memory is full in the {self.phase_name} ({first_line}); lower model.memory_gib below "
                f"{self.plan.budget / GIB:.1f}, which makes the plan smaller. The plan was\n{self.plan.table()}"
            ), 1
        if isinstance(error, Stopped | OSError | FloatingPointError):
            return f"error: {error}", 1
        return "", UNFORESEEN

    def _save_what_is_good(self, error: BaseException | None, *, lost: bool) -> str:
        """Whatever ended the run, the steps since the last checkpoint are not lost if their weights are good.

        lost: not all processes are there any more, and none has the whole of the optimizer's state.
        """
        whole = "update" not in self.watches or not self.watches["update"].critical
        unsaved = self.place.step > self.saved_step or (
            self.saved_step and not self._saved().is_dir()
        )
        text = f"\nthe steps after {self.saved_step} are lost" if unsaved else ""
        if not lost and all(
            self.processes.share([bool(unsaved) and whole and not isinstance(error, NotSaved)])
        ):
            try:
                self._save()
                text = ""
            except OSError as failure:
                text += f": {failure}"
        return text + (
            f"\n{self._saved()} is saved; go on with the same command and --resume"
            if self._saved().is_dir()
            else ""
        )

    def _saved(self) -> Path:
        return checkpoint_path(self.checkpoints, self.saved_step)

    def _outcome(self) -> str:
        evaluations = [
            record
            for record in self.output.read("metrics.jsonl")
            if None not in map(record.get, SHOWN)
        ]
        if not evaluations:  # a process that does not write
            return ""
        return (
            f"before: {_success(evaluations[0])}\nafter:  {_success(evaluations[-1])}\n"
            f"{self._saved()} is the trained model, in the published format"
        )


def _prepare_process(config: Config) -> None:
    """Before the device is used for the first time."""
    if config.model.device == "cuda":
        return gpu.prepare_process()
    cpu.prepare_process()
    if warning := cpu.warn_of_slow_dtype(getattr(torch, config.model.dtype)):
        say(f"warning: {warning}")


def _success(metrics: dict) -> str:
    return (
        f"{metrics['eval/success']:.1%} of {metrics['eval/questions']:.0f} held-out questions solved "
        f"(95 % interval {metrics['eval/success_low']:.1%} … {metrics['eval/success_high']:.1%})"
    )


def _differences(old: dict, new: dict, prefix: str = "") -> Iterator[tuple]:
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b
