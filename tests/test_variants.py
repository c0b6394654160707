"""Each relative of GRPO in variants/: its patch applies to a copy of the tree; the gradient of its whole update equals a loop
written from the paper's equation, and the comparison notices a fault; two steps of the tiny run work.

The patched grpo.py is imported beside the real one, under another name: patches change grpo.py, train.py and config.yaml only.
"""

import importlib.util
import json
import math
import shutil
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import fmean, pstdev
from types import ModuleType

import pytest
import torch
from helpers import random_model, random_tokens, reference_model, write_word_tokenizer
from test_grpo import TEMPERATURE, VOCAB, assert_same_gradient, batch

from data_types import Episode, Question, Reward
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "variants").glob("*.patch"))
STEP = 0.003  # of the descent that stands in for the optimizer: a second step starts from other weights
pytestmark = pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(),
    reason="patches are applied by git to a copy of a git checkout",
)


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run = load(ROOT / "variants" / "run.py", "variants_run")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A function: the patched copy of the tree, made once a patch."""

    @cache
    def make(name: str) -> Path:
        directory = tmp_path_factory.mktemp(name)
        run.make_tree(name, directory)
        return directory

    return make


def patched_grpo(tree: Path, mutation: tuple[str, str] | None = None) -> ModuleType:
    path = tree / "grpo.py"
    if mutation:
        source = path.read_text()
        assert source.count(mutation[0]) == 1
        path = tree / "mutant.py"
        path.write_text(source.replace(*mutation))
    return load(path, "mutant" if mutation else "patched_grpo")


# --- the equations, one answer and one token at a time


def answer_logprobs(model, e: Episode) -> torch.Tensor:
    """By transformers, each answer alone."""
    tokens = e.prompt_token_ids + e.response_token_ids
    logits_SV = model(torch.tensor([tokens])).logits[0, :, :VOCAB] / TEMPERATURE
    start = len(e.prompt_token_ids)
    return torch.log_softmax(logits_SV, dim=-1)[
        range(start - 1, len(tokens) - 1), e.response_token_ids
    ]


def clipped(ratio: torch.Tensor, advantage: float, low: float, high: float) -> torch.Tensor:
    bounded = min(max(ratio.item(), 1 - low), 1 + high)
    return (
        ratio * advantage
        if ratio.item() * advantage <= bounded * advantage
        else bounded * advantage + 0.0 * ratio
    )


def equation(
    name: str, episodes: list[Episode], i: int, logprobs: torch.Tensor, start: torch.Tensor
) -> torch.Tensor:
    """What answer i adds to the loss; logprobs and start: of its tokens, by the policy and by the model training began with."""
    e = episodes[i]
    group = [other.reward.total for other in episodes if other.question_id == e.question_id]
    others = [
        o.reward.total for j, o in enumerate(episodes) if o.question_id == e.question_id and j != i
    ]
    difference = e.reward.total - fmean(group)
    advantage = 0.0 if len(set(group)) == 1 else difference / (pstdev(group) + 1e-4)
    kept = [other for other in episodes if other.is_finished or name == "soft-overlong"]
    num_tokens = sum(len(other.response_token_ids) for other in kept)
    if name == "dr-grpo":
        return -difference * logprobs.sum() / (448 * len(episodes))
    if name == "rloo":
        return -(e.reward.total - fmean(others)) * logprobs.sum() / num_tokens
    if name == "gspo":
        log_ratio = sum(
            new - old for new, old in zip(logprobs, e.response_logprobs, strict=True)
        ) / len(logprobs)
        return -clipped(log_ratio.exp(), advantage, 0.0015, 0.002) / len(kept)
    total = torch.zeros(())
    for new, old, began in zip(logprobs, e.response_logprobs, start, strict=True):
        if name == "clip-higher":
            total = total - clipped((new - old).exp(), advantage, 0.2, 0.28) / num_tokens
        elif name == "truncated-is":
            total = total - min(math.exp(new.item() - old), 2.0) * advantage * new / num_tokens
        elif name == "kl":
            total = (
                total
                - (advantage * new - 0.04 * ((began - new).exp() - (began - new) - 1)) / num_tokens
            )
        else:
            total = total - advantage * new / num_tokens
    return total


def expected_gradients(
    name: str, episodes: list[Episode], steps: int, *, skip_unfinished: bool
) -> list[dict]:
    model, start = reference_model(random_model()), reference_model(random_model(seed=1))
    gradients = []
    for _ in range(steps):
        model.zero_grad()
        for i, e in enumerate(episodes):
            if e.is_finished or not skip_unfinished:
                with torch.no_grad():
                    began = answer_logprobs(start, e)
                equation(name, episodes, i, answer_logprobs(model, e), began).backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters()})
        with torch.no_grad():
            for p in model.parameters():
                p -= STEP * p.grad
    return gradients


class Descent:
    """Stands where the optimizer does: keeps the gradients, takes plain steps."""

    def __init__(self, model):
        self.model, self.gradients = model, []

    @torch.no_grad()
    def step(self):
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters()})
        for p in self.model.parameters():
            p -= STEP * p.grad

    def zero_grad(self):
        self.model.zero_grad()


def assert_update_equals_the_equation(
    name: str, grpo: ModuleType, episodes: list[Episode], *, skip_unfinished=True
) -> None:
    model, steps = random_model(), 2 if name in ("clip-higher", "gspo") else 1
    descent, start = Descent(model), {"start": random_model(seed=1)} if name == "kl" else {}
    grpo.update_policy(
        model,
        descent,
        episodes,
        max_grad_norm=math.inf,
        skip_unfinished=skip_unfinished,
        temperature=TEMPERATURE,
        vocab_size=VOCAB,
        micro_batch_tokens=47,
        **start,
    )
    wanted = expected_gradients(name, episodes, steps, skip_unfinished=skip_unfinished)
    assert len(descent.gradients) == steps
    for got, gradient in zip(descent.gradients, wanted, strict=True):
        assert_same_gradient(got, gradient)


@cache
def off_policy_batch() -> list[Episode]:
    """The ragged batch of test_grpo, some of it unfinished, one group of equal rewards. The policy differs from the sampler: token
    by token so that every bound has ratios on both its sides, in a third of the answers so little that the ratio of the whole
    lies between GSPO's two bounds.
    """
    model, episodes = reference_model(random_model()), []
    log_ratios = [-0.9, -0.27, -0.1, 0.1, 0.21, 0.6, 0.85]
    for i, e in enumerate(batch(True)):
        with torch.no_grad():
            logprobs = answer_logprobs(model, e)
        difference = torch.tensor([log_ratios[(i + t) % 7] for t in range(len(logprobs))])
        if i % 3 == 0:
            difference[:] = 0.00175 if e.reward.total >= 1.0 else -0.00175
        episodes.append(replace(e, response_logprobs=(logprobs - difference).tolist()))
    return episodes


# --- those that change what rollout does


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_pretrained(
        write_word_tokenizer(tmp_path_factory.mktemp("words"), size=VOCAB, stop_ids=[7, 31, 40, 50])
    )


def rollout_settings(tokenizer, calls: list) -> dict:
    """Questions whose answers are worth the same (flat) or not; calls: the reward of each answer that was scored, in order."""

    def reward(text, flat):
        calls.append(0.1 if flat else float(len(text) % 3))
        return Reward(calls[-1], {})

    prompts = [random_tokens(3 + i % 5, seed=i, vocab_size=VOCAB).tolist() for i in range(12)]
    questions = [
        Question("", prompt, {"flat": i in (0, 2, 3, 6)}) for i, prompt in enumerate(prompts)
    ]
    return dict(  # noqa: C408
        model=random_model(),
        tokenizer=tokenizer,
        questions=questions,
        num_answers=4,
        max_gen_len=20,
        temperature=TEMPERATURE,
        reward_function=reward,
        generator=torch.Generator().manual_seed(0),
    )


def assert_further_questions_are_asked(grpo: ModuleType, tokenizer: Tokenizer) -> None:
    """DAPO, eq. 11, as a loop over what was scored: flat groups do not count, and as many more are asked as are missing."""
    calls = []
    settings = rollout_settings(tokenizer, calls)
    episodes = grpo.rollout_of_unequal(num_groups=5, **settings)
    groups = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    unequal = [i for i, group in enumerate(groups) if min(group) < max(group)]
    asked, have = 0, 0
    while have < 5 and asked < 12:
        asked, have = asked + 5 - have, len([i for i in unequal if i < asked + 5 - have])
    assert 5 < len(groups) == asked < 12  # neither the first five were enough, nor were all asked
    assert [e.question_id for e in episodes] == [i for i in unequal for _ in range(4)]
    for e in episodes:
        assert e.prompt_token_ids == settings["questions"][e.question_id].prompt_token_ids
    assert [e.reward.total for e in episodes] == [r for i in unequal for r in groups[i]]
    assert_update_equals_the_equation("dynamic-sampling", grpo, episodes)
    flat = [q for q in settings["questions"] if q.problem["flat"]]
    answers = grpo.rollout_of_unequal(num_groups=1, **settings | {"questions": flat})
    assert [e.question_id for e in answers] == [
        3
    ] * 4  # the last that was asked: the update says that there is nothing to learn


def assert_long_answers_pay(grpo: ModuleType, tokenizer: Tokenizer) -> None:
    """DAPO, eq. 13: L_max = 20 tokens, L_cache = 4."""
    calls = []
    episodes = grpo.rollout(**rollout_settings(tokenizer, calls))
    lengths = [len(e.response_token_ids) for e in episodes]
    punished = [0.0 if n <= 16 else (16 - n) / 4 if n < 20 else -1.0 for n in lengths]
    assert {0.0, -1.0} < set(punished)
    assert [e.reward.total for e in episodes] == pytest.approx(
        [r + p for r, p in zip(calls, punished, strict=True)]
    )
    assert not all(e.is_finished for e in episodes)
    assert_update_equals_the_equation("soft-overlong", grpo, episodes, skip_unfinished=False)


def check(name: str, grpo: ModuleType, tokenizer: Tokenizer) -> None:
    if name == "dynamic-sampling":
        assert_further_questions_are_asked(grpo, tokenizer)
    elif name == "soft-overlong":
        assert_long_answers_pay(grpo, tokenizer)
    else:
        assert_update_equals_the_equation(name, grpo, off_policy_batch())


# --- the tests


@pytest.mark.parametrize("name", NAMES)
def test_a_variant_does_what_its_equation_says(name, tree, tokenizer):
    # Catches, in the patches, each of MUTATIONS; the next test sees them caught.
    check(name, patched_grpo(tree(name)), tokenizer)


MUTATIONS = [
    ("dr-grpo", "TOKENS_PER_ANSWER * len(episodes)", "TOKENS_PER_ANSWER * len(kept)"),
    ("dr-grpo", "TOKENS_PER_ANSWER = 448", "TOKENS_PER_ANSWER = 449"),
    (
        "dr-grpo",
        "rewards_NM - rewards_NM.mean(dim=1, keepdim=True)",
        "rewards_NM.mean(dim=1, keepdim=True) - rewards_NM",
    ),
    ("rloo", "(rewards_NM.shape[1] - 1)", "rewards_NM.shape[1]"),
    ("rloo", "rewards_NM - others_NM", "others_NM - rewards_NM"),
    ("clip-higher", "CLIP_LOW, CLIP_HIGH = 0.2, 0.28", "CLIP_LOW, CLIP_HIGH = 0.2, 0.2"),
    ("clip-higher", "CLIP_LOW, CLIP_HIGH = 0.2, 0.28", "CLIP_LOW, CLIP_HIGH = 0.28, 0.28"),
    ("clip-higher", "torch.minimum", "torch.maximum"),
    ("clip-higher", "for _ in range(STEPS)", "for _ in range(1)"),
    ("gspo", "CLIP_LOW, CLIP_HIGH = 0.0015, 0.002", "CLIP_LOW, CLIP_HIGH = 0.0015, 0.0015"),
    ("gspo", "CLIP_LOW, CLIP_HIGH = 0.0015, 0.002", "CLIP_LOW, CLIP_HIGH = 0.002, 0.002"),
    ("gspo", "logprobs_P), len(kept),", "logprobs_P), num_tokens,"),
    ("gspo", "part.mean()", "part.sum()"),
    ("kl", "- BETA * divergence_P", "+ BETA * divergence_P"),
    ("kl", "row.sampler_logprobs_P - logprobs_P\n", "logprobs_P - row.sampler_logprobs_P\n"),
    (
        "kl",
        "    learned = kept\n",
        "    learned = [(e, advantage) for e, advantage in kept if advantage != 0]\n",
    ),
    ("dynamic-sampling", "> 1:\n                kept", "> 0:\n                kept"),
    ("dynamic-sampling", "asked += missing", "asked += num_groups"),
    ("dynamic-sampling", "asked + e.question_id", "e.question_id"),
    ("soft-overlong", "max_gen_len / 5", "max_gen_len / 4"),
    ("soft-overlong", "reward.total + length_reward", "reward.total - length_reward"),
    ("truncated-is", "CAP = 2.0", "CAP = 2.5"),
    ("truncated-is", "= (logprobs_P.detach() -", "= (logprobs_P -"),
    ("truncated-is", "clamp(max=CAP)", "clamp(min=1 / CAP)"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "right", "wrong"), MUTATIONS, ids=[f"{n}: {wrong}" for n, _, wrong in MUTATIONS]
)
def test_the_comparison_notices_a_fault(name, right, wrong, tree, tokenizer):
    mutant = patched_grpo(tree(name), (right, wrong))
    with pytest.raises(AssertionError):
        check(name, mutant, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_run_makes_two_steps(name, tree, tmp_path, monkeypatch, own_signals):
    # Catches, in the patches: an argument of update_policy or rollout that train.py does not hand over.
    monkeypatch.chdir(tree(name))
    monkeypatch.setitem(sys.modules, "grpo", patched_grpo(tree(name)))
    arguments = [
        "--config",
        "config_tiny.yaml",
        f"output_dir={tmp_path}/run",
        "training.max_steps=2",
        "training.batch_size=32",
        "training.num_questions_per_batch=4",
        "data.test_size=4",
        "training.max_gen_len=96",
    ]
    assert load(tree(name) / "train.py", "patched_train").main(arguments) == 0
    records = [
        json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    steps = [record for record in records if "loss" in record]
    assert [record["step"] for record in steps] == [1, 2]
    assert any(record["weights_changed"] > 0.5 for record in steps)


@pytest.mark.parametrize("name", NAMES)
def test_a_patch_says_what_it_is_and_fits_a_screen(name):
    head, _, diff = (ROOT / "variants" / f"{name}.patch").read_text().partition("\ndiff --git ")
    assert "When: " in head
    assert "arXiv:" in head
    changed = [
        line
        for line in diff.splitlines()
        if line[:1] in ("+", "-") and line[:3] not in ("+++", "---")
    ]
    assert 0 < len(changed) <= 30
    added = sum(line[0] == "+" for line in changed)
    assert (
        f"| `{name}` | +{added} −{len(changed) - added} |"
        in (ROOT / "variants" / "README.md").read_text()
    )
