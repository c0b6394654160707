"""Text to token ids and back, the model's own chat template, and the ids that end an answer."""

import json
from pathlib import Path

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from tokenizers import Tokenizer as FastTokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja",
         "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json")


class Tokenizer:
    """The published tokenizer of a model directory.

    stop_ids: every id that ends an answer. pad_id: fills the right end of rows; masks never ask for it.
    vocab_size: real entries; the model's head may have more rows, which must never be sampled.
    """

    def __init__(self, directory: Path, fast: FastTokenizer, settings: dict, stop_ids: frozenset[int], template: str):
        self._directory, self._fast, self._settings = directory, fast, settings
        # Kept, because a resumed run reads them from a checkpoint that it will remove.
        self._files = {name: (directory / name).read_bytes() for name in FILES if (directory / name).exists()}
        self.stop_ids = stop_ids
        self.vocab_size = 1 + max(fast.get_vocab(with_added_tokens=True).values())
        pad_id = fast.token_to_id(_content(settings.get("pad_token")))
        self.pad_id = min(stop_ids) if pad_id is None else pad_id
        # A chat template is code from whoever published the model: the sandbox lets it format, and nothing else.
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise_template_error
        try:
            self._template = environment.from_string(template)
        except TemplateError as error:
            raise ValueError(f"{directory}: the chat template does not parse ({error}); fetch the model again") from None

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """Read tokenizer.json, tokenizer_config.json and, where present, generation_config.json and chat_template.jinja.

        Raises FileNotFoundError for a missing file, ValueError naming what is damaged or names an unknown token.
        """
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; a model directory holds the tokenizer beside the weights")
        try:
            fast = FastTokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is damaged ({error}); fetch the model again") from None
        settings = _read_json(directory / "tokenizer_config.json")
        template_file = directory / "chat_template.jinja"
        template = template_file.read_text() if template_file.exists() else settings.get("chat_template")
        if not isinstance(template, str):
            raise ValueError(f"{directory} has no chat template; use an Instruct model, or add its chat_template.jinja")
        return cls(directory, fast, settings, _stop_ids(directory, fast, settings), template)

    def encode(self, text: str) -> list[int]:
        """Special tokens written out in the text become their single ids; none is added."""
        return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens kept; bytes that are no UTF-8 become U+FFFD."""
        return self._fast.decode(ids, skip_special_tokens=False)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The model's own template over [{"role", "content"}, …], ending where the assistant is to speak.

        Raises ValueError if the template fails or reaches outside its sandbox.
        """
        special = {name: _content(self._settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")}
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, tools=None, **special)
        except Exception as error:  # whatever the template's code raises is the template's fault
            raise ValueError(f"{self._directory}: the chat template fails: {error}; fetch the model again") from None

    def save_pretrained(self, directory: str | Path) -> None:
        """Copy the tokenizer's files as they were published."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(directory) / name).write_bytes(content)


class _Sandbox(ImmutableSandboxedEnvironment):
    def unsafe_undefined(self, obj, attribute):
        """An attribute out of bounds ends the rendering; jinja2 alone would print it as nothing."""
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")


def _stop_ids(directory: Path, fast: FastTokenizer, settings: dict) -> frozenset[int]:
    generation = directory / "generation_config.json"
    ids = _read_json(generation).get("eos_token_id") if generation.exists() else None
    if ids is None:
        ids = fast.token_to_id(_content(settings.get("eos_token")))
    ids = frozenset([ids] if isinstance(ids, int) else ids or [])
    if not ids or not all(isinstance(i, int) and i >= 0 and fast.id_to_token(i) is not None for i in ids):
        raise ValueError(f"{directory}: stop ids {sorted(ids, key=str)} are not in the tokenizer; set eos_token_id in "
                         "generation_config.json, or eos_token in tokenizer_config.json")
    return ids


def _content(token: str | dict | None) -> str:
    """A special token is published as its text, or as a dict around it."""
    return token.get("content", "") if isinstance(token, dict) else token or ""


def _read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; fetch the model again") from None
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch the model again") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, not an object; fetch the model again")
    return value


def _raise_template_error(message: str):
    raise TemplateError(message)
