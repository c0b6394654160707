"""A model's chat template, which is code from whoever published the model: it may format, must come to an end, and no more."""

import json
import sys

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

MAX_CHARS, MAX_LINES = 10**7, 10**6  # that a template may write, and may run: some 50 a message


class ChatTemplate(ImmutableSandboxedEnvironment):
    """A sandbox and the one template in it, whose code may make both methods raise anything."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, text: str):
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        self.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent
        )
        self.globals["raise_exception"] = _raise_template_error
        self.template = self.from_string(text)

    def render(self, **variables) -> str:
        lines, text, before = 0, "", sys.gettrace()

        def count(frame, event, argument):
            nonlocal lines
            lines += event == "line"
            if lines > MAX_LINES:
                raise SecurityError(f"it runs for more than {MAX_LINES:,} lines")
            return count

        sys.settrace(
            count
        )  # whatever runs from here on: loops within loops end, wherever they stand
        try:
            for piece in self.template.generate(**variables):
                text += piece
                if len(text) > MAX_CHARS:
                    raise SecurityError(f"it writes more than {MAX_CHARS:,} characters")
        finally:
            sys.settrace(before)
        return text

    def call_binop(self, context, operator, left, right):
        """The operators by which few lines make a text or a number that fills the memory."""
        if operator == "**" or not all(
            isinstance(value, int) and abs(value) < 10**9 for value in (left, right)
        ):
            raise SecurityError(f"{operator} is only for small products")
        return left * right

    def unsafe_undefined(self, obj, attribute):
        """An attribute out of bounds ends the rendering; jinja2 alone would print it as nothing."""
        raise SecurityError(
            f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe"
        )


def _raise_template_error(message: str):
    raise TemplateError(message)
