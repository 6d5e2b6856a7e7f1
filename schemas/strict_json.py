"""JSON as RFC 8259 has it, and nothing more: the definition of what `not_json` means.

Its laws, where the standard library's parser (and every fast one) differs from them:

- The text is UTF-8 without a byte order mark, and no string holds a lone surrogate, written out or escaped.
- `NaN`, `Infinity`, control characters in strings, leading zeros and trailing commas are refused.
- Of a repeated key the last counts, at every level (or it is refused, for files that people write).
- A number without fraction and exponent is an int (`-0` is 0), any other is a float. An integer of more than
  `MAX_INTEGER_DIGITS` digits becomes one of that many: it is out of every range, and costs no quadratic time.
- Nesting is limited by memory alone: the scanner keeps its own stack.
"""

from __future__ import annotations

import re

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

MAX_INTEGER_DIGITS = 40
_HUGE: int = 10 ** (MAX_INTEGER_DIGITS - 1)

_SPACE = re.compile(r"[ \t\n\r]*")
_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))(\.[0-9]+)?([eE][+-]?[0-9]+)?")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_HEX4 = re.compile(r"[0-9A-Fa-f]{4}")
_ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_LITERALS: dict[str, tuple[str, Json]] = {
    "t": ("true", True),
    "f": ("false", False),
    "n": ("null", None),
}


class NotJson(ValueError):
    """The text is not JSON; the message says what is wrong and at which character, counted from 0."""


def parse(value: bytes, *, unique_keys: bool = False) -> Json:
    """The one JSON value that these bytes are. Raises NotJson.

    With `unique_keys` a repeated key is refused instead of replacing the earlier one.
    """
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJson(f"invalid UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise NotJson("starts with a byte order mark")
    return _Scanner(text, unique_keys).document()


class _Scanner:
    """Walks the text once. A container under construction lies on a stack, with the key that waits in it."""

    def __init__(self, text: str, unique_keys: bool) -> None:
        self._text = text
        self._at = 0
        self._unique_keys = unique_keys

    def document(self) -> Json:
        stack: list[tuple[list[Json] | dict[str, Json], str]] = []
        while True:
            value, opened = self._value()
            if opened is not None:
                stack.append(opened)
                continue
            while stack:
                container, key = stack.pop()
                if isinstance(container, list):
                    container.append(value)
                    more = self._comma_or("]")
                else:
                    container[key] = value
                    more = self._comma_or("}")
                if more:
                    if isinstance(container, dict):
                        key = self._key(container)
                    stack.append((container, key))
                    break
                value = container
            else:
                return self._end(value)

    def _value(self) -> tuple[Json, tuple[list[Json] | dict[str, Json], str] | None]:
        """A complete value; or, when a container opens that is not empty, what to push for it."""
        character = self._peek()
        if character == "{":
            self._at += 1
            members: dict[str, Json] = {}
            if self._peek() == "}":
                self._at += 1
                return members, None
            return None, (members, self._key(members))
        if character == "[":
            self._at += 1
            items: list[Json] = []
            if self._peek() == "]":
                self._at += 1
                return items, None
            return None, (items, "")
        return self._scalar(character), None

    def _scalar(self, character: str) -> Json:
        if character == '"':
            return self._string()
        if character in _LITERALS:
            word, value = _LITERALS[character]
            if not self._text.startswith(word, self._at):
                raise self._wrong("a value")
            self._at += len(word)
            return value
        match = _NUMBER.match(self._text, self._at)
        if match is None:
            raise self._wrong("a value")
        self._at = match.end()
        integer, fraction, exponent = match.groups()
        if fraction is not None or exponent is not None:
            return float(match.group())
        if len(integer) > MAX_INTEGER_DIGITS:  # Either sign: one digit less for a negative one is as huge.
            return -_HUGE if integer[0] == "-" else _HUGE
        return int(integer)

    def _key(self, members: dict[str, Json]) -> str:
        if self._peek() != '"':
            raise self._wrong("a key in double quotes")
        key = self._string()
        if self._unique_keys and key in members:
            raise NotJson(f"the key {key[:40]!r} is repeated at character {self._at}")
        if self._peek() != ":":
            raise self._wrong("':'")
        self._at += 1
        return key

    def _string(self) -> str:
        start = self._at
        self._at += 1
        parts: list[str] = []
        while True:
            plain = _PLAIN.match(self._text, self._at)
            assert plain is not None  # It matches the empty string too.
            self._at = plain.end()
            end = self._text[self._at : self._at + 1]
            if end == '"':
                self._at += 1
                return "".join(parts) + plain.group() if parts else plain.group()
            parts.append(plain.group())
            if end != "\\":
                raise self._wrong("the end of a string") if end == "" else self._wrong("no control character")
            parts.append(self._escape(start))

    def _escape(self, start: int) -> str:
        letter = self._text[self._at + 1 : self._at + 2]
        if letter in _ESCAPES:
            self._at += 2
            return _ESCAPES[letter]
        unit = self._code_unit()
        if 0xD800 <= unit <= 0xDBFF:
            low = self._code_unit() if self._text.startswith("\\u", self._at) else 0
            if not 0xDC00 <= low <= 0xDFFF:
                raise NotJson(f"lone surrogate in the string at character {start}")
            return chr(0x10000 + ((unit - 0xD800) << 10) + (low - 0xDC00))
        if 0xDC00 <= unit <= 0xDFFF:
            raise NotJson(f"lone surrogate in the string at character {start}")
        return chr(unit)

    def _code_unit(self) -> int:
        digits = _HEX4.match(self._text, self._at + 2)
        if self._text[self._at + 1 : self._at + 2] != "u" or digits is None:
            raise self._wrong("an escape that exists")
        self._at = digits.end()
        return int(digits.group(), 16)

    def _comma_or(self, close: str) -> bool:
        character = self._peek()
        if character not in (",", close):
            raise self._wrong(f"',' or '{close}'")
        self._at += 1
        return character == ","

    def _end(self, value: Json) -> Json:
        if self._peek() != "":
            raise self._wrong("the end")
        return value

    def _peek(self) -> str:
        character = self._text[self._at : self._at + 1]
        if character not in " \t\n\r":
            return character
        space = _SPACE.match(self._text, self._at)
        assert space is not None  # It matches the empty string too.
        self._at = space.end()
        return self._text[self._at : self._at + 1]

    def _wrong(self, expected: str) -> NotJson:
        return NotJson(f"expected {expected} at character {self._at}")
