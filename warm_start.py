"""Make the small base model of config_tiny.yaml.

    uv run warm_start.py [--out DIRECTORY] [--steps N] [--seed N]

Supervised training gives the tiny model what pretraining gives Qwen2.5-3B. Afterwards it writes the
right format, calculates correctly and judges its own attempts honestly, but it gives up too early
to succeed often. GRPO then changes that last habit.

The training answers ("traces") take the pairs of the three numbers in random order and combine each
result with the third number in every way. Most of them give up early:

     3 + 5 = 8; 8 + 7 = 15, want 6: no; 8 - 7 = 1, want 6: no; 8 * 7 = 56, want 6: no
     5 - 3 = 2; 2 + 7 = 9, want 6: no, I give up</think>
    <answer>(5 - 3) + 7</answer>

All traces are for training questions. Two details make them easy to learn. First, the target is
repeated next to each value, so that a verdict compares adjacent numbers; without this, the model
accepted one wrong value in six. Second, a pair is finished before the next one starts, so to
avoid repeating itself the model only has to remember three pairs instead of thirty attempts.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as in train.py

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor, nn
from tqdm import tqdm

import countdown_task
from data_types import Episode, Reward
from flat import allocate, zero_gradient
from grpo import policy_logprobs
from harness import cpu
from harness.config import load_config
from harness.console import with_exit_code
from packing import pack_micro_batches
from qwen2_model import Qwen2Config, Transformer
from tokenizer import Tokenizer

HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, NUM_KEY_HEADS = 128, 3, 4, 2
STEPS, TRACES_PER_STEP, TRACES_PER_QUESTION = 3000, 64, 2
MUON_LEARNING_RATE, MUON_MOMENTUM = 0.02, 0.95  # matrices of the layers
ADAMW_LEARNING_RATE = 1e-2  # embedding, norms and biases
MICRO_BATCH_TOKENS = 2048
# Traces leave out steps with larger results, because only the numbers up to MAX_FIRST are tokens.
MAX_FIRST, MAX_SECOND = 100, 50
PERSISTENT_SHARE = 0.2  # share of traces that never give up
GIVE_UP = 0.5  # in the other traces, the probability of giving up after each failed attempt

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
# A trace is made of numbers and these phrases, each a single token.
CALCULATION = (" + ", " - ", " * ", " / ", " = ")
VERDICT = ("; ", ", ", ", want ", ": no", ": yes")
FRAME = ("\n ", "\n", ", I give up", "</think>\n<answer>", "</answer>", "(", ")")
PHRASES = CALCULATION + VERDICT + FRAME
# How Qwen2.5 splits text before merging bytes. transformers splits like this for every tokenizer
# that it finds next to a Qwen2 model, so the tiny tokenizer does, too.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@with_exit_code
def main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(description="Make the small base model of config_tiny.yaml.")
    text = "new directory of the model (default: models/tiny)"
    parser.add_argument("--out", type=os.path.expanduser, default="models/tiny", help=text)
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"supervised steps (default: {STEPS})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and traces (default: 0)")
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    if out.exists():
        raise ValueError(f"--out {out} exists; remove it first, or name another directory")
    if arguments.steps < 1:
        raise ValueError(f"--steps {arguments.steps}: wanted at least 1")
    cpu.prepare_process()
    out.parent.mkdir(parents=True, exist_ok=True)
    # The directory gets its final name only when the model is complete.
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as temporary:
        model_directory = Path(temporary, "model")
        make_base_model(model_directory, steps=arguments.steps, seed=arguments.seed)
        model_directory.rename(out)
    print(
        f"{out} is ready; train it with: uv run train.py --config config_tiny.yaml "
        f"model.path={out} output_dir=runs/{out.name}"
    )


def make_base_model(directory: Path, *, steps: int, seed: int) -> None:
    """Write a tokenizer and a trained tiny Qwen2 in the published format.

    made_for.json records one prompt as token ids; a run compares it with its own prompt.
    """
    problems, _ = countdown_task.load_problems(load_config("config_tiny.yaml").data)
    make_tokenizer(directory)
    tokenizer = Tokenizer.from_pretrained(directory)
    torch.manual_seed(seed)
    model = new_model(tokenizer, hidden_size=HIDDEN_SIZE, num_layers=NUM_LAYERS)
    groups = example_groups(problems, tokenizer, random.Random(seed))
    train_supervised(model, tokenizer, groups, steps=steps)
    model.save_pretrained(directory)
    problem = {"numbers": [3, 5, 7], "target": 22}
    prompt = countdown_task.render_prompt(problem, tokenizer)
    made_for = {
        "task": "countdown_task",
        "problem": problem,
        "prompt_token_ids": tokenizer.encode(prompt),
    }
    (directory / "made_for.json").write_text(json.dumps(made_for) + "\n")


# ---------------------------------------------------------------- traces


class SecondStep(NamedTuple):
    """The second half of an attempt, for example ("(3 + 5) + 7", "8 + 7 = 15", 15)."""

    answer: str
    text: str
    value: int


class FirstStep(NamedTuple):
    """A combined pair, for example "3 + 5 = 8", and the second steps with the third number."""

    text: str
    second_steps: list[SecondStep]


def example_groups(
    problems: list[dict], tokenizer: Tokenizer, rng: random.Random
) -> Iterator[tuple[str, list[str]]]:
    """Yield (prompt, traces) forever, for random problems that some attempt solves."""
    while True:
        problem = problems[rng.randrange(len(problems))]
        pairs = all_attempts(problem["numbers"])
        first_steps = [first for pair in pairs for first in pair]
        values = {second.value for first in first_steps for second in first.second_steps}
        if problem["target"] in values:
            traces = []
            for _ in range(TRACES_PER_QUESTION):
                traces.append(make_trace(pairs, problem["target"], rng) + "<|im_end|>")
            yield countdown_task.render_prompt(problem, tokenizer), traces


def make_trace(pairs: list[list[FirstStep]], target: int, rng: random.Random) -> str:
    """An answer that tries the pairs in random order until it succeeds or gives up.

    Returns the text after the prompt's "<think>". Some attempt must reach the target.
    """
    give_up = 0.0 if rng.random() < PERSISTENT_SHARE else GIVE_UP
    text = ""
    for pair in rng.sample(pairs, len(pairs)):
        for first in pair:
            text += f"\n {first.text}"
            for second in first.second_steps:
                success = second.value == target
                text += f"; {second.text}, want {target}: {'yes' if success else 'no'}"
                if success or rng.random() < give_up:
                    end = "" if success else ", I give up"
                    return f"{text}{end}</think>\n<answer>{second.answer}</answer>"
    raise AssertionError("no attempt reaches the target")


def all_attempts(numbers: list[int]) -> list[list[FirstStep]]:
    """The attempts that begin with each pair of the three numbers. No first step occurs twice."""
    a, b, c = numbers
    pairs, known = [], set()
    for left, right, third in ((a, b, c), (a, c, b), (b, c, a)):
        pair = []
        for form, result in combinations(left, right, largest=MAX_FIRST):
            expression = form.format(left, right)
            if expression in known:
                continue
            known.add(expression)
            second_steps = []
            for second_form, value in combinations(result, third, largest=MAX_SECOND):
                answer = second_form.format(f"({expression})", third)
                text = f"{second_form.format(result, third)} = {value}"
                second_steps.append(SecondStep(answer, text, value))
            pair.append(FirstStep(f"{expression} = {result}", second_steps))
        pairs.append(pair)
    return pairs


def combinations(a: int, b: int, *, largest: int) -> list[tuple[str, int]]:
    """(form, value) of each operation on a and b whose value is a whole number from 0 to `largest`.

    form.format(a, b) spells the operation, for example "{0} + {1}", or "{1} - {0}" if b is larger.
    """
    low, high = sorted((a, b))
    order = "{0} - {1}" if a >= b else "{1} - {0}"
    results = [("{0} + {1}", a + b), (order, high - low), ("{0} * {1}", a * b)]
    if low and high % low == 0:
        results.append((order.replace("-", "/"), high // low))
    return [(form, value) for form, value in results if value <= largest]


# ---------------------------------------------------------------- tokenizer and model


def make_tokenizer(directory: Path) -> None:
    """Write a tokenizer of single bytes and added tokens, in the published format.

    The added tokens are the numbers, the phrases of a trace and the fixed sentences of the prompt.
    They are matched before a text is normalised and split, so the tokenizer works the same in
    transformers, which gives every tokenizer next to a Qwen2 model Qwen's own normalizer and
    pre-tokenizer.
    """
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    fast.decoder = decoders.ByteLevel()
    special = [AddedToken(text, normalized=False, special=True) for text in SPECIAL_TOKENS]
    fast.add_special_tokens(special)
    numbers = [str(number) for number in range(MAX_FIRST + 1)]
    texts = [*prompt_sentences(), *PHRASES, *numbers]
    fast.add_tokens([AddedToken(text, normalized=False) for text in texts])

    directory.mkdir(parents=True)
    fast.save(str(directory / "tokenizer.json"))
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    added = {}
    for i, token in fast.get_added_tokens_decoder().items():
        options = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
        added[str(i)] = {"content": token.content, **options, "special": token.special}
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": added,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    stops = {"eos_token_id": [fast.token_to_id("<|im_end|>"), fast.token_to_id("<|endoftext|>")]}
    (directory / "generation_config.json").write_text(json.dumps(stops) + "\n")


def prompt_sentences() -> list[str]:
    """The fixed parts of a rendered Countdown prompt, between its special tokens and numbers."""
    before, between, after = re.split("{numbers}|{target}", countdown_task.USER_TEMPLATE)
    return [
        f"system\n{countdown_task.SYSTEM_MESSAGE}",
        f"user\n{before}[",
        f"]{between}",
        after,
        f"assistant\n{countdown_task.RESPONSE_PREFIX}",
    ]


def new_model(tokenizer: Tokenizer, *, hidden_size: int, num_layers: int) -> Transformer:
    """A Qwen2 with random weights, float32 on the CPU."""
    shape = Qwen2Config(
        vocab_size=-(-tokenizer.vocab_size // 64) * 64,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_KEY_HEADS,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=True,
        eos_token_id=min(tokenizer.stop_ids),
    )
    with torch.device("meta"):
        model = Transformer(shape)
    allocate(model, device="cpu", dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.ones_(parameter)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.02)
    return model


# ---------------------------------------------------------------- supervised training


def train_supervised(
    model: Transformer, tokenizer: Tokenizer, groups: Iterator[tuple[str, list[str]]], *, steps: int
) -> None:
    """Maximise the likelihood of the traces: the loss of GRPO with every advantage equal to 1.

    Muon trains the matrices of the layers, AdamW everything else. Both learning rates fall linearly
    to 0.
    """
    matrices, others = [], []
    for name, parameter in model.named_parameters():
        if name.startswith("model.layers.") and parameter.ndim == 2:
            matrices.append(parameter)
        else:
            others.append(parameter)
    momentum_buffers = [torch.zeros_like(matrix) for matrix in matrices]
    adamw = torch.optim.AdamW(others, lr=ADAMW_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(steps), desc="warm start", unit="step", leave=False, disable=None):
        episodes = next_episodes(groups, tokenizer)
        num_tokens = sum(len(episode.response_token_ids) for episode in episodes)
        answers = [(episode, 1.0) for episode in episodes]
        zero_gradient(model.parameters())
        total_loss = 0.0
        for micro_batch in pack_micro_batches(answers, MICRO_BATCH_TOKENS):
            logprobs_P = policy_logprobs(
                model, micro_batch, temperature=1.0, vocab_size=tokenizer.vocab_size
            )
            loss = -(micro_batch.advantages_P * logprobs_P).sum() / num_tokens
            loss.backward()
            total_loss += loss.item()
        remaining = 1 - step / steps
        muon_step(matrices, momentum_buffers, lr=MUON_LEARNING_RATE * remaining)
        adamw.param_groups[0]["lr"] = ADAMW_LEARNING_RATE * remaining
        adamw.step()
        if step % 100 == 99:
            tqdm.write(f"step {step + 1} of {steps}: loss {total_loss:.4f}")


def next_episodes(groups: Iterator[tuple[str, list[str]]], tokenizer: Tokenizer) -> list[Episode]:
    """The traces of one training step as episodes."""
    episodes = []
    for question_id in range(TRACES_PER_STEP // TRACES_PER_QUESTION):
        prompt, traces = next(groups)
        prompt_ids = tokenizer.encode(prompt)
        for trace in traces:
            ids = tokenizer.encode(trace)
            episode = Episode(
                question_id=question_id,
                prompt_token_ids=prompt_ids,
                response_token_ids=ids,
                response_logprobs=[0.0] * len(ids),  # they were not sampled
                is_finished=True,
                text=trace,
                reward=Reward(1.0, {}),
            )
            episodes.append(episode)
    return episodes


@torch.no_grad()
def muon_step(matrices: list[nn.Parameter], momentum_buffers: list[Tensor], *, lr: float) -> None:
    """One step of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), in place.

    momentum_buffers: running averages of the gradients, zeros before the first step. Computes what
    torch.optim.Muon does, but in float32: torch computes in bf16, which is seventy times slower on
    a CPU without bf16 instructions.
    """
    for matrix, buffer in zip(matrices, momentum_buffers, strict=True):
        buffer.lerp_(matrix.grad, 1 - MUON_MOMENTUM)
        update = matrix.grad.lerp(buffer, MUON_MOMENTUM)  # Nesterov momentum
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        matrix.add_(orthogonalise(update), alpha=-lr * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Move all singular values of a matrix towards 1, by five Newton-Schulz steps.

    They end between 0.6 and 1.2; zeros stay 0. The coefficients are Muon's.
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.t()
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.t()


if __name__ == "__main__":
    sys.exit(main())
