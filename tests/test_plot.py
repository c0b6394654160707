import json

import pytest
from matplotlib.image import imread

import plot


def write_run(run, *, reward: float) -> None:
    """Five steps with an evaluation before, amid and after; one number was not finite."""
    run.mkdir()
    records = []
    for step in range(6):
        if step:
            records.append(
                {
                    "step": step,
                    "reward": reward * step if step != 4 else None,
                    "entropy": 0.3,
                    "completions/mean_length": 50 + step,
                    "completions/mean_terminated_length": 40,
                }
            )
        if step in (0, 3, 5):
            bounds = {"eval/success_low": 0.05 * step, "eval/success_high": 0.15 * step}
            records.append({"step": step, "eval/success": 0.1 * step} | bounds)
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def test_the_curves_are_those_of_the_log(tmp_path):
    write_run(tmp_path / "a", reward=0.1)
    write_run(tmp_path / "b", reward=0.2)
    figure = plot.draw({name: plot.read_metrics(tmp_path / name) for name in ("a", "b")})
    reward, success, length, entropy = figure.axes
    for line, scale in zip(reward.lines, (0.1, 0.2), strict=True):
        steps, values = line.get_data()
        assert list(steps) == [1, 2, 3, 4, 5]
        assert list(values) == pytest.approx(
            [scale * 1, scale * 2, scale * 3, float("nan"), scale * 5], nan_ok=True
        )
    assert [list(line.get_xdata()) for line in success.lines] == [[0, 3, 5]] * 2
    band = success.collections[0].get_paths()[0].vertices
    assert {round(float(y), 9) for x, y in band if x == 5} >= {
        0.25,
        0.75,
    }  # mutation: the band from success, not from its bounds
    assert len(length.lines) == 4
    assert (
        len({line.get_color() for line in length.lines})
        == len({line.get_color() for line in entropy.lines})
        == 2
    )
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert all(panel.get_ylabel() and panel.get_title() for panel in figure.axes)
    assert "tokens" in length.get_ylabel()
    assert "nats" in entropy.get_ylabel()


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_a_picture_is_opaque_and_always_the_same(suffix, tmp_path, capsys):
    write_run(tmp_path / "a", reward=0.1)
    pictures = []
    for name in ("one", "two"):
        out = tmp_path / f"{name}.{suffix}"
        assert plot.main([str(tmp_path / "a"), "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"{out}\n"
        pictures.append(out.read_bytes())
    assert pictures[0] == pictures[1]
    if suffix == "png":
        pixels = imread(out)
        assert pixels.shape == (1200, 1800, 4)
        assert pixels[2, 2].tolist() == [1, 1, 1, 1]


def test_a_run_that_has_only_begun_is_drawn_next_to_it(tmp_path):
    run = tmp_path / "a"
    run.mkdir()
    (run / "metrics.jsonl").write_text(
        '{"step": 0, "eval/success": 0.5, "eval/success_low": 0.4, "eval/success_high": 0.6}\n'
    )
    assert plot.main([str(run)]) == 0
    assert (run / "curves.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (None, [], "metrics.jsonl does not exist; wanted the directory of a run"),
        ("", [], "is empty"),
        ('{"step": 1}\n{"st\n', [], "line 2, is not valid JSON"),
        ('{"step": 1}\n', ["--out", "curves.jpg"], "ends in .png or .svg"),
        ('{"step": 1}\n', ["--out", "nowhere/curves.png"], "nowhere/curves.png"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    content, arguments, message, tmp_path, capsys
):
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert plot.main([str(tmp_path), *arguments]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert shown.startswith("error: ")
    assert shown.count("\n") == 1
