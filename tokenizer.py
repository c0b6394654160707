"""Text to token ids and back, the model's chat template, and the ids that end an answer."""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from published_format import read_json, read_text

FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
)


class Tokenizer:
    """The published tokenizer of a model directory.

    stop_ids: every id that ends an answer.
    stop_conflict: what the files say about them, in one line; "" if they agree.
    vocab_size: the largest id plus 1. The model's head may have more rows; never sample those.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        paths = _published_files(directory)
        text = read_text(directory / "tokenizer.json")
        settings = read_json(directory / "tokenizer_config.json")
        with _explained(f"{directory / 'tokenizer.json'} is damaged"):
            self._fast = FastTokenizer.from_str(text)
        # A published file may keep settings from training that would cut or pad our prompts.
        self._fast.no_truncation()
        self._fast.no_padding()
        self._special_tokens = _special_tokens(settings)
        known_ids = set(self._fast.get_vocab(with_added_tokens=True).values())
        self.stop_ids, self.stop_conflict = self._read_stop_ids(known_ids)
        self.vocab_size = max(known_ids) + 1
        path = directory / "config.json"
        rows = read_json(path).get("vocab_size") if path.exists() else None
        if isinstance(rows, int) and rows < self.vocab_size:
            raise ValueError(
                f"{directory}: the tokenizer has {self.vocab_size} entries, but the model only "
                f"{rows} rows; resize its embedding, or use the tokenizer that belongs to it"
            )
        self._chat_template = _read_chat_template(directory, settings)
        # Kept in memory, because a resumed run later deletes the checkpoint that it read them from.
        self._files = {path.name: path.read_bytes() for path in paths}

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """Raises FileNotFoundError if a file is missing, or ValueError naming what is damaged."""
        return cls(Path(directory))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Special tokens written in the text get their ids; none are added."""
        with _explained(f"{self._directory}: the tokenizer fails on {text!r:.100}"):
            return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """Text of token ids, special tokens included. Bytes that are not UTF-8 become U+FFFD."""
        with _explained(f"{self._directory}: the tokenizer fails on {ids!r:.100}"):
            return self._fast.decode(ids, skip_special_tokens=False)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """Format [{"role", "content"}, ...] with the model's template, up to the assistant's turn.

        Raises ValueError if the template fails or the sandbox stops it.
        """
        fix = 'give it a list of {"role", "content"}, with roles that the template knows'
        with _explained(f"{self._directory}: the chat template fails on {messages!r:.200}", fix):
            return self._chat_template.render(
                messages=messages, add_generation_prompt=True, tools=None, **self._special_tokens
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Write the tokenizer's files exactly as they were published."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(directory) / name).write_bytes(content)

    def _read_stop_ids(self, known_ids: set[int]) -> tuple[frozenset[int], str]:
        """The ids that any of the files names, and what the files say if they disagree.

        A fine-tuned model often names the end of its turns in only one of them. They agree if the
        first file that names any, which other programs obey, names all. An id that only a later
        file names must be a special token: such a file may have been forgotten in a change.
        """
        named = {}
        for name in ("generation_config.json", "config.json"):
            path = self._directory / name
            ids = read_json(path).get("eos_token_id") if path.exists() else None
            named[name] = ids if isinstance(ids, list) else [ids]
        eos_token = self._special_tokens.get("eos_token", "")
        named["tokenizer_config.json"] = [self._fast.token_to_id(eos_token)]
        named = {name: ids for name, ids in named.items() if ids not in ([], [None])}
        ids = next(iter(named.values()), [])
        if not ids or not all(type(i) is int and i in known_ids for i in ids):
            raise ValueError(
                f"{self._directory}: stop ids {named!r:.200} are not ids of the tokenizer; set "
                "eos_token_id in that file, or eos_token in tokenizer_config.json"
            )
        added = self._fast.get_added_tokens_decoder().items()
        special = {i for i, token in added if token.special}
        allowed = special.union(ids)
        for name, all_ids in named.items():
            named[name] = [i for i in all_ids if type(i) is int and i in allowed]
        stop_ids = frozenset(itertools.chain(*named.values()))
        if stop_ids == set(ids):
            return stop_ids, ""
        texts = [f"{name}: {self.decode(sorted(ids))}" for name, ids in named.items()]
        return stop_ids, f"answers end at {self.decode(sorted(stop_ids))} ({'; '.join(texts)})"


def _published_files(directory: Path) -> list[Path]:
    """Raises ValueError for a link out of the directory, which may lead to a private file.

    Links into the hub's cache (models--NAME/blobs) lead to published files.
    """
    root = directory.resolve()
    paths = [path for path in map(directory.joinpath, FILES) if path.is_file()]
    for path in paths:
        target = path.resolve()
        is_published = target.parent.name == "blobs" and "models--" in target.parent.parent.name
        if root not in target.parents and not is_published:
            raise ValueError(
                f"{path} is a link to {target}, outside of the model's directory, and "
                "checkpoints would publish its content; replace the link by the model's own file"
            )
    return paths


def _special_tokens(settings: dict) -> dict[str, str]:
    """Name -> text. tokenizer_config.json has either the text or {"content": text}."""
    tokens = {}
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        token = settings.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens


@contextmanager
def _explained(problem: str, fix: str = "fix it, or fetch the model again") -> Iterator[None]:
    """Turn any error inside into a ValueError that states the problem and the fix."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers panics with one; a template raises any type at all
        raise ValueError(f"{problem} ({error}); {fix}") from None


# ---------------------------------------------------------------- chat template


class GenerationBlock(Extension):
    """{% generation %} marks the assistant's text for supervised training; we only render it."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _read_chat_template(directory: Path, settings: dict) -> Template:
    """The template in chat_template.jinja or, without that file, in tokenizer_config.json.

    A template is code written by whoever published the model. It runs in jinja2's sandbox, set up
    as in transformers: it cannot reach Python's internals or change the messages. Nothing limits
    how long it runs.
    """
    path = directory / "chat_template.jinja"
    source = read_text(path) if path.exists() else settings.get("chat_template")
    if isinstance(source, list):  # several named templates
        with _explained(f"{directory}: chat_template is damaged"):
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
    if not isinstance(source, str):
        raise ValueError(
            f"{directory} has no chat template; use an Instruct model, or add a chat_template.jinja"
        )
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    # jinja2's own tojson escapes HTML.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
    with _explained(f"{directory}: the chat template does not parse"):
        return environment.from_string(source)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)
