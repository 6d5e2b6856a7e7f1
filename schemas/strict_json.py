"""JSON as RFC 8259 has it, and nothing more: the definition of what `not_json` means.

Its laws, where the standard library's parser (and every fast one) differs from them:

- The text is UTF-8 without a byte order mark, and no string holds a lone surrogate, written out or escaped.
- `NaN`, `Infinity`, control characters in strings, leading zeros and trailing commas are refused.
- Of a repeated key the last counts, at every level (or it is refused, for files that people write).
- A number without fraction and exponent is an int (`-0` is 0), any other is a float. An integer of more than
  `MAX_INTEGER_DIGITS` digits is one of at least that many: it is out of every range, and costs no quadratic time.
- Nesting is limited by memory alone: the scanner keeps its own stack. What lies more than `MAX_BUILT_DEPTH` deep,
  where nobody looks, is read like everything else, and left out.

`scan` is the definition. `parse` has the same answer from the standard library's parser, wherever that one keeps
the laws; what nests too deep for it is scanned. Whoever sends junk must not buy much work with few bytes: so no
text is looked at again and again, and nothing is done character by character in Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from typing import NoReturn

Json = str | int | float | bool | None | list["Json"] | dict[str, "Json"]

MAX_BUILT_DEPTH = 1_000
MAX_INTEGER_DIGITS = 40
_HUGE: int = 10 ** (MAX_INTEGER_DIGITS - 1)

SPACE = " \t\n\r"
_ESCAPE = (
    r'\\(?:["\\/bfnrt]|u(?![dD][89a-fA-F])[0-9a-fA-F]{4}'
    r"|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2})"
)
_STRING = rf'"(?:[^"\\\x00-\x1f]++|{_ESCAPE})*+"'
_KEY = rf"[{SPACE}]*+{_STRING}[{SPACE}]*+:"
_OPENING = rf"\[|\{{{_KEY}"
_TOKEN = re.compile(
    rf"[{SPACE}]*+(?:("
    rf"(?:{_OPENING})(?:[{SPACE}]*+(?:{_OPENING}))*+"
    rf"|[\]}}](?:[{SPACE}]*+[\]}}])*+"
    rf"|\{{|,(?:{_KEY})?+"
    rf"|{_STRING}"
    r"|-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?+(?:[eE][+-]?[0-9]++)?+"
    r"|true|false|null"
    r"|\Z)|[\s\S]+)"
)
"""One token as its group: brackets that open (`{` with its first key and colon), brackets that close, `{` without a
key, a comma with or without a key, or a scalar. What is none is the last match, up to the end of the text, with an
empty group. Every quantifier is possessive, so that no text is looked at again and again."""
_openings = re.compile(_OPENING).findall
_without_strings: Callable[[str, str], str] = re.compile(_STRING).sub

_NO_LONE_SURROGATE = re.compile(
    r"(?:[^\\]++|\\(?:[^u]|u(?![dD][89a-fA-F])|u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F]))*+"
)
_CLOSING = ("]", "}")
_BRACKETS = str.maketrans("", "", SPACE + ":")
_OPENING_OF = str.maketrans("]}", "[{", SPACE)
_NO_VALUE = ("", ",", *_CLOSING)
_LITERALS: dict[str, Json] = {"true": True, "false": False, "null": None}


class NotJson(ValueError):
    """The text is not JSON; the message says what is wrong and at which character, counted from 0."""


def parse(value: bytes, *, unique_keys: bool = False) -> Json:
    """The one JSON value that these bytes are. Raises NotJson.

    With `unique_keys` a repeated key is refused instead of replacing the earlier one.
    """
    text = _text(value)
    if unique_keys:
        return _Scanner(text, unique_keys=True).document()
    try:
        document: Json = _decode(text)
    except RecursionError:
        return _Scanner(text, unique_keys=False).document()
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg[:1].lower()}{error.msg[1:]} at character {error.pos}") from None
    except NotJson:
        raise
    except ValueError:
        # An integer with more digits than the interpreter converts.
        return _Scanner(text, unique_keys=False).document()
    if "\\u" in text:
        plain = _NO_LONE_SURROGATE.match(text)
        if plain is not None and plain.end() < len(text):
            raise NotJson(f"lone surrogate at character {plain.end()}")
    return document


def scan(value: bytes) -> Json:
    """The same as `parse` by the definition itself. Raises NotJson."""
    return _Scanner(_text(value), unique_keys=False).document()


def _text(value: bytes) -> str:
    try:
        text = value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise NotJson(f"invalid UTF-8 at byte {error.start}") from None
    if text.startswith("\ufeff"):
        raise NotJson("starts with a byte order mark")
    return text


def _refuse_constant(name: str) -> NoReturn:
    raise NotJson(f"{name} is not JSON")


_decode = json.JSONDecoder(parse_constant=_refuse_constant).decode


class _Scanner:
    """Walks the tokens once. The open brackets lie on a stack, and beside them the containers that are built."""

    def __init__(self, text: str, *, unique_keys: bool) -> None:
        self._text = text.rstrip(SPACE)
        self._tokens: list[str] = _TOKEN.findall(self._text)
        self._unique_keys = unique_keys
        self._root: list[Json] = []
        self._open = bytearray()
        # One more than there are open brackets, or fewer where the innermost ones are not built.
        self._built: list[list[Json] | dict[str, Json]] = [self._root]
        self._key = ""

    def document(self) -> Json:
        at = 0
        while True:
            # A value, or what opens one.
            token = self._tokens[at]
            complete = True
            if token == "{":
                self._open_without_key(at)
            elif token[:1] in ("[", "{"):
                complete = self._open_all(at)
            else:
                self._put(self._scalar(at))
            at += 1
            if not complete:
                continue
            # What closes, and then a comma or the end.
            while self._tokens[at][:1] in _CLOSING:
                self._close(at)
                at += 1
            if not self._open:
                return self._end(at)
            self._comma(at)
            at += 1

    def _put(self, value: Json) -> None:
        if len(self._built) <= len(self._open):
            return
        container = self._built[-1]
        if isinstance(container, list):
            container.append(value)
        else:
            container[self._key] = value

    def _open_all(self, at: int) -> bool:
        """Open what the token opens. True if the innermost is an empty list: its bracket is what comes next."""
        token = self._tokens[at]
        if token == "[" and len(self._open) >= MAX_BUILT_DEPTH:
            self._open += b"["
            return self._tokens[at + 1][:1] == "]"
        brackets = _without_strings("", token).translate(_BRACKETS).encode()
        buildable = MAX_BUILT_DEPTH - len(self._open)
        if buildable > 0:
            for opening in _openings(token)[:buildable]:
                container: list[Json] | dict[str, Json] = [] if opening == "[" else {}
                self._put(container)
                self._open += opening[:1].encode()
                self._built.append(container)
                if opening != "[":
                    self._take_key(opening, at)
            brackets = brackets[buildable:]
        self._open += brackets
        return self._open.endswith(b"[") and self._tokens[at + 1][:1] == "]"

    def _open_without_key(self, at: int) -> None:
        if self._tokens[at + 1][:1] != "}":
            raise self._wrong("a key in double quotes and ':'", at, past=1)
        self._put({})
        self._open += b"{"

    def _close(self, at: int) -> None:
        opening = self._tokens[at][::-1].translate(_OPENING_OF).encode()
        if not self._open.endswith(opening):
            raise self._wrong("other brackets", at)
        del self._open[len(self._open) - len(opening) :]
        del self._built[len(self._open) + 1 :]

    def _comma(self, at: int) -> None:
        token = self._tokens[at]
        if token[:1] != ",":
            raise self._wrong("',' or a closing bracket", at)
        if self._open.endswith(b"["):
            if token != ",":
                raise self._wrong("',' and a value, not a key", at)
        elif token == ",":
            raise self._wrong("a key in double quotes and ':'", at, past=1)
        elif len(self._built) > len(self._open):
            self._take_key(token, at)

    def _end(self, at: int) -> Json:
        # The last token is the empty one at the end of the text.
        if at != len(self._tokens) - 1:
            raise self._wrong("the end", at)
        return self._root[0]

    def _take_key(self, text: str, at: int) -> None:
        """Take the key, after one character and before the colon, as that of the next value."""
        self._key = self._string(text[1:-1].strip(SPACE))
        if self._unique_keys and self._key in self._built[-1]:
            raise NotJson(f"the key {self._key[:40]!r} is repeated at character {self._character(at)}")

    def _scalar(self, at: int) -> Json:
        token = self._tokens[at]
        if token[:1] == '"':
            return self._string(token)
        if token in _LITERALS:
            return _LITERALS[token]
        if token[:1] in _NO_VALUE:
            raise self._wrong("a value", at)
        if len(self._built) <= len(self._open):
            return None  # It is not kept.
        if "." in token or "e" in token or "E" in token:
            return float(token)
        if len(token) > MAX_INTEGER_DIGITS:  # Either sign: one digit less for a negative one is as huge.
            return -_HUGE if token[0] == "-" else _HUGE
        return int(token)

    @staticmethod
    def _string(token: str) -> str:
        if "\\" not in token:
            return token[1:-1]
        # The escapes are known to be right: this only replaces them.
        text: str = json.loads(token)
        return text

    def _wrong(self, expected: str, at: int, past: int = 0) -> NotJson:
        return NotJson(f"expected {expected} at character {self._character(at) + past}")

    def _character(self, at: int) -> int:
        """Where the token begins; found again, since only an error asks for it."""
        match = next(islice(_TOKEN.finditer(self._text), at, None))
        return match.end() - len(match.group().lstrip(SPACE))
