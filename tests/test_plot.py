"""The curves: they show what the log says, and errors are one line."""

import json
from pathlib import Path

import pytest
from matplotlib.image import imread

import plot


def write_run(run: Path, *, reward: float) -> Path:
    """Five steps, evaluated at 0, 3 and 5. The reward is linear, but not finite in step 4."""
    records = []
    for step in range(6):
        if step > 0:
            record = {
                "step": step,
                "reward": None if step == 4 else reward * step,
                "entropy": 0.3,
                "completions/mean_length": 50 + step,
                "completions/mean_terminated_length": 40,
            }
            records.append(record)
        if step in (0, 3, 5):
            record = {
                "step": step,
                "eval/success": 0.1 * step,
                "eval/success_low": 0.05 * step,
                "eval/success_high": 0.15 * step,
            }
            records.append(record)
    run.mkdir()
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return run


def test_the_curves_show_the_log(tmp_path):
    # Catches: the interval drawn from success instead of its bounds; None drawn as 0.
    runs = {"a": write_run(tmp_path / "a", reward=0.1), "b": write_run(tmp_path / "b", reward=0.2)}
    figure = plot.draw({name: plot.read_metrics(run) for name, run in runs.items()})
    reward, success, length, entropy = figure.axes
    for line, scale in zip(reward.lines, (0.1, 0.2), strict=True):
        steps, values = line.get_data()
        assert list(steps) == [1, 2, 3, 4, 5]
        wanted = [scale * 1, scale * 2, scale * 3, float("nan"), scale * 5]
        assert list(values) == pytest.approx(wanted, nan_ok=True)
    assert [list(line.get_xdata()) for line in success.lines] == [[0, 3, 5]] * 2
    interval = success.collections[0].get_paths()[0].vertices
    assert {round(float(y), 9) for x, y in interval if x == 5} >= {0.25, 0.75}
    assert [line.get_ydata()[0] for line in length.lines] == [51, 40, 51, 40]
    for panel in figure.axes:
        assert len({line.get_color() for line in panel.lines}) == 2
        assert panel.get_title()
        assert panel.get_ylabel()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert "tokens" in length.get_ylabel()
    assert "nats" in entropy.get_ylabel()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_opaque_and_reproducible(suffix, tmp_path, capsys):
    run = write_run(tmp_path / "a", reward=0.1)
    pictures = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}.{suffix}"
        assert plot.main([str(run), "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    if suffix == "png":
        pixels = imread(out)
        assert pixels.shape == (1200, 1800, 4)
        assert pixels[2, 2].tolist() == [1, 1, 1, 1]


def test_a_run_without_training_steps_is_drawn_in_its_directory(tmp_path):
    record = {"step": 0, "eval/success": 0.5, "eval/success_low": 0.4, "eval/success_high": 0.6}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    assert plot.main([str(tmp_path)]) == 0
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_the_home_directory_is_expanded(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_run(tmp_path / "a", reward=0.1)
    assert plot.main(["~/a", "--out=~/b.png"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/b.png\n"


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "metrics.jsonl does not exist"),
        ("", [], "is empty"),
        ('{"step": 1}\n{"st\n', [], "line 2, is not valid JSON"),
        ('{"step": 1}\n', ["--out", "curves.jpg"], "ends in .png or .svg"),
        ('{"step": 1}\n', ["--out", "nowhere/curves.png"], "nowhere/curves.png"),
    ],
    ids=["no log", "empty log", "damaged log", "unknown format", "no directory"],
)
def test_user_errors_are_one_line_and_exit_code_2(content, arguments, message, tmp_path, capsys):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert plot.main([str(tmp_path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
