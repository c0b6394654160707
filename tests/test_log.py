"""The log files of a run: cut at a checkpoint, read again, and shown in TensorBoard."""

import contextlib
import json
import math
import resource
import tracemalloc

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.log import MetricsLine, RunLog, SampleLine, read_log
from tests.helpers import RecordingProgress

METRICS, SAMPLES, TIMINGS = "metrics.jsonl", "samples.jsonl", "timings.jsonl"
SAMPLE = {
    "kind": "best",
    "question": "?",
    "text": "a\x1bb",
    "reward": 0.1,
    "parts": {"answer": 1.0},
    "advantage": 0.5,
    "length": 2,
    "finished": True,
}


def write_step(log: RunLog, step: int) -> None:
    log.write(METRICS, {"step": step, "reward": 0.1 * step, "eval/success": 0.5})
    log.write(SAMPLES, {"step": step, **SAMPLE})
    log.write(TIMINGS, {"step": step, "seconds": 2.0 * step})
    log.draw()


@pytest.fixture
def two_steps(tmp_path):
    """The directory of a closed log of two steps, and its sizes after the first."""
    log = RunLog(tmp_path, {})
    write_step(log, 1)
    sizes = dict(log.sizes)
    write_step(log, 2)
    log.close()
    return tmp_path, sizes


def board(directory) -> EventAccumulator:
    return EventAccumulator(str(directory / "tensorboard")).Reload()


def steps_shown(directory, tag: str) -> list[int]:
    return [event.step for event in board(directory).Scalars(tag)]


# Catches: nothing cut; TensorBoard's old file left in place.
def test_an_interrupted_log_comes_out_the_same(two_steps):
    directory, sizes = two_steps
    whole = {path.name: path.read_bytes() for path in directory.glob("*.jsonl")}
    for _ in range(2):
        for file in (directory / "tensorboard").iterdir():
            file.rename(file.with_name("events.out.tfevents.1"))  # as if it were from long ago
        log = RunLog(directory, sizes)
        write_step(log, 2)
        log.close()
    assert {path.name: path.read_bytes() for path in directory.glob("*.jsonl")} == whole
    for tag in ("metrics/reward", "eval/success", "timings/seconds"):
        assert steps_shown(directory, tag) == [1, 2]


# Catches: a cut at sizes[name] itself, or after the newline that follows it.
@pytest.mark.parametrize(
    ("change", "steps"), [(0, [1]), (-1, []), (1, [1]), (10**6, [1, 2])], ids=str
)
def test_a_file_is_cut_after_a_whole_line(change, steps, two_steps):
    directory, sizes = two_steps
    with open(directory / METRICS, "a") as file:
        file.write('{"step": 3, "rew')
    log = RunLog(directory, {name: size + change for name, size in sizes.items()})
    assert [record["step"] for record in log.read(METRICS)] == steps
    assert (directory / METRICS).read_text()[-1:] in ("\n", "")
    log.close()


def test_a_file_without_a_size_starts_empty(two_steps):
    directory, sizes = two_steps
    log = RunLog(directory, {METRICS: sizes[METRICS]})
    assert [len(list(log.read(name))) for name in (METRICS, SAMPLES, TIMINGS)] == [1, 0, 0]
    log.close()


# Catches: a shallow replacement, which leaves NaN in `parts`; replacement of the text "NaN".
def test_numbers_that_are_not_finite_become_null(tmp_path):
    log = RunLog(tmp_path, {})
    log.write(TIMINGS, {"step": 1, "seconds": math.inf, "memory/update": 0.1})
    changes = {"text": "NaN", "reward": math.nan, "parts": {"answer": -math.inf}}
    log.write(SAMPLES, {"step": 1, **SAMPLE, **changes})
    log.draw()
    log.close()
    timings = '{"step": 1, "seconds": null, "memory/update": 0.1}\n'
    assert (tmp_path / TIMINGS).read_text() == timings
    (sample,) = read_log(tmp_path / SAMPLES, SampleLine)
    assert (sample.text, sample.reward, sample.parts) == ("NaN", None, {"answer": None})
    assert board(tmp_path).Tags()["scalars"] == ["memory/update"]


def test_tensorboard_shows_samples_as_printable_text(two_steps):
    (first, _) = board(two_steps[0]).Tensors("samples/best/text_summary")
    (text,) = first.tensor_proto.string_val
    assert text.decode() == "    ?a\\x1bb\n\n    reward 0.1, advantage 0.5"


@contextlib.contextmanager
def full_disk(size: int):
    """No file can grow beyond `size` bytes: the write fails, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Catches: OSError not suppressed in close(); a SummaryWriter, whose thread prints a traceback.
@pytest.mark.parametrize("file", [METRICS, "tensorboard"])
def test_a_full_disk_is_one_error(file, two_steps, capfd):
    directory, sizes = two_steps
    log = RunLog(directory, sizes)
    size = sum(f.stat().st_size for f in [directory / METRICS, *(directory / file).glob("*")])
    with full_disk(size):
        with pytest.raises(OSError, match="File too large"):
            write_step(log, 2)
        log.close()
    assert capfd.readouterr() == ("", "")
    RunLog(directory, sizes).close()


# Catches: the file kept open, so that later lines go to a file that nobody can see.
def test_the_log_goes_on_in_a_file_that_was_removed_or_replaced(two_steps, capsys):
    directory, sizes = two_steps
    log = RunLog(directory, sizes)
    (directory / METRICS).unlink()
    (directory / TIMINGS).rename(directory / "moved")
    (directory / TIMINGS).write_text('{"step": 0}\n')
    write_step(log, 2)
    write_step(log, 3)
    log.close()
    steps = [[r["step"] for r in log.read(name)] for name in (METRICS, SAMPLES, TIMINGS)]
    assert steps == [[2, 3], [1, 2, 3], [0, 2, 3]]
    assert log.sizes == {name: (directory / name).stat().st_size for name in log.sizes}
    warnings = capsys.readouterr().out.splitlines()
    assert [line.split(", which")[0] for line in warnings] == [
        f"warning: another program changed {directory / name}" for name in (METRICS, TIMINGS)
    ]


# Catches: a log that was shortened is continued without a word.
def test_lines_that_are_missing_at_a_resume_are_reported(two_steps, capsys):
    directory, sizes = two_steps
    (directory / METRICS).write_text("")
    RunLog(directory, sizes).close()
    assert capsys.readouterr().out == (
        f"warning: lines are missing in {directory / METRICS}: it has 0 of {sizes[METRICS]} bytes\n"
    )


# Catches: the whole file in memory; a limit of 1 GB on our own file, which ended every resume.
def test_a_log_is_read_as_a_stream(tmp_path):
    size = 4 * 10**6
    line = json.dumps({"step": 1, **SAMPLE, "text": 10_000 * "x"}) + "\n"
    (tmp_path / SAMPLES).write_text(line * (size // len(line)))
    tracemalloc.start()
    count = sum(1 for _ in read_log(tmp_path / SAMPLES, SampleLine))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == size // len(line)
    assert peak < size / 10


# Catches: progress.update left out; the files' lines collected in a list.
def test_a_signal_ends_the_drawing_of_a_long_log(two_steps):
    directory, sizes = two_steps

    class Signalled(RecordingProgress):
        def update(self, n=0, **counts):
            super().update(n, **counts)
            raise InterruptedError

    progress = Signalled()
    with pytest.raises(InterruptedError):
        RunLog(directory, sizes, progress)
    assert progress.phases == [("TensorBoard", 3)]
    assert progress.updates == [("TensorBoard", 1)]


# ---------------------------------------------------------------- damaged files

DAMAGED_LINES = {
    "a list": "[1]",
    "a number": "1",
    "null": "null",
    "zero bytes": "\0" * 50,
    "not JSON": "{",
    "no step": "{}",
    "a step that is a word": '{"step": "x"}',
    "a step too large": '{"step": 1' + 30 * "0" + "}",
    "too many digits": '{"step": ' + 5000 * "1" + "}",
    "a part of a wrong type": '{"step": 1, "parts": [1], "reward": [], "eval/success": "much"}',
    "too deep": 99999 * "[",
}


# Catches: json.loads in place of parse_json; ValidationError not caught.
@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=DAMAGED_LINES)
@pytest.mark.parametrize("kind", [MetricsLine, SampleLine])
def test_an_error_names_the_file_and_the_damaged_line(kind, line, tmp_path):
    good = {"step": 1, **SAMPLE} if kind is SampleLine else {"step": 1}
    (tmp_path / "x.jsonl").write_text(f"{json.dumps(good)}\n{line}\n")
    with pytest.raises(ValueError, match=r"x\.jsonl, line 2\b") as error:
        list(read_log(tmp_path / "x.jsonl", kind))
    assert str(error.value).startswith(str(tmp_path))
    assert "remove the line" in str(error.value)
    assert "\n" not in str(error.value)


# Catches: files left open when a kept line is damaged (a ResourceWarning).
def test_a_log_with_a_damaged_line_is_refused(two_steps):
    directory, sizes = two_steps
    (directory / METRICS).write_text("[\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1"):
        RunLog(directory, sizes)
    assert (directory / METRICS).read_text() == "[\n"


def test_an_incomplete_last_line_is_ignored(two_steps, capsys):
    directory, _ = two_steps
    with open(directory / METRICS, "a") as file:
        file.write('{"step": 3, "rew')
    assert [line.step for line in read_log(directory / METRICS, MetricsLine)] == [1, 2]
    assert "metrics.jsonl: ignoring the last line, which is incomplete" in capsys.readouterr().out
