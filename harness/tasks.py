"""What train.py and evaluate.py ask of a task, and how they protect themselves from its code.

A task is a module with three functions, found by the name in the config (`task: countdown_task`):

    load_problems(data) -> (train, test)                    two sequences of dicts; data: the section of the config
    render_prompt(problem: dict, tokenizer) -> str          what the model is given, the answer's beginning included
    reward_function(response: str, **problem) -> Reward     the score of the model's continuation
    parse_question(text: str) -> dict                       optional: lets evaluate.py --ask take a question
"""

import contextlib
import functools
import importlib
import inspect
import io
import json
import math
import os
import resource
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from pydantic import BaseModel

from data_types import Question, Reward
from generate import seeded_generator
from harness.console import printable
from tokenizer import Tokenizer

FUNCTIONS = ("load_problems", "render_prompt", "reward_function")
MAX_REWARD = 1e6  # beyond, a number is a fault of the task
MAX_MEMORY = 4 * 1024**3  # bytes that a reward function may ask for


def load_task(name: str) -> ModuleType:
    """Import a task by its module name, dots allowed. Raises ValueError if it is not there, fails or lacks a function."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"task={name!r} is not a module name; write countdown_task for the file countdown_task.py"
        )
    try:
        task = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"task={name!r}: {error}; it must be a Python file in this directory, without the .py"
            ) from None
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if not frame.filename.startswith("<frozen")
        ]
        place = (
            (error.filename, error.lineno)
            if isinstance(error, SyntaxError)
            else (frames[-1].filename, frames[-1].lineno)
        )
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"task={name!r} is there, but its import fails with {reason:.300} ({place[0]}:{place[1]})"
        ) from None
    if missing := [f for f in FUNCTIONS if not callable(getattr(task, f, None))]:
        raise ValueError(
            f"task={name!r} lacks {', '.join(missing)}; harness/tasks.py says what each does"
        )
    if not isinstance(getattr(task, "Data", BaseModel), type(BaseModel)):
        raise ValueError(
            f"task={name!r}: its Data must be a pydantic BaseModel, which declares the keys of the section data"
        )
    return task


def load_problems(task: ModuleType, data: Any) -> tuple[Sequence[dict], Sequence[dict]]:
    """The task's training and held-out problems. Raises ValueError if there are none, or its reward function cannot take them."""
    found = task.load_problems(data)
    try:
        train, test = found
        sizes = len(train), len(test)
    except (TypeError, ValueError):
        raise ValueError(
            f"task={task.__name__!r}: load_problems returned {found!r:.100}; wanted two lists of problems"
        ) from None
    for kind, problems, size in zip(("training", "held-out"), (train, test), sizes, strict=True):
        if not size:
            raise ValueError(
                f"task={task.__name__!r} leaves no {kind} problems; give it more data, or change data.test_size"
            )
        try:
            inspect.signature(task.reward_function).bind("the response", **problems[0])
        except TypeError as error:
            raise ValueError(
                f"task={task.__name__!r}: reward_function cannot be called with a response and the keys of the {kind} "
                f"problem {problems[0]!r:.300} ({error}); let it take each key by its name"
            ) from None
    return train, test


def draw_problems(problems: Sequence[dict], step: int, *, count: int, seed: int) -> list[dict]:
    """The problems of a step: the next `count` of a shuffled pass over all of them, and so on pass after pass."""
    places = range((step - 1) * count, step * count)
    return [
        problems[_shuffled(len(problems), seed, place // len(problems))[place % len(problems)]]
        for place in places
    ]


@functools.lru_cache(maxsize=2)
def _shuffled(total: int, seed: int, number: int) -> list[int]:
    return torch.randperm(total, generator=seeded_generator(seed, "order", number)).tolist()


def make_question(task: ModuleType, problem: dict, tokenizer: Tokenizer) -> Question:
    prompt = task.render_prompt(problem, tokenizer)
    return Question(prompt, tokenizer.encode(prompt), problem)


# ---------------------------------------------------------------- rewards


def guard_reward(
    reward_function: Callable[..., Reward],
    *,
    timeout: float,
    errors: str,
    closes: Iterable[int] = (),
) -> Callable[..., Reward]:
    """The reward function in a process of its own, replaced when it takes over `timeout` seconds for an answer.

    Called before there are weights, threads and a CUDA context, of which the process would keep copies; closes: open files
    that it is not to keep open. If the function raises, hangs, ends its process, or returns what is no Reward:
    errors="zero" scores the answer 0 with a part "error"; errors="stop" raises ValueError naming the question, the answer
    and the line. A total that is not finite passes: the update refuses it and names the question. Its close() ends the process.

    The process is a worker, which may hang in C, exit, fork, eat memory or change its problem. It is the child of a keeper,
    forked here to pass on what is asked and answered and to replace it: in the middle of a run a fork would copy all that
    the run holds by then, and a fresh interpreter would import torch again (2 s, 150 MB). What comes back is JSON, which
    cannot run code here. Both end with the run, however it ends: the keeper listens to a pipe that only the run holds.
    """
    keeper, run = Pipe()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()  # or the child would have the text too
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # that there are threads: those of numpy, which stand idle
        _fork(_keep, run, [keeper.fileno(), *closes], reward_function, timeout)
    run.close()

    def guarded(response: str, /, **problem) -> Reward:
        try:
            keeper.send((response, problem))
            outcome = json.loads(keeper.recv_bytes())
        except (EOFError, OSError):
            raise ChildProcessError(
                "the process that keeps the reward function's process was killed"
            ) from None
        except Exception as error:  # whatever it is in the problem that cannot be pickled
            outcome = f"cannot be sent its problem: {error!r:.300}"
        if not isinstance(outcome, str):
            return Reward(*outcome)
        if errors == "zero":
            return Reward(0.0, {"error": 1.0})
        raise ValueError(
            f"the reward function {outcome} on the question {problem!r:.300} and the answer {response!r:.300}; mend "
            "it, or count such answers as 0 with training.reward_errors=zero"
        )

    guarded.close = keeper.close
    return guarded


def _fork(function: Callable[..., None], *arguments) -> int:
    """The process that runs the function, and then nothing more of this program."""
    if child := os.fork():
        return child
    try:
        function(*arguments)
    finally:
        os._exit(0)


def _keep(
    run: Connection, closes: Iterable[int], reward_function: Callable[..., Reward], timeout: float
) -> None:
    """Pass each request of the run to a worker and its reply to the run; replace a worker that hangs or has ended."""
    os.setsid()  # away from the terminal's signals
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(
            signum, lambda *_: None
        )  # a program that the task starts would inherit SIG_IGN
    for descriptor in closes:
        os.close(descriptor)
    sys.stdout, sys.stderr = _Printable(sys.stdout), _Printable(sys.stderr)
    if (
        sys.platform == "linux"
    ):  # who asks for too much gets a MemoryError, before the kernel looks for a process to kill
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        with contextlib.suppress(ValueError):  # a hard limit below it stands
            resource.setrlimit(
                resource.RLIMIT_DATA,
                (held + MAX_MEMORY, resource.getrlimit(resource.RLIMIT_DATA)[1]),
            )
    while True:
        worker, keeper = Pipe()
        pid = _fork(_serve, keeper, (run, worker), reward_function)
        keeper.close()
        fault = ""
        try:
            os.setpgid(pid, pid)  # what it starts ends with it
            while not fault:
                worker.send_bytes(run.recv_bytes())
                if worker in wait([worker, run], timeout):
                    run.send_bytes(worker.recv_bytes())
                else:
                    fault = f"took over {timeout} s"
        except (EOFError, OSError):
            pass  # the worker is gone; or the run is, and then the last line ends us
        os.killpg(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        fault = fault or f"ended its process with code {code}"
        run.send_bytes(json.dumps(f"{fault} ({_line_in_task(reward_function)})").encode())


def _serve(
    keeper: Connection, others: Iterable[Connection], reward_function: Callable[..., Reward]
) -> None:
    for end in others:
        end.close()
    own = os.getpid()
    while True:
        response, problem = keeper.recv()
        try:
            reply = _plain(reward_function(response, **problem))
        except BaseException as error:
            reply = (
                f"raised {printable(repr(error))[:300]} ({_line_in_task(reward_function, error)})"
            )
        if os.getpid() != own:
            return  # the task forked, and this is the copy
        keeper.send_bytes(json.dumps(reply).encode())


class _Printable(io.TextIOBase):
    """What a task prints is often a model's text: shown at once, without what would steer the terminal."""

    def __init__(self, stream: io.TextIOBase):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(printable(text))
        self._stream.flush()
        return len(text)


def _plain(reward: Reward) -> tuple[float, dict[str, float]]:
    """A reward as numbers that JSON can hold; whatever adds to a float is one, numpy's included, and a text is not."""
    if not (
        isinstance(reward, Reward)
        and isinstance(reward.parts, dict)
        and all(isinstance(name, str) and name.isprintable() for name in reward.parts)
    ):
        raise TypeError(f"it returned {reward!r}, not a Reward whose parts have names")
    try:
        total, *parts = (float(number + 0.0) for number in (reward.total, *reward.parts.values()))
    except TypeError:
        raise TypeError(f"it returned {reward!r}, in which something is no number") from None
    if any(MAX_REWARD < abs(number) < math.inf for number in (total, *parts)):
        raise ValueError(f"it returned {reward!r}; no number may be beyond {MAX_REWARD:g}")
    return total, dict(zip(reward.parts, parts, strict=True))


def _line_in_task(reward_function: Callable, error: BaseException | None = None) -> str:
    """file:line at which the task's own code was when the error came up; without one, where the function begins."""
    code = getattr(reward_function, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__) if error else []
    if own := [frame for frame in frames if code is None or frame.filename == code.co_filename]:
        return f"{own[-1].filename}:{own[-1].lineno}"
    return f"{code.co_filename}:{code.co_firstlineno}" if code else printable(repr(reward_function))
