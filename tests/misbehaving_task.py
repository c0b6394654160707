"""A reward function that does what the problem's key `act` says, most of it wrong."""

import fractions
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from data_types import Reward


def load_problems(data):
    return [{"act": "good"}], [{"act": "good"}]


def render_prompt(problem, tokenizer):
    return problem["act"]


def reward_function(response, /, **problem):
    act = globals()[problem["act"]]
    return act(response, **{key: value for key, value in problem.items() if key != "act"})


def good(response, /, total=1.0, **problem):
    return Reward(total, {"answer": total})


def compares(response, /, **problem):
    keys = {"response": 1, "self": 2, "problem": 3, "timeout": 4, "args": 5}
    return Reward(float(response == "an answer" and problem == keys), {})


def extends_the_numbers(response, numbers):
    numbers.append(len(numbers))
    return Reward(float(len(numbers)), {})


def returns_numpy(response, kind):
    return good(response, getattr(np, kind)(1))


def returns_parts(response, parts):
    return Reward(1.0, parts)


# ---------------------------------------------------------------- hang


def sleeps(response):
    while True:
        time.sleep(1000)


def loops(response):
    while True:
        pass


def swallows_every_exception(response):
    while True:
        try:
            loops(response)
        except BaseException:
            continue


def matches_forever(response):
    return Reward(float(bool(re.match("(a|a)*b", "a" * 60))), {})  # in C, without releasing the GIL


def blocks_signals(response):
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    return sleeps(response)


def stops_its_process(response):
    os.kill(os.getpid(), signal.SIGSTOP)


def forks_and_hangs(response):
    os.fork()
    return sleeps(response)


# ---------------------------------------------------------------- end the process


def exits_at_once(response):
    os._exit(3)


def is_killed(response):
    os.kill(os.getpid(), signal.SIGKILL)


def kills_its_group(response):
    os.killpg(0, signal.SIGKILL)


def closes_all_files(response):
    os.closerange(0, 1000)
    return Reward(1.0, {})


def leaves_a_program_running(response, file):
    child = subprocess.Popen(["sleep", "1000"])
    Path(file).write_text(str(child.pid))
    os._exit(3)


# ---------------------------------------------------------------- fail


def raises(response, **problem):
    return Reward(1 / 0, {})


def raises_in_a_library(response):
    return Reward(math.fsum(map(fractions.Fraction, response)), {})


def recurses(response):
    return recurses(response)


def exits(response):
    sys.exit(0)


def raises_keyboard_interrupt(response):
    raise KeyboardInterrupt


def takes_other_keys(response, question):
    return Reward(1.0, {})


def allocates_too_much(response):
    return Reward(float(len([bytes(10**9) for _ in range(6)])), {})  # zeros: no memory is touched


def returns_a_float(response):
    return 0.5


def returns_nothing(response):
    pass


# ---------------------------------------------------------------- processes and signals


def forks(response, total):
    os.fork()
    return Reward(total, {})


def tells_its_processes(response):
    return Reward(1.0, {"worker": os.getpid() / 1e5, "server": os.getppid() / 1e5})


def signals_itself_and_the_server(response):
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(os.getpid(), signum)
        os.kill(os.getppid(), signum)
    return tells_its_processes(response)


def terminates_a_program(response):
    child = subprocess.Popen(["sleep", "1000"])
    child.terminate()
    return Reward(float(child.wait() == -signal.SIGTERM), {})


def kills_the_server(response):
    os.kill(os.getppid(), signal.SIGKILL)
    return Reward(1.0, {})
