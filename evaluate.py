"""Score models on the held-out questions, ask one a question, and look at the samples of a run.

    uv run evaluate.py MODEL [MODEL2] [--samples K] [--temperature T] [--json FILE] [--config FILE] [key.path=value ...]
    uv run evaluate.py MODEL --ask "3 5 7 = 22"
    uv run evaluate.py RUN --show [--step N] [--kind best|worst|longest]

MODEL is a model directory as published, a checkpoint, or a run, which stands for its newest checkpoint. A run and its
checkpoints bring their own config; for anything else it is config.yaml, unless --config names another.
"""

import argparse
import json
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch

from data_types import Episode, Reward
from generate import Sampling, check_length, generate_one, seeded_generator
from grpo import rollout
from harness import cpu
from harness.card import why_no_card
from harness.checkpoint import COMPLETE, check_files, newest_good
from harness.config import Config, load_config
from harness.console import PhaseWatch, printable, say, with_exit_code
from harness.logs import SampleLine, read_log
from harness.metrics import UNCOUNTED, compare_models, model_summary
from harness.tasks import guard_reward, load_problems, load_task, make_question
from qwen2_model import Transformer
from tokenizer import Tokenizer

GREEDY = 1e-6  # a temperature at which the likeliest token has all of the probability
GREEN, RED, DIM = "\033[32m", "\033[31m", "\033[2m"


@with_exit_code
def main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        description="Score models on held-out questions; a run stands for its newest checkpoint."
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="MODEL | key.path=value",
        help="one or two models; changes to the config",
    )
    parser.add_argument(
        "--config",
        help="YAML file with the task and its questions (default: that of the run, or config.yaml)",
    )
    parser.add_argument(
        "--samples", type=int, default=1, metavar="K", help="answers to each question (default: 1)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="of sampling; 0: always the likeliest token",
    )
    parser.add_argument("--json", metavar="FILE", help="write every answer and its outcome there")
    parser.add_argument(
        "--ask",
        metavar="QUESTION",
        help="let the model answer it; another training.seed, another answer",
    )
    parser.add_argument(
        "--show",
        action="store_true",
        help="print the samples of a run; green: positive advantage, red: negative",
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="with --show: the samples of this step alone"
    )
    parser.add_argument(
        "--kind",
        choices=["best", "worst", "longest"],
        help="with --show: the samples of this kind alone",
    )
    arguments = parser.parse_intermixed_args(argv)
    overrides = [a for a in arguments.models if "=" in a and not Path(a).exists()]
    paths = [a for a in arguments.models if a not in overrides]
    alone = arguments.ask is not None or arguments.show
    if alone and (arguments.json or arguments.samples != 1):
        raise ValueError(
            "--samples and --json belong to the held-out questions; leave them out with --ask or --show"
        )
    if not 0 <= arguments.temperature < math.inf:
        raise ValueError(f"--temperature {arguments.temperature}: wanted 0 or more")
    if not 1 <= len(paths) <= (1 if alone else 2):
        wanted = "one for --ask or --show" if alone else "one, or two to compare"
        raise ValueError(f"{len(paths)} models were given; wanted {wanted}")
    if arguments.show:
        show_samples(Path(paths[0]), step=arguments.step, kind=arguments.kind)
        return None
    directories, own_configs = zip(*map(locate_model, paths), strict=True)
    config = load_config(
        arguments.config or next(filter(None, own_configs), "config.yaml"), overrides
    )
    if config.model.device == "cpu":
        cpu.prepare_process()
    elif reason := why_no_card():
        raise ValueError(
            f"{reason}; add model.device=cpu, or for the model of the tiny run --config config_tiny.yaml"
        )
    task, training = load_task(config.task), config.training
    reward = guard_reward(
        task.reward_function, timeout=training.reward_timeout, errors=training.reward_errors
    )
    if arguments.ask is not None:
        ask(
            config,
            task,
            reward,
            directories[0],
            text=arguments.ask,
            temperature=arguments.temperature,
        )
    else:
        score(
            config,
            task,
            reward,
            directories,
            samples=arguments.samples,
            temperature=arguments.temperature,
            json_path=arguments.json,
        )


def locate_model(path: str) -> tuple[Path, Path | None]:
    """The model directory that a path stands for, and the config of the run it comes from, if it comes from one."""
    directory = Path(path)
    if not (directory / "config.json").exists():
        found = newest_good(directory / "checkpoints")
        if found is None:
            raise FileNotFoundError(
                f"{path} is neither a model directory (it has no config.json) nor a run with a checkpoint yet"
            )
        return found[0], directory / "config.yaml"
    if (directory / COMPLETE).exists():
        try:
            check_files(directory)
        except ValueError as error:
            raise ValueError(
                f"{path} is damaged: {error}; name its run, which has others, or remove {COMPLETE} if you changed the "
                "files yourself"
            ) from None
    return (
        directory,
        directory.parent.parent / "config.yaml" if directory.parent.name == "checkpoints" else None,
    )


def load_model(config: Config, directory: Path) -> tuple[Transformer, Tokenizer]:
    dtype = getattr(torch, config.model.dtype)
    return Transformer.from_pretrained(
        directory, device=config.model.device, dtype=dtype
    ), Tokenizer.from_pretrained(directory)


# ---------------------------------------------------------------- held-out questions


def score(
    config: Config,
    task: ModuleType,
    reward_function: Callable[..., Reward],
    directories: tuple[Path, ...],
    *,
    samples: int,
    temperature: float,
    json_path: str | None,
) -> None:
    """Print a table of the models, each answering with the random numbers of train.py's evaluations."""
    if samples < 1:
        raise ValueError(f"--samples {samples}: wanted at least 1")
    if json_path and not Path(json_path).parent.is_dir():
        raise FileNotFoundError(
            f"--json {json_path}: there is no directory {Path(json_path).parent}; make it first"
        )
    _, problems = load_problems(task, config.data)
    answers = []
    for directory in directories:
        model, tokenizer = load_model(config, directory)
        questions = [make_question(task, problem, tokenizer) for problem in problems]
        with cpu.packed_for_decoding(model, len(questions) * samples):
            answers.append(
                rollout(
                    model,
                    tokenizer,
                    questions,
                    num_answers=samples,
                    max_gen_len=config.training.max_gen_len,
                    temperature=max(temperature, GREEDY),
                    reward_function=reward_function,
                    generator=seeded_generator(config.training.seed, "evaluation"),
                    watch=PhaseWatch(str(directory)),
                )
            )
    if not any(
        episode.reward.parts.keys() & {"answer", "error"}
        for episodes in answers
        for episode in episodes
    ):
        say(f"warning: {UNCOUNTED}")
    kinds = [getattr(task, "problem_kind", lambda problem: "")(problem) for problem in problems]
    summaries = [
        {"model": str(d), **model_summary(episodes, kinds)}
        for d, episodes in zip(directories, answers, strict=True)
    ]
    comparison = compare_models(*answers) if len(answers) == 2 else None
    how = f"at temperature {temperature:g}" if temperature else "greedy"
    print(
        f"{config.task}: {len(problems)} held-out questions, answers to each: {samples}, {how}\n{table(summaries)}"
    )
    if comparison:
        print(
            "difference {difference:+.1%}: better on {questions_better} questions, worse on {questions_worse}, "
            "p = {p:.2g} (exact paired test)".format(**comparison)
        )
    if json_path:
        for summary, episodes in zip(summaries, answers, strict=True):
            summary["answers"] = [answer_record(episode, problems) for episode in episodes]
        report = {
            "task": config.task,
            "temperature": temperature,
            "models": summaries,
            "comparison": comparison,
        }
        Path(json_path).write_text(json.dumps(report, default=str) + "\n", encoding="utf-8")


def table(summaries: list[dict]) -> str:
    """One column a model."""
    columns = [list(cells(summaries[0])), *(list(cells(summary).values()) for summary in summaries)]
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return "\n".join("  ".join(row).rstrip() for row in zip(*padded, strict=True))


def cells(summary: dict) -> dict[str, str]:
    """What the table says of a model, by the name of its row."""

    def success(part: dict) -> str:
        return f"{part['success']:.1%} ({part['success_low']:.1%} … {part['success_high']:.1%})"

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


def answer_record(episode: Episode, problems: list[dict]) -> dict:
    """One answer in the JSON file: all that the figures are counted from."""
    return {
        "question": episode.question_id,
        "problem": problems[episode.question_id],
        "text": episode.text,
        "success": episode.reward.parts.get("answer", 0.0) == 1.0,
        "reward": episode.reward.total,
        "parts": episode.reward.parts,
        "length": len(episode.response_token_ids),
        "finished": episode.is_finished,
    }


# ---------------------------------------------------------------- one question, and the samples of a run


def ask(
    config: Config,
    task: ModuleType,
    reward_function: Callable[..., Reward],
    directory: Path,
    *,
    text: str,
    temperature: float,
) -> None:
    """Print the model's answer to a question token by token, then what the task makes of it."""
    if not hasattr(task, "parse_question"):
        raise ValueError(
            f"--ask: task={config.task} has no parse_question(text) -> problem; add that function to the task's file"
        )
    problem = task.parse_question(text)
    model, tokenizer = load_model(config, directory)
    question = make_question(task, problem, tokenizer)
    check_length(model.config, len(question.prompt_token_ids), config.training.max_gen_len)
    sampling = Sampling(
        config.training.max_gen_len,
        max(temperature, GREEDY),
        tokenizer.vocab_size,
        tokenizer.stop_ids,
    )
    uniforms_G = torch.rand(
        sampling.max_gen_len, generator=seeded_generator(config.training.seed, "ask")
    )
    print(question.prompt.rpartition("\n")[2], end="", flush=True)
    cut_off = f"; cut off after {sampling.max_gen_len} tokens (training.max_gen_len)"
    ids, answer, printed = [], "", 0
    with cpu.packed_for_decoding(model, 1):
        for token_id in generate_one(model, question.prompt_token_ids, sampling, uniforms_G):
            if token_id in tokenizer.stop_ids:
                cut_off = ""
                break
            ids.append(token_id)
            answer = tokenizer.decode(ids)
            whole = answer.rstrip(
                "\N{REPLACEMENT CHARACTER}"
            )  # of the last character not all bytes may be there yet
            print(printable(whole[printed:]), end="", flush=True)
            printed = len(whole)
    print(printable(answer[printed:]))
    reward = reward_function(answer, **problem)
    print(f"\n{describe(reward.total, reward.parts)}{cut_off}")


def describe(reward: float | None, parts: dict[str, float | None]) -> str:
    """None stands for a number that is not finite."""
    total, *others = (
        f"{name} {math.nan if value is None else value:g}"
        for name, value in (("reward", reward), *parts.items())
    )
    return f"{total} ({', '.join(others)})"


def show_samples(run: Path, *, step: int | None, kind: str | None) -> None:
    """Print a run's samples, each question once where several follow it."""
    coloured, shown = sys.stdout.isatty() and not os.environ.get("NO_COLOR"), None
    for sample in read_log(run / "samples.jsonl", SampleLine):
        if step not in (None, sample.step) or kind not in (None, sample.kind):
            continue
        advantage = math.nan if sample.advantage is None else sample.advantage
        colour = GREEN if advantage > 0 else RED if advantage < 0 else ""
        head = (
            f"step {sample.step}, {sample.kind}: {describe(sample.reward, sample.parts)}; advantage {advantage:+.2f}, "
            f"{sample.length} tokens{'' if sample.finished else ', cut off'}"
        )
        for paint, text in (
            ("", head),
            (DIM, sample.question if sample.question != shown else ""),
            (colour, sample.text + "\n"),
        ):
            if text:
                print(f"{paint}{printable(text)}\033[0m" if coloured and paint else printable(text))
        shown = sample.question
    if shown is None:
        raise ValueError(f"{run} holds no sample of that step and kind")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `… --show | head` ends quietly
    sys.exit(main())
