"""Load a task, and run its reward function in a separate process.

A task is a module that the config names (`task: countdown_task`), with these functions:

    load_problems(data) -> (train, test)                two sequences of dicts; data: config.data
    render_prompt(problem: dict, tokenizer) -> str      the prompt, with the start of the answer
    reward_function(response: str, **problem) -> Reward the score of the model's continuation
    parse_question(text: str) -> dict                   optional: for evaluate.py --ask
    problem_kind(problem: dict) -> str                  optional: evaluate.py reports each kind
    right_answer(problem: dict) -> str                  optional: for train.py --try-task
"""

import atexit
import contextlib
import importlib
import inspect
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import BaseModel

from data_types import Reward
from harness.console import printable
from tokenizer import Tokenizer

FUNCTIONS = ("load_problems", "render_prompt", "reward_function")
MAX_NUMBER = 1e6  # a finite reward beyond this is a bug in the task
MAX_MEMORY = 4 * 1024**3  # bytes that a reward function may allocate
MAX_REPLY = 2**20  # bytes
SERVER_SECONDS = 1.0  # to wait before the second try to start a worker
CHECK_SECONDS = 1.0  # how often a wait for the worker is checked for a signal
ROOT = Path(__file__).parent.parent
JUNK = "</think> no idea\n<answer>1 / 0 = ² \0</answer>"
SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}


def load_task(name: str) -> ModuleType:
    """Import a task by its module name.

    Raises ValueError if it does not exist, if its import fails, or if it lacks a function.
    """
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(
            f"task={name!r} is not a module name; write countdown_task for countdown_task.py"
        )
    try:
        task = importlib.import_module(name)
    except (Exception, SystemExit) as error:
        if isinstance(error, ModuleNotFoundError) and f"{name}.".startswith(f"{error.name}."):
            raise ValueError(
                f"task={name!r}: {error}; put its file in this directory and leave out the .py"
            ) from None
        raise ValueError(
            f"task={name!r} cannot be imported: {type(error).__name__}: {error!s:.300} "
            f"({_import_error_line(error)})"
        ) from None
    if missing := [f for f in FUNCTIONS if not callable(getattr(task, f, None))]:
        raise ValueError(
            f"task={name!r} lacks {', '.join(missing)}; harness/rewards.py describes each function"
        )
    if not isinstance(getattr(task, "Data", BaseModel), type(BaseModel)):
        raise ValueError(
            f"task={name!r}: Data must be a pydantic BaseModel that declares the keys of the "
            "config's section data"
        )
    return task


def call_task(task: ModuleType, name: str, *arguments: Any) -> Any:
    """Call a function of the task. Raises ValueError that names the task if the function fails.

    The text of a ValueError that the code raises by itself is a message to the user. Anything else
    is a bug, so the error names the function and the line. An OSError and a MemoryError say enough.
    """
    try:
        return getattr(task, name)(*arguments)
    except (OSError, MemoryError):
        raise
    except Exception as error:
        message = str(error)
        raised_by = traceback.extract_tb(error.__traceback__)[-1]
        is_message = isinstance(error, ValueError) and (raised_by.line or "").startswith("raise")
        if not is_message or not _is_own_code(raised_by.filename, task):
            line = _line_in_task(getattr(task, name), error)
            message = f"{name} raised {error!r:.300} ({line})"
        if isinstance(error, AttributeError) and isinstance(error.obj, BaseModel):
            message += f"; declare data.{error.name} in a class Data, as in countdown_task.py"
        raise ValueError(f"task={task.__name__!r}: {message}") from None


def _is_own_code(filename: str, task: ModuleType) -> bool:
    """Whether a file belongs to this repository or is the task, and not to a library."""
    is_library = "site-packages" in filename or "dist-packages" in filename
    return filename == task.__file__ or (filename.startswith(str(ROOT)) and not is_library)


def try_task(task: ModuleType, problem: dict, tokenizer: Tokenizer, reward: Callable) -> str:
    """The prompt of a problem, and the rewards of answers that any reward function must survive.

    Done before a model is loaded, so that a bug in the task shows at once. Raises ValueError.
    """
    prompt = call_task(task, "render_prompt", problem, tokenizer)
    if not isinstance(prompt, str) or not prompt:
        raise ValueError(
            f"task={task.__name__!r}: render_prompt returned {prompt!r:.100}; it must return the "
            "prompt as text, for example tokenizer.render_chat(messages)"
        )
    answers = {"an empty answer": "", f"the answer {JUNK!r}": JUNK}
    if hasattr(task, "right_answer"):
        answers["a right answer"] = call_task(task, "right_answer", problem)
    scored = {name: reward(answer, **problem) for name, answer in answers.items()}
    lines = [f"{name}: {describe(r.total, r.parts)}" for name, r in scored.items()]
    return "\n".join([f"{problem!r:.1000}", prompt, *lines, ""])


def describe(reward: float | None, parts: dict[str, float | None]) -> str:
    """For example "reward 1.1 (answer 1, format 1)". None means a number that was not finite."""
    texts = {n: f"{math.nan if v is None else v:g}" for n, v in parts.items()}
    total = math.nan if reward is None else reward
    return f"reward {total:g} ({', '.join(f'{name} {text}' for name, text in texts.items())})"


def load_problems(task: ModuleType, data: Any) -> tuple[Sequence[dict], Sequence[dict]]:
    """The task's training and held-out problems.

    Raises ValueError if there are none, or if the reward function does not accept their keys.
    """
    loaded = call_task(task, "load_problems", data)
    try:
        train, test = loaded
        sizes = {"training": len(train), "held-out": len(test)}
    except (TypeError, ValueError):
        found = re.sub(" at 0x[0-9a-f]+", "", repr(loaded))
        raise ValueError(
            f"task={task.__name__!r}: load_problems returned {found:.100}; it must return two "
            "lists of problems"
        ) from None
    for kind, problems in (("training", train), ("held-out", test)):
        if not sizes[kind]:
            raise ValueError(
                f"task={task.__name__!r} has {sizes['training']} training and {sizes['held-out']} "
                "held-out problems, and needs both; give it more data or change data.test_size"
            )
        try:
            inspect.signature(task.reward_function).bind("the response", **problems[0])
        except TypeError as error:
            raise ValueError(
                f"task={task.__name__!r}: reward_function cannot be called with a response and the "
                f"keys of the {kind} problem {problems[0]!r:.300} ({error}); give it one parameter "
                "for each key"
            ) from None
    return train, test


class IsolatedReward:
    """A task's reward function in a worker process; see isolated_reward."""

    def __init__(self, task_name: str, timeout: float, errors: str, check: Callable[[], None]):
        self.task_name, self.timeout, self.errors, self.check = task_name, timeout, errors, check
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__, task_name])
        _start_forkserver()
        self._worker = None
        # A worker ignores SIGTERM, so multiprocessing would wait for it when the program exits.
        atexit.register(self.close)

    def __call__(self, response: str, /, **problem) -> Reward:
        try:
            request = pickle.dumps((response, problem))
        except Exception as error:
            outcome = f"could not be sent the problem: {error!r:.300}"
        else:
            outcome = self._ask_worker(request)
        if not isinstance(outcome, str):
            return Reward(*outcome)
        if self.errors == "zero":
            return Reward(0.0, {"error": 1.0})
        fix = "Fix the function, or set training.reward_errors=zero to score such answers 0"
        if outcome.startswith("returned"):  # which has little to do with this answer
            fix = "Fix the function"
        raise ValueError(
            f"the reward function {outcome}. The question was {problem!r:.300} and the answer "
            f"{response!r:.300}. {fix}"
        )

    def close(self) -> None:
        """End the worker and everything it started. A later call starts a new worker."""
        atexit.unregister(self.close)
        if self._worker is not None:
            self._kill_worker()

    def _ask_worker(self, request: bytes) -> list | str:
        """Return [total, parts], or a text that says what went wrong."""
        if self._worker is None:
            self._start_worker()
        worker, answered = self._worker, False
        try:
            self._connection.send_bytes(request)
            end = time.monotonic() + self.timeout
            while not self._connection.poll(min(CHECK_SECONDS, max(0, end - time.monotonic()))):
                self.check()
                if time.monotonic() >= end:
                    return (
                        f"took longer than {self.timeout:g} s ({self._line}); make it faster or "
                        "raise training.reward_timeout"
                    )
            # JSON rather than pickle: unpickling what foreign code sends would run it here.
            outcome = json.loads(self._connection.recv_bytes(MAX_REPLY))
            answered = True
            return outcome
        except (EOFError, OSError, ValueError):
            self._kill_worker()
            return f"ended its process with exit code {worker.exitcode} ({self._line})"
        finally:
            if not answered and self._worker is not None:  # also after Ctrl-C
                self._kill_worker()

    def _start_worker(self) -> None:
        try:
            self._fork_worker()
        except (EOFError, OSError):  # a server that was just killed still looks alive
            time.sleep(SERVER_SECONDS)
            try:
                self._fork_worker()
            except (EOFError, OSError) as error:
                raise ChildProcessError(
                    f"cannot start a process for the reward function of task={self.task_name!r}: "
                    f"{error!r}"
                ) from None

    def _fork_worker(self) -> None:
        _start_forkserver()
        self._connection, theirs = self._context.Pipe()
        # Not daemon=True: a daemon may not use multiprocessing, and some tasks do.
        worker = self._context.Process(target=_serve, args=(theirs, self.task_name, self.timeout))
        worker.start()  # imports train.py once more, which takes 0.1 s and does no harm
        theirs.close()
        self._line = json.loads(self._connection.recv_bytes(MAX_REPLY))
        self._worker = worker

    def _kill_worker(self) -> None:
        with contextlib.suppress(OSError):  # it has not made its process group yet, or is gone
            os.killpg(self._worker.pid, signal.SIGKILL)
        self._worker.kill()
        self._worker.join()
        self._connection.close()
        self._worker = None


def isolated_reward(
    task_name: str, *, timeout: float, errors: str, check: Callable[[], None] = lambda: None
) -> IsolatedReward:
    """Return the task's reward function, isolated so that its bugs cannot hang or corrupt the run.

    The function runs in a worker process, which is killed and replaced if the function takes more
    than `timeout` seconds for an answer or ends its process. In these cases, and if the function
    raises, allocates more than MAX_MEMORY (Linux only) or returns something other than a Reward,
    errors="zero" scores the answer 0 with the part "error", and errors="stop" raises ValueError
    naming the question, the answer, the line and the fix. A total that is not finite is passed on:
    the update reports it. check is called about once a second while an answer is being scored; it
    raises to end the wait.

    Call this early: it starts a server process, which imports the task in the background (this
    takes about as long as importing torch) and then forks the workers. close() ends the worker.
    """
    return IsolatedReward(task_name, timeout, errors, check)


def _start_forkserver() -> None:
    """Start the server process if it is not running."""
    resource_tracker.ensure_running()  # if started later, it would unblock the signals
    # The server and its workers inherit the mask. Signals such as Ctrl-C are only for the run.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _serve(connection: Connection, task_name: str, timeout: float) -> None:
    """Score answers until the run closes its end of the connection."""
    os.setsid()  # a process group that can be killed with everything the task starts
    for signum in SIGNALS:
        signal.signal(signum, lambda *_: None)  # programs inherit SIG_IGN but not a handler
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    sys.stdout, sys.stderr = _PrintableStream(sys.stdout), _PrintableStream(sys.stderr)
    reward_function = load_task(task_name).reward_function
    _limit_memory()
    connection.send_bytes(json.dumps(_line_in_task(reward_function)).encode())
    pid = os.getpid()
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = connection.recv_bytes()
            # If the run is killed while the function hangs, the kernel ends this process.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, 2 * timeout + 1)
            try:
                response, problem = pickle.loads(request)
                reply = _as_numbers(reward_function(response, **problem))
                if isinstance(reply, str):
                    reply = f"{printable(reply)[:400]} ({_line_in_task(reward_function)})"
            except BaseException as error:
                line = _line_in_task(reward_function, error)
                reply = f"raised {printable(repr(error))[:300]} ({line})"
            if os.getpid() != pid:
                break  # a copy of this process, forked by the function
            signal.setitimer(signal.ITIMER_REAL, 0)
            connection.send_bytes(json.dumps(reply).encode())
    os._exit(0)  # do not wait for threads that the task has left behind


def _limit_memory() -> None:
    """Make the function run into a MemoryError before the kernel's OOM killer acts."""
    if sys.platform == "linux":
        held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
        hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
        with contextlib.suppress(ValueError):  # the hard limit is lower already
            resource.setrlimit(resource.RLIMIT_DATA, (held + MAX_MEMORY, hard))


class _PrintableStream(io.TextIOBase):
    """Prints a task's output immediately, without characters that control the terminal."""

    def __init__(self, stream: io.TextIOBase):
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):  # a closed pipe is no reason to fail an answer
            self._stream.write(printable(text))
            self._stream.flush()
        return len(text)

    def fileno(self) -> int:
        return self._stream.fileno()


def _as_numbers(reward: Any) -> tuple[float, dict[str, float]] | str:
    """The total and the parts as floats for JSON, or a text that says what is wrong with them.

    Anything that can be added to a float is a number, NumPy's included.
    """
    if not isinstance(reward, Reward):
        return f'returned {reward!r:.100}; write return Reward(x, {{"answer": x}}) with a number x'
    if not isinstance(reward.parts, dict) or not all(
        isinstance(name, str) and name.isprintable() for name in reward.parts
    ):
        return f"returned {reward!r:.100}; parts must be a dict whose keys are printable strings"
    try:
        total, *parts = (float(number + 0.0) for number in (reward.total, *reward.parts.values()))
    except TypeError:
        return f"returned {reward!r:.100}; the total and every part must be a number"
    if any(MAX_NUMBER < abs(number) < math.inf for number in (total, *parts)):
        return f"returned {reward!r:.100}; no number may be beyond {MAX_NUMBER:g}"
    return total, dict(zip(reward.parts, parts, strict=True))


def _line_in_task(reward_function: Callable, error: BaseException | None = None) -> str:
    """file:line where the task raised the error, or without an error where the function begins."""
    code = getattr(reward_function, "__code__", None)
    frames = traceback.extract_tb(error.__traceback__) if error else []
    own = [frame for frame in frames if code is None or frame.filename == code.co_filename]
    if own:
        return f"{own[-1].filename}:{own[-1].lineno}"
    return f"{code.co_filename}:{code.co_firstlineno}" if code else printable(repr(reward_function))


def _import_error_line(error: BaseException) -> str:
    """file:line at which an import failed."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    frame = [frame for frame in frames if not frame.filename.startswith("<frozen")][-1]
    return f"{frame.filename}:{frame.lineno}"
