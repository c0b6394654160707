"""Make the small base model of config_tiny.yaml from nothing: uv run warm_start.py [--out models/tiny] [--steps N] [--seed N]

It plays the part that pretraining plays for Qwen2.5-3B: afterwards the model writes the format, calculates and judges
its own attempts honestly, but gives up too early to win often. That last habit is what GRPO then changes.

The traces it imitates take the pairs of the three numbers in random order, and try what each pair gives with each use of
the third number; most give up:

     3 + 5 = 8; 8 + 7 = 15, want 6: no; 8 - 7 = 1, want 6: no; 8 * 7 = 56, want 6: no
     5 - 3 = 2; 2 + 7 = 9, want 6: no, I give up</think>
    <answer>(5 - 3) + 7</answer>

They come from training questions only. Writing the target beside the value makes the verdict a comparison of neighbours:
without it the model said "yes" to one wrong value in six. Going through a pair in one order means that not to try the same
again takes a memory of three pairs instead of thirty attempts.
"""

import argparse
import json
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer
from torch import Tensor, nn
from tqdm import tqdm

import countdown_task
from data_types import Episode, Reward
from flat import allocate, zero_gradient
from grpo import row_loss
from harness import cpu
from harness.config import load_config
from harness.console import with_exit_code
from packing import pack_rows
from qwen2_model import Qwen2Config, Transformer
from tokenizer import Tokenizer

HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, NUM_KEY_HEADS = 128, 3, 4, 2
STEPS, TRACES_PER_STEP, TRACES_PER_QUESTION = 3000, 64, 2
LEARNING_RATE_MATRICES, MOMENTUM = 0.02, 0.95  # Muon
LEARNING_RATE_OTHERS = 1e-2  # AdamW: embedding, norms, biases
MICRO_BATCH_TOKENS = 2048
MAX_FIRST, MAX_SECOND = (
    100,
    50,
)  # steps whose value is larger are not written: every number stays one token
PERSISTENT_SHARE = 0.2  # of the traces: they go on until they hit
GIVE_UP = 0.5  # probability, in the others, of giving up after a failing attempt

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
PHRASES = (
    " + ",
    " - ",
    " * ",
    " / ",
    " = ",
    "; ",
    ", ",
    ", want ",
    ": no",
    ": yes",
    "\n ",
    "\n",
    ", I give up",
    "</think>\n<answer>",
    "</answer>",
    "(",
    ")",
)
# How Qwen2.5's tokenizer cuts text before its merges; transformers puts it into any tokenizer beside a Qwen2 model.
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@with_exit_code
def main(argv: list[str] | None) -> None:
    parser = argparse.ArgumentParser(
        description="Make the small base model of config_tiny.yaml from nothing."
    )
    parser.add_argument(
        "--out",
        default="models/tiny",
        metavar="DIRECTORY",
        help="must not exist yet (default: models/tiny)",
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"supervised steps (default: {STEPS})"
    )
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    out = Path(arguments.out)
    if out.exists():
        raise ValueError(f"--out {out} exists; remove it first, or name another")
    if arguments.steps < 1:
        raise ValueError(f"--steps {arguments.steps}: wanted at least 1")
    cpu.prepare_process()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{out.name}.", dir=out.parent) as aside:
        make_base_model(Path(aside, "model"), steps=arguments.steps, seed=arguments.seed)
        Path(aside, "model").rename(out)
    print(
        f"{out} is made; train it with: uv run train.py --config config_tiny.yaml model.path={out} "
        f"output_dir=runs/{out.name}"
    )


def make_base_model(directory: Path, *, steps: int, seed: int) -> None:
    """Write a tokenizer and a trained tiny Qwen2 in the published format, and what its prompt looked like."""
    problems, _ = countdown_task.load_problems(load_config("config_tiny.yaml").data)
    make_tokenizer(directory)
    tokenizer = Tokenizer.from_pretrained(directory)
    torch.manual_seed(seed)
    model = new_model(tokenizer, hidden_size=HIDDEN_SIZE, num_layers=NUM_LAYERS)
    train_supervised(
        model, tokenizer, example_groups(problems, tokenizer, random.Random(seed)), steps=steps
    )
    model.save_pretrained(directory)
    problem = {"numbers": [3, 5, 7], "target": 22}
    prompt = countdown_task.render_prompt(problem, tokenizer)
    made_for = {
        "task": "countdown_task",
        "problem": problem,
        "prompt_token_ids": tokenizer.encode(prompt),
    }
    (directory / "made_for.json").write_text(json.dumps(made_for) + "\n")


# ---------------------------------------------------------------- what it imitates


def example_groups(
    problems, tokenizer: Tokenizer, rng: random.Random
) -> Iterator[tuple[str, list[str]]]:
    """Endless (prompt, traces) over random training problems."""
    while True:
        problem = problems[rng.randrange(len(problems))]
        pairs = all_attempts(problem["numbers"])
        if any(
            value == problem["target"]
            for pair in pairs
            for _, seconds in pair
            for _, _, value in seconds
        ):
            traces = [
                make_trace(pairs, problem["target"], rng) + "<|im_end|>"
                for _ in range(TRACES_PER_QUESTION)
            ]
            yield countdown_task.render_prompt(problem, tokenizer), traces


def make_trace(pairs: list[list], target: int, rng: random.Random) -> str:
    """A response: the pairs in random order, all attempts of each, until one hits or the trace gives up."""
    give_up = 0.0 if rng.random() < PERSISTENT_SHARE else GIVE_UP
    text = ""
    for pair in rng.sample(pairs, len(pairs)):
        for first, seconds in pair:
            text += f"\n {first}"
            for answer, second, value in seconds:
                hit = value == target
                text += f"; {second}, want {target}: {'yes' if hit else 'no'}"
                if hit or rng.random() < give_up:
                    return (
                        f"{text}{'' if hit else ', I give up'}</think>\n<answer>{answer}</answer>"
                    )
    raise AssertionError("no attempt hits")


def all_attempts(numbers: list[int]) -> list[list[tuple[str, list[tuple[str, str, int]]]]]:
    """The ways to combine three numbers in whole steps: of each pair, its first steps, each with the
    (expression, second step, value) that follow from it. What an earlier pair has given is not tried again.
    """
    a, b, c = numbers
    pairs, known = [], set()
    for left, right, third in ((a, b, c), (a, c, b), (b, c, a)):
        pair = []
        for form, between in _results(left, right, largest=MAX_FIRST):
            inner = form.format(left, right)
            seconds = [
                (
                    outer.format(f"({inner})", third),
                    f"{outer.format(between, third)} = {value}",
                    value,
                )
                for outer, value in _results(between, third, largest=MAX_SECOND)
            ]
            if inner not in known:
                pair.append((f"{inner} = {between}", seconds))
            known.add(inner)
        pairs.append(pair)
    return pairs


def _results(a: int, b: int, *, largest: int) -> list[tuple[str, int]]:
    """The ways to combine two numbers whose result is a whole number of 0..largest: forms like "{0} + {1}", and the results."""
    low, high = sorted((a, b))
    difference, quotient = ("{0} - {1}", "{0} / {1}") if a >= b else ("{1} - {0}", "{1} / {0}")
    results = [("{0} + {1}", a + b), (difference, high - low), ("{0} * {1}", a * b)]
    if low and high % low == 0:
        results.append((quotient, high // low))
    return [(form, value) for form, value in results if value <= largest]


# ---------------------------------------------------------------- the tokenizer and the model


def make_tokenizer(directory: Path) -> None:
    """Bytes, and above them each number, each phrase of a trace and each fixed sentence of the prompt as one added token.

    Added tokens are cut out before anything else happens to a text. So the tokenizer stays the same in transformers, which
    gives every tokenizer beside a Qwen2 model Qwen's own normalizer and pre-tokenizer.
    """
    before, between, after = re.split("{numbers}|{target}", countdown_task.USER_TEMPLATE)
    sentences = [
        f"system\n{countdown_task.SYSTEM_MESSAGE}",
        f"user\n{before}[",
        f"]{between}",
        after,
        f"assistant\n{countdown_task.RESPONSE_PREFIX}",
    ]
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), "isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    fast.add_tokens(
        [
            AddedToken(text, normalized=False)
            for text in (*sentences, *PHRASES, *map(str, range(MAX_FIRST + 1)))
        ]
    )
    directory.mkdir(parents=True)
    fast.save(str(directory / "tokenizer.json"))
    (directory / "vocab.json").write_text(json.dumps(vocab))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    added = {
        str(i): {
            "content": token.content,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token.special,
        }
        for i, token in fast.get_added_tokens_decoder().items()
    }
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


def new_model(tokenizer: Tokenizer, *, hidden_size: int, num_layers: int) -> Transformer:
    """A freshly initialised Qwen2 in float32 on the CPU."""
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
    """Maximum likelihood of the traces: the policy gradient of answers that all have advantage 1.

    Muon for the layers' matrices, AdamW for the rest, rates falling linearly to 0.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    averages = [torch.zeros_like(matrix) for matrix in matrices]
    adamw = torch.optim.AdamW(others, lr=LEARNING_RATE_OTHERS, betas=(0.9, 0.95), weight_decay=0.0)
    for step in tqdm(range(steps), desc="warm start", unit="step", leave=False, disable=None):
        episodes = []
        for question_id in range(TRACES_PER_STEP // TRACES_PER_QUESTION):
            prompt, responses = next(groups)
            prompt_ids = tokenizer.encode(prompt)
            for response in responses:
                ids = tokenizer.encode(response)
                episodes.append(
                    Episode(
                        question_id,
                        prompt_ids,
                        ids,
                        [0.0] * len(ids),
                        True,
                        response,
                        Reward(1.0, {}),
                    )
                )
        num_tokens, loss = sum(len(e.response_token_ids) for e in episodes), 0.0
        zero_gradient(model.parameters())
        for row in pack_rows([(e, 1.0) for e in episodes], MICRO_BATCH_TOKENS):
            part, _ = row_loss(
                model, row, num_tokens, temperature=1.0, vocab_size=tokenizer.vocab_size
            )
            part.backward()
            loss += part.item()
        left = 1 - step / steps
        muon_step(matrices, averages, lr=LEARNING_RATE_MATRICES * left)
        adamw.param_groups[0]["lr"] = LEARNING_RATE_OTHERS * left
        adamw.step()
        if step % 100 == 99:
            tqdm.write(f"step {step + 1} of {steps}: loss {loss:.4f}")


@torch.no_grad()
def muon_step(matrices: list[nn.Parameter], averages: list[Tensor], *, lr: float) -> None:
    """Momentum whose steps are made orthogonal (Jordan et al. 2024, kellerjordan.github.io/posts/muon), as torch.optim.Muon.

    averages: of the gradients, 0 before the first step. In float32: torch iterates in bf16, which a CPU without instructions
    for it computes seventy times slower.
    """
    for matrix, average in zip(matrices, averages, strict=True):
        average.lerp_(matrix.grad, 1 - MOMENTUM)
        ahead = matrix.grad.lerp(average, MOMENTUM)  # Nesterov's
        scale = max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        matrix.add_(orthogonalise(ahead), alpha=-lr * scale)


def orthogonalise(matrix: Tensor) -> Tensor:
    """Towards the nearest matrix whose singular values are 1, by five Newton-Schulz steps; they end between 0.6 and 1.2."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.t()
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.t()


if __name__ == "__main__":
    sys.exit(main())
