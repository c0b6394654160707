"""The variants of GRPO: each patch applies, and its update equals a loop written from its equation.

Patches change grpo.py and train.py. The patched grpo.py is imported under another name, beside the
real one.
"""

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, pstdev
from types import ModuleType

import pytest
import torch
from helpers import (
    random_model,
    random_tokens,
    reference_model,
    run_tests,
    write_word_tokenizer,
)
from test_grpo import TEMPERATURE, VOCAB, assert_same_gradient, batch

from data_types import Episode, NoProgress, Question, Reward
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
VARIANTS = ROOT / "variants"
NAMES = sorted(path.stem for path in VARIANTS.glob("*.patch"))
ALGORITHMS = [name for name in NAMES if name != "qwen3"]  # the others change the algorithm
LEARNING_RATE = 0.003  # large enough that the second update starts from clearly different weights
pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="git applies the patches to a copy of a git checkout",
)


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load(ROOT / "variants" / "run.py", "variants_run")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A function that returns the patched copy of the repository. It makes each copy once."""

    @cache
    def make(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        run.make_tree(VARIANTS / f"{name}.patch", directory)
        return directory

    return make


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("words")
    write_word_tokenizer(directory, size=VOCAB, stop_ids=[7, 31, 40, 50])
    return Tokenizer.from_pretrained(directory)


# ---------------------------------------------------------------- the equations, token by token


def expected_advantage(name: str, episodes: list[Episode], i: int) -> float:
    reward, question = episodes[i].reward.total, episodes[i].question_id
    group = [e.reward.total for e in episodes if e.question_id == question]
    if len(set(group)) == 1:
        return 0.0
    if name == "rloo":
        group.remove(reward)
        return reward - fmean(group)
    difference = reward - fmean(group)
    if name == "dr-grpo":
        return difference
    if name == "maxrl":
        return difference / fmean(group)
    if name == "batch-std":
        return difference / (pstdev([e.reward.total for e in episodes]) + 1e-4)
    return difference / (pstdev(group) + 1e-4)


def clipped_objective(ratio: torch.Tensor, advantage: float, low: float, high: float):
    """PPO's objective. It is constant once the ratio has moved past the bound."""
    if advantage > 0 and ratio > 1 + high:
        return (1 + high) * advantage
    if advantage < 0 and ratio < 1 - low:
        return (1 - low) * advantage
    return ratio * advantage


def expected_objective(name: str, advantage: float, new, old: float, start: float):
    """What a token adds to the objective. new, old, start: log π of policy, sampler and start."""
    if name == "clip-higher":
        return clipped_objective((new - old).exp(), advantage, 0.2, 0.28)
    if name == "cispo":
        return min(math.exp(new.item() - old), 5.0) * advantage * new
    if name == "truncated-is":
        return min(math.exp(new.item() - old), 2.0) * advantage * new
    if name == "kl":
        return advantage * new - 0.04 * (new - start) ** 2 / 2
    return advantage * new


def expected_loss(name: str, episodes: list[Episode], kept: list[int], model, start_model):
    """The loss of the kept answers, each run alone by transformers."""
    objective = 0.0
    denominator = sum(len(episodes[i].response_token_ids) for i in kept)
    denominator = {"dr-grpo": 448 * len(episodes), "gspo": len(kept)}.get(name, denominator)
    for i in kept:
        advantage = expected_advantage(name, episodes, i)
        logprobs, olds = answer_logprobs(model, episodes[i]), episodes[i].response_logprobs
        if name == "gspo":
            difference = sum(new - old for new, old in zip(logprobs, olds, strict=True))
            ratio = (difference / len(olds)).exp()
            objective = objective + clipped_objective(ratio, advantage, 0.0015, 0.002)
            continue
        starts = answer_logprobs(start_model, episodes[i]).tolist() if name == "kl" else olds
        for new, old, start in zip(logprobs, olds, starts, strict=True):
            objective = objective + expected_objective(name, advantage, new, old, start)
    return -objective / denominator


def answer_logprobs(model, e: Episode) -> torch.Tensor:
    tokens = e.prompt_token_ids + e.response_token_ids
    logits_SV = model(torch.tensor([tokens])).logits[0, :, :VOCAB] / TEMPERATURE
    positions = range(len(e.prompt_token_ids) - 1, len(tokens) - 1)
    return torch.log_softmax(logits_SV, dim=-1)[positions, e.response_token_ids]


class GradientDescent(torch.optim.SGD):
    """Keeps the gradient of each step."""

    def __init__(self, model):
        super().__init__(model.parameters(), lr=LEARNING_RATE)
        self.model, self.gradients = model, []

    def step(self):
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters()})
        super().step()


class BeforeFirstStep(NoProgress):
    """Ctrl-C raises in update(), so nothing may call it once the weights have changed."""

    def __init__(self, optimizer: GradientDescent):
        self.optimizer = optimizer

    def update(self, n=0, **counts):
        assert not self.optimizer.gradients


def assert_update_equals_equation(
    name: str, grpo: ModuleType, episodes: list[Episode], *, skip_unfinished: bool = True
) -> None:
    model = random_model()
    optimizer = GradientDescent(model)
    grpo.update_policy(
        model,
        optimizer,
        episodes,
        max_grad_norm=math.inf,
        skip_unfinished=skip_unfinished,
        temperature=TEMPERATURE,
        vocab_size=VOCAB,
        micro_batch_tokens=47,
        progress=BeforeFirstStep(optimizer),
        **({"start": random_model(seed=1)} if name == "kl" else {}),
    )
    updates = 2 if name in ("clip-higher", "cispo", "gspo") else 1
    assert len(optimizer.gradients) == updates
    kept = [i for i, e in enumerate(episodes) if e.is_finished or not skip_unfinished]
    reference, start_model = reference_model(random_model()), reference_model(random_model(seed=1))
    expected = GradientDescent(reference)
    for i in range(updates):
        expected.zero_grad()
        expected_loss(name, episodes, kept, reference, start_model).backward()
        expected.step()
        assert_same_gradient(optimizer.gradients[i], expected.gradients[i])


@cache
def off_policy_batch() -> list[Episode]:
    """The ragged batch of test_grpo, with log-probabilities of another sampler.

    The ratios of tokens lie on both sides of each bound. In every third answer they are so close to
    1 that the ratio of the answer lies between the two bounds of GSPO.
    """
    model, episodes = reference_model(random_model()), []
    log_ratios = [-0.9, -0.27, -0.1, 0.1, 0.21, 0.8, 1.8]
    for i, e in enumerate(batch(True)):
        with torch.no_grad():
            logprobs = answer_logprobs(model, e).tolist()
        differences = [log_ratios[(i + t) % 7] for t in range(len(logprobs))]
        if i % 3 == 0:
            differences = [0.00175 if e.reward.total >= 1.0 else -0.00175] * len(logprobs)
        sampled = [x - difference for x, difference in zip(logprobs, differences, strict=True)]
        episodes.append(replace(e, response_logprobs=sampled))
    return episodes


# ---------------------------------------------------------------- variants that change the rollout


def rollout_settings(tokenizer, rewards: list[float]) -> dict:
    """Questions 0, 2, 3 and 6 give all their answers the same reward.

    The reward of each answer is appended to `rewards` in the order of scoring.
    """

    def reward_function(text, equal):
        rewards.append(0.1 if equal else float(len(text) % 3))
        return Reward(rewards[-1], {})

    questions = []
    for i in range(12):
        prompt = random_tokens(3 + i % 5, seed=i, vocab_size=VOCAB).tolist()
        questions.append(Question("", prompt, {"equal": i in (0, 2, 3, 6)}))
    return {
        "model": random_model(),
        "tokenizer": tokenizer,
        "questions": questions,
        "num_answers": 4,
        "max_gen_len": 20,
        "temperature": TEMPERATURE,
        "reward_function": reward_function,
        "generator": torch.Generator().manual_seed(0),
    }


def assert_more_questions_are_asked(grpo: ModuleType, tokenizer: Tokenizer) -> None:
    """DAPO, eq. 11. Each round asks as many questions as groups are missing."""
    rewards = []
    settings = rollout_settings(tokenizer, rewards)
    episodes = grpo.rollout_unequal(num_groups=5, **settings)
    groups = [rewards[i : i + 4] for i in range(0, len(rewards), 4)]
    unequal = [i for i, group in enumerate(groups) if min(group) < max(group)]
    asked, found = 0, 0
    while found < 5 and asked < 12:
        asked += 5 - found
        found = len([i for i in unequal if i < asked])
    assert 5 < len(groups) == asked < 12  # more than one round, but not all questions
    assert [e.question_id for e in episodes] == [i for i in unequal for _ in range(4)]
    for e in episodes:
        assert e.prompt_token_ids == settings["questions"][e.question_id].prompt_token_ids
    assert [e.reward.total for e in episodes] == [r for i in unequal for r in groups[i]]
    assert_update_equals_equation("dynamic-sampling", grpo, episodes)
    settings["questions"] = [q for q in settings["questions"] if q.problem["equal"]]
    episodes = grpo.rollout_unequal(num_groups=1, **settings)
    assert [e.question_id for e in episodes] == [3] * 4  # all are equal, so the last group
    drawn = [grpo.draw_problems(range(24), step, count=3, seed=0) for step in (1, 2)]
    assert sorted(drawn[0] + drawn[1]) == list(range(24))  # each step owns 4 x 3 problems


def assert_long_answers_lose_reward(grpo: ModuleType, tokenizer: Tokenizer) -> None:
    """DAPO, eq. 13, with L_max = 20 tokens and L_cache = 4."""
    rewards = []
    episodes = grpo.rollout(**rollout_settings(tokenizer, rewards))
    lengths = [len(e.response_token_ids) for e in episodes]
    penalties = [0.0 if n <= 16 else (16 - n) / 4 for n in lengths]
    assert min(penalties) == -1.0
    assert max(penalties) == 0.0
    expected = [reward + penalty for reward, penalty in zip(rewards, penalties, strict=True)]
    assert [e.reward.total for e in episodes] == pytest.approx(expected)
    assert_update_equals_equation("soft-overlong", grpo, episodes, skip_unfinished=False)


def check(name: str, grpo: ModuleType, tokenizer: Tokenizer) -> None:
    if name == "dynamic-sampling":
        assert_more_questions_are_asked(grpo, tokenizer)
    elif name == "soft-overlong":
        assert_long_answers_lose_reward(grpo, tokenizer)
    else:
        assert_update_equals_equation(name, grpo, off_policy_batch())


# ---------------------------------------------------------------- the tests


@pytest.mark.parametrize("name", ALGORITHMS)
def test_variant_equals_its_equation(name, tree, tokenizer):
    # Catches: each of MUTATIONS, as test_mutation_is_caught shows.
    check(name, load(tree(name) / "grpo.py", "patched_grpo"), tokenizer)


@pytest.mark.parametrize("name", NAMES)
def test_patch_has_header_and_is_short(name):
    patch = VARIANTS / f"{name}.patch"
    header = patch.read_text().partition("\ndiff --git ")[0]
    assert "\n\nWhen: " in header
    assert "arXiv:" in header
    added, removed = (int(number[1:]) for number in run.patch_size(patch).split())
    assert 0 < added + removed <= (50 if name == "qwen3" else 30)
    readme = (VARIANTS / "README.md").read_text()
    assert f"| `{name}` | {run.patch_size(patch)} |" in readme


@pytest.mark.slow
def test_qwen3_equals_transformers(tree):
    plan = ["test_weights_are_counted", "test_activations_are_what_autograd_keeps"]
    names = ["tests/qwen3_parity.py", *(f"tests/test_plan.py::{name}" for name in plan)]
    done = run_tests(tree("qwen3"), names)
    assert done.returncode == 0, done.stdout


def test_dapo_is_three_patches_together(tmp_path):
    run.make_tree(VARIANTS / "clip-higher.patch", tmp_path)
    for name in ("dynamic-sampling", "soft-overlong"):
        subprocess.run(["git", "apply", VARIANTS / f"{name}.patch"], cwd=tmp_path, check=True)


def seed_run(successes: list[float], answers: int = 100):
    """An evaluation before the first step and after every second one."""
    metrics = []
    for i, success in enumerate(successes):
        interval = {"eval/success_low": 0.25, "eval/success_high": 0.75}
        metrics.append({"step": 2 * i, "eval/success": success, **interval})
    return run.SeedRun(metrics=metrics, seconds=7.0, answers=[answers] * (2 * len(successes)))


def test_table_ranks_by_answers_until_success():
    # Catches: >= -> > in answers_until; [: record["step"]] -> [: record["step"] + 1]; the order of
    # TARGETS; T_95[len(values) + 1]; math.inf -> 0.0 in mean_answers; b - a -> a - b in difference.
    results = {
        "kl": [seed_run([0.1, 0.8, 0.8])] * 2 + [seed_run([0.1, 0.5, 0.6])],
        "grpo": [seed_run([0.1, 0.8, 0.95], answers) for answers in (100, 200, 300)],
    }
    alone = run.table({"rloo": [seed_run([0.5, 0.9, 0.7])]}).splitlines()[2]
    cells = alone.strip("| ").split(" | ")
    assert cells[:4] == ["rloo", run.patch_size(VARIANTS / "rloo.patch"), "200", "200"]
    assert cells[4::3] == ["50.0% (25.0% … 75.0%)", "-"]
    one_seed = {"grpo": [seed_run([0.5, 0.6])], "rloo": [seed_run([0.5, 0.9])]}
    assert " | +30.0 | " in run.table(one_seed)  # without an interval
    results["rloo"] = [seed_run([0.5, 0.9, 0.7], 50)] * 3
    rows = [row.strip("| ").split(" | ") for row in run.table(results).splitlines()[2:]]
    assert rows[0][0] == "rloo"
    assert rows[0][7:] == ["-25.0 (-25.0 … -25.0)", "7"]
    assert rows[1][0] == "grpo"
    assert rows[1][2] == "800 (0 … 1,794)"  # 400, 800, 1200: 800 ± 4.303 · 400 / √3
    assert rows[1][4::3] == ["10.0% (10.0% … 10.0%)", "-"]
    assert rows[2][0] == "kl"
    assert rows[2][2:4] == ["-", "- (2 of 3 seeds)"]


def test_answers_sampled_includes_replaced_questions():
    # Catches: counting the questions of the batch where dynamic-sampling asked more.
    training = {"batch_size": 32, "num_questions_per_batch": 4, "max_steps": 3}
    assert run.answers_sampled("step 1\n", training) == [32, 32, 32]
    output = "asked 4 questions for 4 groups\nstep 1\nasked 7 questions for 4 groups\n"
    assert run.answers_sampled(output, training) == [32, 56]


def write_run(directory: Path, made_with: str) -> None:
    directory.mkdir()
    training = {"batch_size": 32, "num_questions_per_batch": 4, "max_steps": 1}
    metrics = [{"step": step, "eval/success": step / 4} for step in (0, 1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in metrics))
    (directory / "timings.jsonl").write_text('{"step": 1, "seconds": 2.5}\n')
    (directory / "config.yaml").write_text(json.dumps({"training": training}))
    (directory / "output.txt").write_text("asked 7 questions for 4 groups\n")
    (directory / "made_with.txt").write_text(made_with)


def test_a_finished_run_is_used_again_unless_patch_or_settings_differ(tmp_path, monkeypatch):
    # Catches: `if not out.exists()` dropped; the seed, the settings or the diff left out of
    # made_with; the patch's header in it.
    patch, out = tmp_path / "rloo.patch", tmp_path / "rloo-3"
    text = (VARIANTS / "rloo.patch").read_text(encoding="utf-8")
    patch.write_text("Another header.\n" + text, encoding="utf-8")
    write_run(out, "training.seed=3\ndata.test_size=9\n" + text[text.index("\ndiff --git") :])
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: pytest.fail("trained again"))
    result = run.train(patch, 3, ["data.test_size=9"], out)
    assert result.seconds == 2.5
    assert result.answers == [56]
    assert run.evaluations(result)[-1]["eval/success"] == 0.25
    others = [(patch, 4, ["data.test_size=9"]), (patch, 3, []), (None, 3, ["data.test_size=9"])]
    for other in others:
        with pytest.raises(SystemExit, match="another patch or other settings"):
            run.train(*other, out)


MUTATIONS = [
    ("dr-grpo", "(ANSWER_TOKENS * len(episodes))", "(ANSWER_TOKENS * len(kept))"),
    ("dr-grpo", "rewards_NM.mean(dim=1, keep", "rewards_NM.amin(dim=1, keep"),
    ("rloo", "(rewards_NM.shape[1] - 1)", "rewards_NM.shape[1]"),
    ("rloo", "rewards_NM - others_NM", "others_NM - rewards_NM"),
    ("maxrl", "(rewards_NM - mean_N1) / mean_N1", "(rewards_NM - mean_N1) / mean_N1.sqrt()"),
    ("maxrl", "(rewards_NM - mean_N1) / mean_N1", "rewards_NM / mean_N1"),
    ("batch-std", ".std(correction=0).item()", ".std().item()"),
    ("batch-std", "rewards_1M, batch_std", "rewards_1M, rewards_1M.std(correction=0)"),
    ("clip-higher", "CLIP_HIGH = 0.2, 0.28", "CLIP_HIGH = 0.2, 0.2"),
    ("clip-higher", "CLIP_HIGH = 0.2, 0.28", "CLIP_HIGH = 0.28, 0.28"),
    ("clip-higher", "torch.min", "torch.max"),
    ("clip-higher", '{"progress": NoProgress()}', "{}"),
    ("cispo", "MAX_WEIGHT = 5.0", "MAX_WEIGHT = 4.0"),
    ("cispo", "ratio_P = (logprobs_P.detach()", "ratio_P = (logprobs_P"),
    ("cispo", "    update_once(model, optimizer, episodes, **settings)", "    pass"),
    ("gspo", "CLIP_HIGH = 0.0015, 0.002", "CLIP_HIGH = 0.0015, 0.0015"),
    ("gspo", "CLIP_HIGH = 0.0015, 0.002", "CLIP_HIGH = 0.002, 0.002"),
    ("gspo", "sum() / len(kept)", "sum() / num_tokens"),
    ("gspo", "difference_P.mean()", "difference_P.sum()"),
    ("kl", "logprobs_P - penalty_P", "logprobs_P + penalty_P"),
    ("kl", "BETA / 2 *", "BETA *"),
    ("kl", "answers = kept  #", "answers = [pair for pair in kept if pair[1] != 0]  #"),
    ("dynamic-sampling", "> 1:\n                kept", "> 0:\n                kept"),
    ("dynamic-sampling", "asked + num_groups - len(kept) // num_answers", "asked + num_groups"),
    ("dynamic-sampling", "asked + e.question_id", "e.question_id"),
    ("dynamic-sampling", "ROUNDS * count, []", "count, []"),
    ("soft-overlong", "max_gen_len / 5", "max_gen_len / 4"),
    ("soft-overlong", "reward.total + length_reward", "reward.total - length_reward"),
    ("truncated-is", "CAP = 2.0", "CAP = 2.5"),
    ("truncated-is", "weights_P = (logprobs_P.detach()", "weights_P = (logprobs_P"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "right", "wrong"), MUTATIONS, ids=str)
def test_mutation_is_caught(name, right, wrong, tree, tokenizer):
    source = (tree(name) / "grpo.py").read_text()
    assert source.count(right) == 1
    (tree(name) / "mutant.py").write_text(source.replace(right, wrong))
    mutant = load(tree(name) / "mutant.py", "mutant")
    with pytest.raises(AssertionError):
        check(name, mutant, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_tiny_run_takes_two_steps(name, tree, tmp_path):
    # Catches, in the patches: an argument that train.py does not pass on.
    command = [sys.executable, "train.py", "--config", "config_tiny.yaml"]
    command += [f"output_dir={tmp_path}/run", "training.max_steps=2", "training.max_gen_len=96"]
    command += ["training.batch_size=32", "training.num_questions_per_batch=4", "data.test_size=4"]
    subprocess.run(command, cwd=tree(name), check=True)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert any(record["weights_changed"] > 0.5 for record in steps)
