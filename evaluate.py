"""Score models on held-out questions, ask a model a question, or look at the samples of a run.

    uv run evaluate.py MODEL [MODEL2] [--samples K] [--temperature T] [--json FILE]
    uv run evaluate.py MODEL --ask "3 5 7 = 22"
    uv run evaluate.py RUN --show [--step N] [--kind best|worst|longest]

MODEL is a model directory in the published format, a checkpoint, or the directory of a run, which
means its newest checkpoint. The config is that of the run, or config.yaml for any other model.
--config FILE replaces it, and key.path=value changes a setting, as for train.py.
"""

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py

import torch

import gpu
from data_types import Episode, Reward
from generate import SamplingParams, check_length, generate_one, seeded_generator
from grpo import make_question, rollout
from harness import cpu
from harness.checkpoint import COMPLETE, check_files, newest_good
from harness.config import Config, load_config
from harness.console import Progress, log, printable, with_exit_code
from harness.cuda import why_no_cuda
from harness.log import SampleLine, read_log
from harness.metrics import UNCOUNTED, answer_record, compare_models, model_summary, succeeded
from harness.rewards import call_task, describe, isolated_reward, load_problems, load_task, try_task
from qwen2_model import Transformer
from tokenizer import Tokenizer

GREEDY = 1e-6  # a temperature so low that the most likely token has all of the probability
GREEN, RED, DIM = "\033[32m", "\033[31m", "\033[2m"


@with_exit_code
def main(argv: list[str] | None) -> None:
    options, paths, overrides = parse_arguments(argv)
    if options.show:
        return show_samples(Path(paths[0]), step=options.step, kind=options.kind)
    directories, run_configs = zip(*map(locate_model, paths), strict=True)
    known_configs = [path for path in (options.config, *run_configs, "config.yaml") if path]
    config = load_config(known_configs[0], overrides)
    if config.model.device == "cpu":
        cpu.prepare_process()
    else:
        gpu.prepare_process()
        if reason := why_no_cuda():
            raise ValueError(f"{reason}, or for the tiny model --config config_tiny.yaml")
    task, training = load_task(config.task), config.training
    reward_function = isolated_reward(
        config.task, timeout=training.reward_timeout, errors=training.reward_errors
    )
    with closing(reward_function):
        evaluation = Evaluation(config, task, reward_function, options.temperature)
        if options.ask is not None:
            evaluation.ask(directories[0], options.ask)
        else:
            evaluation.score(directories, options.samples, options.json)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str], list[str]]:
    """Returns the options, the paths of models and the overrides of the config."""
    parser = argparse.ArgumentParser(
        description="Score models on held-out questions. A run means its newest checkpoint."
    )
    add, path = parser.add_argument, os.path.expanduser
    name, text = "MODEL | key.path=value", "one or two models; overrides"
    add("models", nargs="+", type=path, metavar=name, help=text)
    text = "default: the config of the run, or config.yaml"
    add("--config", type=path, metavar="FILE", help=text)
    add("--samples", type=int, default=1, metavar="K", help="answers per question (default: 1)")
    text = "0: greedy decoding (default: 1, and 0 for --ask)"
    add("--temperature", type=float, metavar="T", help=text)
    text = "write every answer and the results to this file"
    add("--json", type=path, metavar="FILE", help=text)
    add("--ask", metavar="QUESTION", help="print the model's answer and its reward")
    add(
        "--show",
        action="store_true",
        help="print samples; green: positive advantage, red: negative",
    )
    add("--step", type=int, metavar="N", help="with --show: only this step")
    add("--kind", choices=["best", "worst", "longest"], help="with --show: only this kind")
    options = parser.parse_intermixed_args(argv)
    overrides = [m for m in options.models if "=" in m and not Path(m).exists()]
    paths = [m for m in options.models if m not in overrides]
    if options.temperature is None:
        options.temperature = 1.0 if options.ask is None else 0.0
    scores = options.ask is None and not options.show
    if not 1 <= len(paths) <= (2 if scores else 1):
        wanted = "one, or two to compare" if scores else "one for --ask or --show"
        raise ValueError(f"{len(paths)} models were given; wanted {wanted}")
    if not scores and (options.json or options.samples != 1):
        raise ValueError("--samples and --json need held-out questions; leave out --ask and --show")
    if not options.show and (options.step is not None or options.kind is not None):
        raise ValueError("--step and --kind select samples of a run; add --show")
    if options.samples < 1:
        raise ValueError(f"--samples {options.samples}: wanted at least 1")
    if not 0 <= options.temperature < math.inf:
        raise ValueError(f"--temperature {options.temperature}: wanted 0 or more")
    if options.json and not Path(options.json).parent.is_dir():
        folder = Path(options.json).parent
        raise FileNotFoundError(
            f"--json {options.json}: directory {folder} does not exist; create it"
        )
    return options, paths, overrides


def locate_model(path: str) -> tuple[Path, Path | None]:
    """The model directory that a path refers to, and the config of its run if it has one."""
    directory = Path(path)
    if not (directory / "config.json").exists():
        found = newest_good(directory / "checkpoints")
        if found is None:
            raise FileNotFoundError(
                f"{path} is neither a model directory (it has no config.json) nor a run that has a "
                "checkpoint; check the path"
            )
        return found[0], directory / "config.yaml"
    if (directory / COMPLETE).exists():
        try:
            check_files(directory)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: {error}; use another checkpoint, or remove {COMPLETE} if you "
                "changed the files yourself"
            ) from None
    in_run = directory.parent.name == "checkpoints"
    return directory, directory.parent.parent / "config.yaml" if in_run else None


@dataclass(frozen=True)
class Evaluation:
    """What stays the same for all models and questions."""

    config: Config
    task: ModuleType
    reward_function: Callable[..., Reward]
    temperature: float

    def load(self, directory: Path) -> tuple[Transformer, Tokenizer]:
        model, tokenizer = self.config.model, Tokenizer.from_pretrained(directory)
        if tokenizer.stop_conflict:
            log(f"note: {tokenizer.stop_conflict}")
        dtype = getattr(torch, model.dtype)
        return Transformer.from_pretrained(directory, device=model.device, dtype=dtype), tokenizer

    # ------------------------------------------------------------ held-out questions

    def score(self, directories: Sequence[Path], samples: int, json_path: str | None) -> None:
        """Print a table with one column per model; write every answer to json_path."""
        _, problems = load_problems(self.task, self.config.data)
        tokenizer = Tokenizer.from_pretrained(directories[0])
        try_task(self.task, problems[0], tokenizer, self.reward_function)
        answers = [self.answer(directory, problems, samples) for directory in directories]
        part_names = {name for episodes in answers for e in episodes for name in e.reward.parts}
        if not part_names & {"answer", "error"}:
            log(f"warning: {UNCOUNTED}")
        kinds = [getattr(self.task, "problem_kind", lambda _: "")(p) for p in problems]
        summaries = [
            {"model": str(directory), **model_summary(episodes, kinds)}
            for directory, episodes in zip(directories, answers, strict=True)
        ]
        comparison = compare_models(*answers) if len(answers) == 2 else None
        how = f"temperature {self.temperature:g}" if self.temperature else "greedy"
        counted = f"{len(problems)} held-out questions, answers to each: {samples}"
        log(f"{self.config.task}: {counted}, {how}\n{table(summaries)}")
        if comparison:
            log(comparison_line(comparison))
        if json_path:
            for summary, episodes in zip(summaries, answers, strict=True):
                summary["answers"] = [report_record(e, problems) for e in episodes]
            report = {
                "task": self.config.task,
                "temperature": self.temperature,
                "models": summaries,
                "comparison": comparison,
            }
            text = json.dumps(report, default=str) + "\n"
            Path(json_path).write_text(text, encoding="utf-8")

    def answer(self, directory: Path, problems: Sequence[dict], samples: int) -> list[Episode]:
        """Sample answers with the random numbers that train.py's evaluations use."""
        model, tokenizer = self.load(directory)
        questions = [make_question(self.task, problem, tokenizer) for problem in problems]
        with cpu.packed_for_decoding(model, len(questions) * samples):
            return rollout(
                model,
                tokenizer,
                questions,
                num_answers=samples,
                max_gen_len=self.config.training.max_gen_len,
                temperature=max(self.temperature, GREEDY),
                reward_function=self.reward_function,
                generator=seeded_generator(self.config.training.seed, "evaluation"),
                progress=Progress(str(directory)),
            )

    # ------------------------------------------------------------ one question

    def ask(self, directory: Path, text: str) -> None:
        """Print the model's answer token by token, then its reward."""
        if not hasattr(self.task, "parse_question"):
            raise ValueError(
                f"--ask: task={self.config.task} has no parse_question(text) -> problem; add that "
                "function to the file of the task"
            )
        problem = call_task(self.task, "parse_question", text)
        model, tokenizer = self.load(directory)
        question = make_question(self.task, problem, tokenizer)
        prompt, training = question.prompt_token_ids, self.config.training
        max_gen_len, temperature = training.max_gen_len, max(self.temperature, GREEDY)
        check_length(model.config, len(prompt), max_gen_len, "the prompt")
        params = SamplingParams(max_gen_len, temperature, tokenizer.vocab_size, tokenizer.stop_ids)
        uniforms_G = torch.rand(max_gen_len, generator=seeded_generator(training.seed, "ask"))
        print(printable(question.prompt.rpartition("\n")[2]), end="", flush=True)
        with cpu.packed_for_decoding(model, 1):
            tokens = generate_one(model, prompt, params, uniforms_G)
            answer, finished = print_tokens(tokens, tokenizer)
        reward = self.reward_function(answer, **problem)
        cut_off = "" if finished else f"; cut off after {max_gen_len} tokens (training.max_gen_len)"
        print(f"\n{describe(reward.total, reward.parts)}{cut_off}")


def table(summaries: list[dict]) -> str:
    """One row per figure, one column per model."""
    figures = [figures_of(summary) for summary in summaries]
    columns = [list(figures[0]), *(list(column.values()) for column in figures)]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*padded, strict=True))


def figures_of(summary: dict) -> dict[str, str]:
    """A model's column of the table."""
    kinds = summary["by_kind"] if len(summary["by_kind"]) > 1 else {}
    return {
        "": summary["model"],
        "success = pass@1 (95 % interval)": success(summary),
        **{
            f"  {kind}, {part['questions']} questions": success(part)
            for kind, part in kinds.items()
        },
        **{f"pass@{k}": f"{chance:.1%}" for k, chance in summary["pass_at"].items() if k > 1},
        "reward": f"{summary['reward']:.3f}",
        "mean length": f"{summary['mean_length']:.1f} tokens",
        "finished": f"{summary['finished']:.1%}",
    }


def success(part: dict) -> str:
    return f"{part['success']:.1%} ({part['success_low']:.1%} … {part['success_high']:.1%})"


def comparison_line(comparison: dict) -> str:
    return (
        f"difference {100 * comparison['difference']:+.1f} points: "
        "better on {questions_better} questions, worse on "
        "{questions_worse}, p = {p:.2g} (exact paired test)".format(**comparison)
    )


def report_record(episode: Episode, problems: Sequence[dict]) -> dict:
    """One answer in the JSON file; the reported figures can be computed from these."""
    return {
        "question": episode.question_id,
        "problem": problems[episode.question_id],
        "success": succeeded(episode),
        **answer_record(episode),
    }


def print_tokens(tokens: Iterable[int], tokenizer: Tokenizer) -> tuple[str, bool]:
    """Print an answer while it is generated. Returns its text and whether it ended by itself."""
    ids, answer, printed, finished = [], "", 0, False
    for token_id in tokens:
        if token_id in tokenizer.stop_ids:
            finished = True
            break
        ids.append(token_id)
        answer = tokenizer.decode(ids)
        # The last character may lack bytes that only come with the next token.
        complete = answer.rstrip("\N{REPLACEMENT CHARACTER}")
        print(printable(complete[printed:]), end="", flush=True)
        printed = len(complete)
    print(printable(answer[printed:]))
    return answer, finished


# ---------------------------------------------------------------- the samples of a run


def show_samples(run: Path, *, step: int | None, kind: str | None) -> None:
    """Print a run's samples. A question is printed once for consecutive answers to it."""
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    samples = [
        sample
        for sample in read_log(run / "samples.jsonl", SampleLine)
        if step in (None, sample.step) and kind in (None, sample.kind)
    ]
    if not samples:
        raise ValueError(f"{run} has no sample of that step and kind; leave out --step or --kind")

    def show(text: str, colour: str) -> None:
        print(f"{colour}{printable(text)}\033[0m" if coloured and colour else printable(text))

    question = None
    for sample in samples:
        advantage = math.nan if sample.advantage is None else sample.advantage
        show(
            f"step {sample.step}, {sample.kind}: {describe(sample.reward, sample.parts)}; "
            f"advantage {advantage:+.2f}, {sample.length} tokens"
            f"{'' if sample.finished else ', cut off'}",
            "",
        )
        if sample.question != question:
            show(sample.question, DIM)
        show(sample.text + "\n", GREEN if advantage > 0 else RED if advantage < 0 else "")
        question = sample.question


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # end quietly in `evaluate.py RUN --show | head`
    sys.exit(main())
