"""What a person sees while the program works: one bar for the part at hand, a line a step, and times for the logs."""

import functools
import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from resource import RUSAGE_SELF, getrusage

import torch
from tqdm import tqdm

from data_types import ALONE, Alone, Watch

UNITS = {"prefill": "prompts", "gradient": "tokens", "optimizer": "step"}
COLUMNS = {  # column: (metric, format); 80 characters wide in all
    "step": ("step", "{:>5d}"),
    "reward": ("reward", "{:6.3f}"),
    "solved": ("rewards/answer", "{:6.1%}"),
    "format": ("rewards/format", "{:6.1%}"),
    "equal": ("frac_reward_zero_std", "{:5.0%}"),
    "length": ("completions/mean_length", "{:6.1f}"),
    "cut off": ("completions/clipped_ratio", "{:7.1%}"),
    "entropy": ("entropy", "{:7.3f}"),
    "|grad|": ("grad_norm", "{:6.3f}"),
    "Δlogp": ("sampling/logp_difference_mean", "{:7.1e}"),
    "s/step": ("seconds", "{:6.2f}"),
}


class PhaseWatch(Watch):
    """Watches one phase (a rollout, an update, an evaluation): seconds and counts of its parts, and a bar on a terminal.

    `check` is called at every advance: the moments at which nothing is half-done, and a signal may end the work.
    `critical`: from the moment at which the weights begin to change; whoever has noted whose they now are takes it back.
    """

    def __init__(
        self, phase: str, check: Callable[[], None] = lambda: None, processes: Alone = ALONE
    ):
        self.phase, self.check, self.processes = phase, check, processes
        self.seconds, self.counts, self.critical = Counter(), Counter(), False
        self.card_bytes = 0  # in use on the card at the end of a part, by whomever: with the context, graphs and holes
        self._bar = None

    @contextmanager
    def part(self, name: str, total: int) -> Iterator[None]:
        clock, self.critical = time.perf_counter(), self.critical or name == "optimizer"
        with bar(
            f"{self.phase}: {name}",
            total,
            UNITS.get(name, "answers"),
            hidden=self.processes.rank > 0,
        ) as self._bar:
            yield
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
                free, total = torch.cuda.mem_get_info()
                self.card_bytes = max(self.card_bytes, total - free)
        self.seconds[name] += time.perf_counter() - clock

    def advance(self, amount: int = 0, **counts: int) -> None:
        self.counts.update(counts)
        if "row_steps" in counts:  # answers end late; that they grow is seen at once
            self._bar.set_postfix_str(f"{self.counts['row_steps']:,} tokens", refresh=False)
        self._bar.update(amount)
        self.check()


@contextmanager
def bar(title: str, total: int, unit: str, *, hidden: bool) -> Iterator[tqdm]:
    """A bar on a terminal, of which nothing is left at the end, not even the "^C" of whoever ended it."""
    form, columns = (
        "{desc} |{bar}| {n_fmt}/{total_fmt} {unit}{postfix} [{elapsed}]",
        shutil.get_terminal_size().columns,
    )
    shown = tqdm(
        desc=title,
        total=total,
        unit=unit,
        bar_format=form,
        ncols=columns - len("^C^C "),
        leave=False,
        miniters=0,
        disable=hidden or None,
    )
    erase = "" if shown.disable else "\033[K"
    try:
        yield shown
    finally:
        shown.close()
        print(erase, end="", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text of whatever origin made safe for a terminal or a page: control, direction and invisible characters spelled out."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text
    )


def say(line: str = "") -> None:
    tqdm.write(printable(line))


def say_last(text: str, *, failed: bool) -> None:
    """Print, to stderr if the program failed. Where nobody reads any more, nothing comes up again when Python ends."""
    for stream, line in (
        (sys.stdout, "" if failed else text),
        (sys.stderr, text if failed else ""),
    ):
        try:
            print(printable(line), end="\n" if line else "", file=stream, flush=True)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def with_exit_code(command: Callable[[list[str] | None], None]) -> Callable[..., int]:
    """What a command returns to the shell: 0, 2 for what the user can mend, 130 for Ctrl-C."""

    @functools.wraps(command)
    def main(argv: list[str] | None = None) -> int:
        try:
            command(argv)
        except (ValueError, OSError) as error:
            say_last(f"error: {error}", failed=True)
            return 2
        except KeyboardInterrupt:
            say_last("interrupted", failed=True)
            return 130
        return 0

    return main


def heading() -> str:
    return " ".join(f"{column:>{len(form.format(0))}}" for column, (_, form) in COLUMNS.items())


def row(metrics: dict) -> str:
    """One step; "-" for a metric that it lacks."""
    cells = (
        form.format(metrics[name]) if name in metrics else f"{'-':>{len(form.format(0))}}"
        for name, form in COLUMNS.values()
    )
    return " ".join(cells) + (
        f"\n      no step: {metrics['skipped']}" if metrics.get("skipped") else ""
    )


def duration(seconds: float) -> str:
    """In the unit in which it is easiest to grasp."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def peak_bytes(device: str) -> int:
    """On a GPU the peak since it was last reset; on a CPU the process's so far."""
    return (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else 1024 * getrusage(RUSAGE_SELF).ru_maxrss
    )
