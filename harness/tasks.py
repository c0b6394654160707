"""What train.py and evaluate.py ask of a task, and how they protect themselves from its code.

A task is a module with three functions, found by the name in the config (`task: countdown_task`):

    load_problems(data: DataConfig) -> (train, test)        two sequences of dicts
    render_prompt(problem: dict, tokenizer) -> str          what the model is given, the answer's beginning included
    reward_function(response: str, **problem) -> Reward     the score of the model's continuation
    parse_question(text: str) -> dict                       optional: lets evaluate.py --ask take a question
"""

import importlib
import signal
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from types import ModuleType

from data_types import Question, Reward
from tokenizer import Tokenizer

FUNCTIONS = ("load_problems", "render_prompt", "reward_function")


def load_task(name: str) -> ModuleType:
    """Import a task by its module name, dots allowed. Raises ValueError if it is not there or lacks a function."""
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"task={name!r} is not a module name; write countdown_task for the file countdown_task.py")
    try:
        task = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ValueError(f"task={name!r}: {error}; it must be a Python file in this directory, without the .py") from None
    if missing := [f for f in FUNCTIONS if not callable(getattr(task, f, None))]:
        raise ValueError(f"task={name!r} lacks {', '.join(missing)}; harness/tasks.py says what each does")
    return task


def make_question(task: ModuleType, problem: dict, tokenizer: Tokenizer) -> Question:
    prompt = task.render_prompt(problem, tokenizer)
    return Question(prompt, tokenizer.encode(prompt), problem)


class _TimeUp(BaseException):
    """Not an Exception, so that a task's `except Exception` does not swallow it."""


def guard_reward(reward_function: Callable[..., Reward], *, timeout: float, errors: str) -> Callable[..., Reward]:
    """The reward function, cut off after `timeout` seconds an answer.

    If it raises, hangs, or returns what is no Reward: errors="zero" scores the answer 0 with a part "error";
    errors="stop" raises ValueError naming the question, the answer and the line. A total that is not finite passes:
    the update refuses it and names the question.
    """

    def guarded(response: str, **problem) -> Reward:
        try:
            with _time_limit(timeout):
                reward = reward_function(response, **problem)
            if not isinstance(reward, Reward) or not isinstance(reward.parts, dict):
                raise TypeError(f"it returned {reward!r}, not a Reward with its parts")
            if not all(isinstance(number, int | float) for number in (reward.total, *reward.parts.values())):
                raise TypeError(f"it returned {reward!r}, in which something is no number")
            return reward
        except (Exception, _TimeUp) as error:
            if errors == "zero":
                return Reward(0.0, {"error": 1.0})
            where = _line_in_task(reward_function, error)
            what = f"took over {timeout} s" if isinstance(error, _TimeUp) else f"raised {error!r}"
            raise ValueError(f"the reward function {what} ({where}) on the question {problem!r:.300} "
                             f"and the answer {response!r:.300}; mend it, or count such answers as 0 with "
                             "training.reward_errors=zero") from None

    return guarded


def _line_in_task(reward_function: Callable, error: BaseException) -> str:
    """file:line at which the task's own code was when the error came up."""
    code = getattr(reward_function, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if code is None or frame.filename == code.co_filename]
    return f"{own[-1].filename}:{own[-1].lineno}" if own else f"{code.co_filename}:{code.co_firstlineno}"


@contextmanager
def _time_limit(seconds: float):
    """Interrupt Python code of the main thread after so many seconds."""

    def ring(signum, frame):
        raise _TimeUp

    previous = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


