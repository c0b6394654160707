"""Text to token ids and back, the model's own chat template, and the ids that end an answer."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer as FastTokenizer

from chat_template import ChatTemplate
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

    stop_ids: every id that ends an answer. pad_id: fills the right end of rows; masks never ask for it.
    vocab_size: real entries; the model's head may have more rows, which must never be sampled.
    """

    def __init__(self, directory: Path):
        text, settings = (
            read_text(directory / "tokenizer.json"),
            read_json(directory / "tokenizer_config.json"),
        )
        with _told_as(f"{directory / 'tokenizer.json'} is damaged"):
            self._fast = FastTokenizer.from_str(text)
        self._fast.no_truncation()  # a published file may hold those of its training, which would silently shorten and pad prompts
        self._fast.no_padding()
        self._directory = directory
        self._special = {
            name: _content(settings.get(name)) for name in ("bos_token", "eos_token", "pad_token")
        }
        known = set(self._fast.get_vocab(with_added_tokens=True).values())
        self.stop_ids = self._read_stop_ids(known)
        self.vocab_size = 1 + max(known)
        pad_id = self._fast.token_to_id(self._special["pad_token"])
        self.pad_id = min(self.stop_ids) if pad_id is None else pad_id
        template_file = directory / "chat_template.jinja"
        template = (
            read_text(template_file) if template_file.exists() else settings.get("chat_template")
        )
        if not isinstance(template, str):
            raise ValueError(
                f"{directory} has no chat template; use an Instruct model, or add its chat_template.jinja"
            )
        with _told_as(f"{directory}: the chat template does not parse"):
            self._template = ChatTemplate(template)
        # Kept, because a resumed run reads them from a checkpoint that it will remove.
        self._files = {
            name: (directory / name).read_bytes() for name in FILES if (directory / name).is_file()
        }

    @classmethod
    def from_pretrained(cls, directory: str | Path) -> "Tokenizer":
        """Raises FileNotFoundError for a missing file, ValueError naming what is damaged or names an unknown token."""
        return cls(Path(directory))

    def encode(self, text: str) -> list[int]:
        """Special tokens written out in the text become their single ids; none is added."""
        with _told_as(f"{self._directory}: the tokenizer fails on {text!r:.100}"):
            return self._fast.encode(text, add_special_tokens=False).ids

    def decode(self, ids: list[int]) -> str:
        """The text of the ids, special tokens kept; bytes that are no UTF-8 become U+FFFD."""
        with _told_as(f"{self._directory}: the tokenizer fails on {ids!r:.100}"):
            return self._fast.decode(ids, skip_special_tokens=False)

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        """The model's own template over [{"role", "content"}, …], ending where the assistant is to speak.

        Raises ValueError if the template fails, reaches outside its sandbox or does not come to an end.
        """
        with _told_as(f"{self._directory}: the chat template fails"):
            return self._template.render(
                messages=messages, add_generation_prompt=True, tools=None, **self._special
            )

    def save_pretrained(self, directory: str | Path) -> None:
        """Copy the tokenizer's files as they were published."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(directory) / name).write_bytes(content)

    def _read_stop_ids(self, known: set[int]) -> frozenset[int]:
        generation = self._directory / "generation_config.json"
        ids = read_json(generation).get("eos_token_id") if generation.exists() else None
        if ids is None:
            ids = self._fast.token_to_id(self._special["eos_token"])
        ids = ids if isinstance(ids, list) else [ids]
        if not ids or not all(type(i) is int and i in known for i in ids):
            raise ValueError(
                f"{self._directory}: stop ids {ids!r:.100} are not in the tokenizer; set eos_token_id in "
                "generation_config.json, or eos_token in tokenizer_config.json"
            )
        return frozenset(ids)


def _content(token: str | dict | None) -> str:
    """A special token is published as its text, or as a dict around it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""


@contextmanager
def _told_as(fault: str) -> Iterator[None]:
    try:
        yield
    except (
        Exception
    ) as error:  # the tokenizers library raises bare Exception, a template's code whatever it likes
        raise ValueError(f"{fault} ({error}); mend it, or fetch the model again") from None
