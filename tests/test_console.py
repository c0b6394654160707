"""What a person sees on a terminal of 80 columns."""

import codecs
import fcntl
import os
import pty
import re
import signal
import struct
import sys
import termios
import time

import pytest

from harness import console

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)
COLUMNS = 80


def on_a_terminal(act, *, keys: bytes = b"") -> str:
    """All that a process sends to its terminal; once it has sent something, the keys are pressed."""
    child, terminal = pty.fork()
    if child == 0:
        try:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
            sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            act()
            sys.stdout.flush()
        finally:
            os._exit(0)
    sent, decoder = "", codecs.getincrementaldecoder("utf-8")()
    while True:
        try:
            sent += decoder.decode(os.read(terminal, 65536))
        except OSError:  # the other end is closed
            break
        if keys and "tokens" in sent:
            os.write(terminal, keys)
            keys = b""
    os.close(terminal)
    os.waitpid(child, 0)
    return sent


def screen(sent: str) -> list[str]:
    """The lines that stand there in the end, the cursor's the last."""
    lines, column = [[]], 0
    for part in re.findall(r"\x1b\[K|.", sent, re.DOTALL):
        if part == "\r":
            column = 0
        elif part == "\n":
            lines.append([])
        elif part == "\x1b[K":
            del lines[-1][column:]
        else:
            if column == COLUMNS:
                lines.append([])
                column = 0
            lines[-1][column : column + 1] = [part]
            column += 1
        lines[-1] += [" "] * (column - len(lines[-1]))
    return ["".join(line).rstrip() for line in lines]


def decode(*, ended: list[int], until_pressed: bool = False) -> None:
    """Steps of a decoding phase in each of which so many answers end, 50 milliseconds each."""
    pressed = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))

    def check():
        if pressed:
            raise InterruptedError

    watch = console.PhaseWatch("evaluation", check)
    try:
        with watch.part("decode", 10_000):
            while True:
                for answers in ended:
                    time.sleep(0.05)
                    watch.advance(answers, row_steps=1000)
                if not until_pressed:
                    break
    except InterruptedError:
        pass
    console.say("a line")


# Catches: leave=True; a bar of the terminal's whole width, which the echoed ^C of Ctrl-C pushes up; \033[K left out (^C stays).
@pytest.mark.parametrize("keys", [b"", b"\x03"], ids=["closed", "interrupted"])
def test_nothing_is_left_of_a_bar(keys):
    sent = on_a_terminal(lambda: decode(ended=[1000] * 5, until_pressed=bool(keys)), keys=keys)
    assert ("^C" in sent) == bool(keys)
    assert "evaluation: decode |" in sent
    assert screen(sent) == ["a line", ""]


def test_that_answers_grow_is_seen_before_one_ends_and_when_few_do():
    # Catches: miniters left to tqdm, which after many answers waits for as many more.
    sent = on_a_terminal(lambda: decode(ended=[0] * 10 + [500] * 5 + [0] * 10))
    shown = re.findall(r"(\d+)/10000 answers, ([\d,]+) tokens", sent)
    for ended in ("0", "2500"):
        assert len({tokens for answers, tokens in shown if answers == ended}) > 2
    assert "%" not in sent


def test_no_bar_where_nobody_looks(capfd):
    decode(ended=[1])
    assert capfd.readouterr() == ("a line\n", "")


def test_what_is_said_steers_no_terminal_and_can_be_printed(capsys):
    # Catches: printable left out of say or say_last, where names of files and texts of models come by.
    for say in (console.say, lambda text: console.say_last(text, failed=False)):
        say("a\x1b[2J\u202e\udcff\nb")
        assert capsys.readouterr().out == "a\\x1b[2J\\u202e\\udcff\nb\n"


def test_the_table_fits_the_terminal():
    metrics = {name: 1 for name, _ in console.COLUMNS.values()} | {
        "completions/mean_length": 1234.5,
        "step": 99_999,
    }
    assert len(console.heading()) == len(console.row(metrics)) <= COLUMNS
    row, reason = console.row({"step": 7, "skipped": "every kept answer has advantage 0"}).split(
        "\n"
    )
    assert len(row) == len(console.heading())
    assert row.split() == ["7"] + ["-"] * 10
    assert len(reason) <= COLUMNS


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(40, "40 s"), (144, "2 minutes"), (5300, "88 minutes"), (9000, "2.5 hours")],
)
def test_a_duration_is_in_the_unit_in_which_it_is_grasped(seconds, words):
    assert console.duration(seconds) == words
