"""The pitfalls: each patch applies, says what it is, and makes the test that it names fail."""

import ast
import shutil
import subprocess

import pytest
from helpers import run_tests

from pitfalls.run import PITFALLS, ROOT, fields, row, success, table
from variants.run import SeedRun, make_tree, patch_size

PATCHES = sorted(PITFALLS.glob("*.patch"))
EACH = pytest.mark.parametrize("patch", PATCHES, ids=lambda path: path.stem)
FIELDS = {"Reported", "Metric", "Symptom", "Notice", "Caught by"}
pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="git applies the patches to a copy of a git checkout",
)


@EACH
def test_patch_applies_and_is_short(patch):
    subprocess.run(["git", "apply", "--check", patch], cwd=ROOT, check=True)
    added, removed = (int(number[1:]) for number in patch_size(patch).split())
    assert 0 < added + removed <= 8


@EACH
def test_header_has_its_fields_and_names_a_test(patch):
    assert FIELDS <= fields(patch).keys() <= FIELDS | {"Settings"}
    file, _, name = fields(patch)["Caught by"].partition("::")
    functions = ast.parse((ROOT / file).read_text(encoding="utf-8")).body
    assert name in {node.name for node in functions if isinstance(node, ast.FunctionDef)}


@EACH
def test_page_has_the_row_and_a_paragraph(patch):
    # Only the cells that are measured may differ from what run.py prints.
    def unmeasured(line):
        cells = line.split(" | ")
        return [*cells[:2], cells[5], *cells[7:]]

    page = (PITFALLS / "README.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith(f"| [`{patch.stem}`]")]
    assert [unmeasured(line) for line in rows] == [unmeasured(row(patch, [], []))]
    assert f"\n### {patch.stem}\n\n" in page


def test_table_shows_success_and_the_metric_of_the_header():
    # Catches: the first evaluation taken for the last; bug and core swapped; the last step's metric
    # instead of the mean; a difference that is not paired by seed.
    patch = PITFALLS / "temperature.patch"

    def seed_run(after: float, differences: list[float]):
        metrics = [{"step": 0, "eval/success": 0.4}]
        for step, difference in enumerate(differences, 1):
            metrics.append({"step": step, "sampling/logp_difference_mean": difference})
        metrics.append({"step": len(differences), "eval/success": after})
        return SeedRun(metrics=metrics, seconds=1.0, answers=[])

    core = [seed_run(after, [0.0, 0.0]) for after in (0.7, 0.8, 0.9)]
    bug = [seed_run(after, [0.25, 0.75]) for after in (0.5, 0.6, 0.7)]
    cells = row(patch, core, bug).strip("| ").split(" | ")
    assert cells[2] == success(core) == "40.0 → 80.0 % (55.2 … 100.0)"  # 0.8 ± 4.303 · 0.1 / √3
    assert cells[3] == "40.0 → 60.0 % (35.2 … 84.8)"
    assert cells[4] == "-20.0 (-20.0 … -20.0)"
    assert cells[6] == "first step 0 → 0.25, mean 0 → 0.5"
    assert "[huggingface/trl#4159](https://github.com/huggingface/trl/issues/4159)" in cells[1]
    assert {line.count(" | ") for line in table([row(patch, core, bug)]).splitlines()[::2]} == {7}


# ---------------------------------------------------------------- the suite catches each of them


@pytest.mark.slow
@EACH
def test_pitfall_is_caught_by_the_test_that_it_names(patch, tmp_path):
    make_tree(patch, tmp_path)
    done = run_tests(tmp_path, [fields(patch)["Caught by"]])
    assert done.returncode == 1, done.stdout
    assert f"FAILED {fields(patch)['Caught by']}" in done.stdout


@pytest.mark.slow
def test_the_named_tests_pass_without_a_pitfall(tmp_path):
    make_tree(None, tmp_path)
    done = run_tests(tmp_path, sorted({fields(patch)["Caught by"] for patch in PATCHES}))
    assert done.returncode == 0, done.stdout
