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
    """Run a function in a process with its own terminal; return everything it writes there.

    The keys are pressed as soon as a bar is on the screen.
    """
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
    written, decoder = "", codecs.getincrementaldecoder("utf-8")()
    while True:
        try:
            written += decoder.decode(os.read(terminal, 65536))
        except OSError:  # the process has ended
            break
        if keys and "tokens" in written:
            os.write(terminal, keys)
            keys = b""
    os.close(terminal)
    os.waitpid(child, 0)
    return written


def screen(written: str) -> list[str]:
    """The lines that are on the screen at the end; the last is the line of the cursor."""
    lines, column = [[]], 0
    for part in re.findall(r"\x1b\[K|.", written, re.DOTALL):
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


def decode(*, finished: list[int], until_pressed: bool = False) -> None:
    """Show a decode phase; `finished` says how many answers finish in each of its steps."""
    pressed = []
    signal.signal(signal.SIGINT, lambda *_: pressed.append(True))

    def check():
        if pressed:
            raise InterruptedError

    progress = console.Progress("evaluation", check)
    try:
        with progress.phase("decode", 10_000):
            while True:
                for answers in finished:
                    time.sleep(0.15)  # tqdm draws at most every 0.1 s
                    progress.update(answers, slot_steps=1000)
                if not until_pressed:
                    break
    except InterruptedError:
        pass
    console.log("a line")


# Catches: leave=True; ncols of the full width, where the echoed ^C wraps the line; \033[K left out.
@pytest.mark.parametrize("keys", [b"", b"\x03"], ids=["finished", "interrupted"])
def test_a_bar_leaves_nothing_behind(keys):
    written = on_a_terminal(
        lambda: decode(finished=[1000] * 3, until_pressed=bool(keys)), keys=keys
    )
    assert ("^C" in written) == bool(keys)
    assert "evaluation: decode |" in written
    assert screen(written) == ["a line", ""]


# Catches: miniters left out: tqdm then waits for as many answers as finished before.
def test_the_bar_shows_growing_answers_while_none_finishes():
    written = on_a_terminal(lambda: decode(finished=[0] * 4 + [500] * 5 + [0] * 4))
    shown = re.findall(r"(\d+)/10000 answers, ([\d,]+) tokens", written)
    for answers in ("0", "2500"):
        assert len({tokens for finished, tokens in shown if finished == answers}) > 2


def test_there_is_no_bar_without_a_terminal(capfd):
    decode(finished=[1])
    assert capfd.readouterr() == ("a line\n", "")


def test_progress_counts_units_per_phase_and_times_each_phase():
    checks = []
    progress = console.Progress("update", lambda: checks.append(True), hidden=True)
    with progress.phase("gradient", 9):
        progress.update(5)
        progress.update(4, slot_steps=3)
    with progress.phase("optimizer", 1):
        progress.update(1, slot_steps=4)
    assert progress.counts == {"gradient": 9, "optimizer": 1, "slot_steps": 7}
    assert progress.seconds.keys() == {"gradient", "optimizer"}
    assert len(checks) == 3


def test_a_skipped_update_without_any_phase_still_has_its_peak_memory():
    assert console.Progress("update", hidden=True).peak_bytes > 2**20


# Catches: the factor 1024 on macOS, or none on Linux.
def test_peak_memory_is_in_bytes(monkeypatch):
    usage = type("usage", (), {"ru_maxrss": 5000})
    monkeypatch.setattr(console, "getrusage", lambda _: usage)
    for platform, expected in (("linux", 5000 * 1024), ("darwin", 5000)):
        monkeypatch.setattr(sys, "platform", platform)
        assert console.peak_bytes("cpu") == expected


# Catches: the limit dropped.
def test_an_error_that_quotes_something_huge_is_cut(capsys):
    console.show_error("error: " + "[" * 10**6)
    assert len(capsys.readouterr().err) < 11_000


# Catches: printable left out of log or show_error.
def test_printed_text_cannot_control_the_terminal(capsys):
    text, expected = "a\x1b[2J\u202e\udcff\nb", "a\\x1b[2J\\u202e\\udcff\nb\n"
    console.log(text)
    assert capsys.readouterr() == (expected, "")
    console.show_error(text)
    assert capsys.readouterr() == ("", expected)


def test_an_error_is_shown_even_if_nobody_reads_stdout(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed_pipe:
        closed_pipe.write("not flushed yet")
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        console.show_error("error: x")  # and no BrokenPipeError when the file is closed
    assert capsys.readouterr().err == "error: x\n"


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 0, ""),
        (ValueError("x"), 2, "error: x\n"),
        (FileNotFoundError("x"), 2, "error: x\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_a_command_ends_with_one_message_and_an_exit_code(error, code, message, capsys):
    @console.with_exit_code
    def main(argv):
        if error:
            raise error

    assert main([]) == code
    assert capsys.readouterr().err == message


def test_the_table_fits_the_terminal():
    names = [name for name, _ in console.COLUMNS.values()]
    metrics = dict.fromkeys(names, 1) | {"completions/mean_length": 1234.5, "step": 99_999}
    assert len(console.heading()) == len(console.step_line(metrics)) <= COLUMNS
    skipped = {"step": 7, "skipped": "every kept answer has advantage 0"}
    line, reason = console.step_line(skipped).split("\n")
    assert len(line) == len(console.heading())
    assert line.split() == ["7"] + ["-"] * 10
    assert reason.strip() == "no step: every kept answer has advantage 0"
    assert len(reason) <= COLUMNS


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(40, "40 s"), (144, "2 minutes"), (5300, "88 minutes"), (9000, "2.5 hours")],
)
def test_a_duration_in_words(seconds, words):
    assert console.duration(seconds) == words
