"""Tiny models with random parameters, and episodes from plain numbers.

Sizes are different primes where divisibility allows: 3 layers, 2 key heads x 5 query heads each,
head size 2 x 3, hidden size 60, MLP 37, vocabulary 101.
"""

import json
import subprocess
import sys
import zlib
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel

from data_types import Episode, NoProgress, Reward
from qwen2_model import Qwen2Config, Transformer

CONFIG = Qwen2Config(
    vocab_size=101,
    hidden_size=60,
    intermediate_size=37,
    num_hidden_layers=3,
    num_attention_heads=10,
    num_key_value_heads=2,
    max_position_embeddings=512,
    rms_norm_eps=1e-2,
    rope_theta=1000.0,
    tie_word_embeddings=False,
    bos_token_id=1,
    eos_token_id=2,
)


def random_model(*, tied: bool = False, seed: int = 0, **changes) -> Transformer:
    """Norm weights are far from 1 and biases far from 0, so that a test notices a missing one."""
    model = Transformer(replace(CONFIG, tie_word_embeddings=tied, **changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            else:
                parameter.copy_(
                    noise * (0.25 if "embed" in name else 1.5 / parameter.shape[1] ** 0.5)
                )
    return model


def reference_model(model: Transformer):
    """The same weights in transformers' implementation."""
    from transformers import Qwen2Config as ReferenceConfig
    from transformers import Qwen2ForCausalLM

    c = model.config
    config = ReferenceConfig(
        **{k: v for k, v in asdict(c).items() if k != "rope_theta"},
        attn_implementation="eager",
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        pad_token_id=None,
    )
    reference = Qwen2ForCausalLM(config).eval()
    missing, unexpected = reference.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert set(missing) <= ({"lm_head.weight"} if c.tie_word_embeddings else set())
    return reference


def run_tests(tree: Path, names: list[str]) -> subprocess.CompletedProcess:
    """Run these tests in a copy of the repository."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", *names]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True)


def random_tokens(*shape: int, seed: int = 0, vocab_size: int = 101) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def episode(
    question_id: int,
    prompt: list[int],
    response: list[int],
    reward: float,
    *,
    finished: bool = True,
) -> Episode:
    return Episode(
        question_id=question_id,
        prompt_token_ids=prompt,
        response_token_ids=response,
        response_logprobs=[-1.5] * len(response),
        is_finished=finished,
        text="",
        reward=Reward(reward, {}),
    )


class RecordingProgress(NoProgress):
    """Records what the algorithm reports."""

    def __init__(self):
        self.phases, self.updates, self.counts = [], [], Counter()

    def phase(self, name, total):
        self.phases.append((name, total))
        return nullcontext()

    def update(self, n=0, **counts):
        self.updates.append((self.phases[-1][0], n))
        self.counts.update(counts)


def write_word_tokenizer(directory: Path, *, size: int, stop_ids: list[int]) -> Path:
    """Write a tokenizer whose entry i is the word "w<i>", for Tokenizer.from_pretrained."""
    directory.mkdir(parents=True, exist_ok=True)
    FastTokenizer(WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0")).save(
        str(directory / "tokenizer.json")
    )
    (directory / "tokenizer_config.json").write_text(
        '{"chat_template": "{{ messages }}", "eos_token": "w2"}'
    )
    (directory / "generation_config.json").write_text(f'{{"eos_token_id": {stop_ids}}}')
    return directory


def add_checksums(checkpoint: Path) -> None:
    """Write checksums that fit whatever is in a checkpoint."""
    sums = {
        file.name: f"{zlib.crc32(file.read_bytes()):08x}"
        for file in checkpoint.iterdir()
        if file.name != "complete.json"
    }
    (checkpoint / "complete.json").write_text(json.dumps(sums))
