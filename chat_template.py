"""A model's chat template, which is code from whoever published the model: it may format, must come to an end, and no more."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_CHARS, MAX_LINES = 10**7, 10**6  # that a template may write, and may run: some 50 a message


class ChatTemplate:
    """Both methods raise ValueError, which says what the template does wrong."""

    def __init__(self, text: str):
        environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _raise_template_error
        try:
            self._template = environment.from_string(text)
        except Exception as error:  # too deep for the parser, too many loops for Python, …
            raise ValueError(f"does not parse ({error})") from None

    def render(self, **variables) -> str:
        text = ""
        try:
            with _limited_lines():
                for piece in self._template.generate(**variables):
                    text += piece
                    if len(text) > MAX_CHARS:
                        raise SecurityError(f"it writes more than {MAX_CHARS:,} characters")
        except Exception as error:  # whatever the template's code raises is the template's fault
            raise ValueError(f"fails: {error}") from None
        return text


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context, operator, left, right):
        """The operators by which few lines make a text or a number that fills the memory."""
        if operator == "**" or not all(isinstance(value, int) and abs(value) < 10**9 for value in (left, right)):
            raise SecurityError(f"{operator} is only for small products")
        return left * right

    def unsafe_undefined(self, obj, attribute):
        """An attribute out of bounds ends the rendering; jinja2 alone would print it as nothing."""
        raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")


@contextmanager
def _limited_lines() -> Iterator[None]:
    """Within, Python runs at most MAX_LINES lines: loops within loops end, whatever they do and wherever they stand."""
    lines = 0

    def count(frame, event, argument):
        nonlocal lines
        lines += event == "line"
        if lines > MAX_LINES:
            raise SecurityError(f"it runs for more than {MAX_LINES:,} lines")
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        yield
    finally:
        sys.settrace(before)


def _raise_template_error(message: str):
    raise TemplateError(message)
