"""Rate cards: what a millisecond costs, from when on.

A rate card is a JSON or TOML file: a list of versions, or an object whose `versions` is that list. A version
holds `effective_from` (RFC 3339, inclusive, unique, in any order) and the rates `asr`, `nmt`, `tts` and
`node_credit`, beside it or in an object `rates`: integers, service microseconds per millisecond, none
negative. The version in force at an event's `time` prices it; before the first there is none.
"""

from __future__ import annotations

import datetime
import tomllib
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

from schemas.rfc3339 import FIRST_MS, LAST_MS, format_rfc3339_ms, parse_rfc3339_ms
from schemas.settings import SettingsError, explain_value_error, one_line
from schemas.strict_json import NotJson, parse

MAX_RATE = 100_000_000
"""us per ms. With it the dearest event that is possible costs 1.08e15 us, far below 64 bits."""

DEFAULT_STAGE_RATE = 1000
DEFAULT_NODE_CREDIT_RATE = 500

_DEFAULT_FILE = Path(__file__).with_name("rate_cards") / "default.json"


@dataclass(frozen=True, slots=True)
class RateVersion:
    """The rates in force from `effective_from_ms` on (inclusive), in us per ms of processing."""

    effective_from_ms: int
    asr: int = DEFAULT_STAGE_RATE
    nmt: int = DEFAULT_STAGE_RATE
    tts: int = DEFAULT_STAGE_RATE
    node_credit: int = DEFAULT_NODE_CREDIT_RATE

    @property
    def name(self) -> str:
        """`effective_from` as RFC 3339 text with milliseconds and Z: what ledger lines call the version."""
        return format_rfc3339_ms(self.effective_from_ms)


class RateCard:
    """All versions, ascending by `effective_from_ms`.

    Raises ValueError when there is none, or when two take effect at the same time.
    """

    def __init__(self, versions: Iterable[RateVersion]) -> None:
        self.versions = tuple(sorted(versions, key=lambda version: version.effective_from_ms))
        self._starts = [version.effective_from_ms for version in self.versions]
        if not self._starts:
            raise ValueError("a rate card needs at least one version")
        if len(set(self._starts)) < len(self._starts):
            raise ValueError("two versions take effect at the same time")

    def version_at(self, time_ms: int) -> RateVersion | None:
        """The version in force at this instant (ms since the Unix epoch); None before the first."""
        index = bisect_right(self._starts, time_ms)
        return self.versions[index - 1] if index else None

    def __repr__(self) -> str:
        return f"RateCard({list(self.versions)!r})"


def _instant_text(value: object) -> object:
    """TOML has instants of its own; JSON writes them as text."""
    if isinstance(value, datetime.datetime):
        return value.isoformat()
    return value


Rate = Annotated[int, Field(strict=True, ge=0, le=MAX_RATE)]


class RateFields(BaseModel):
    """The rates of a version, service microseconds per millisecond."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    asr: Rate = Field(default=DEFAULT_STAGE_RATE, description="us per ms of speech recognition")
    nmt: Rate = Field(default=DEFAULT_STAGE_RATE, description="us per ms of translation")
    tts: Rate = Field(default=DEFAULT_STAGE_RATE, description="us per ms of speech synthesis")
    node_credit: Rate = Field(
        default=DEFAULT_NODE_CREDIT_RATE, description="us per ms of active GPU, to the node"
    )


class RateVersionEntry(RateFields):
    """One version as it stands in a file."""

    effective_from: Annotated[str, BeforeValidator(_instant_text), Field(strict=True)] = Field(
        description="RFC 3339, inclusive; unique in the card"
    )
    rates: RateFields | None = Field(default=None, description="the same rates, if they stand in an object")


class RateCardFile(BaseModel):
    """A rate card as it stands in a file (a bare list of versions is accepted too)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    versions: list[RateVersionEntry] = Field(min_length=1)


def load_rate_card(path: Path | None) -> RateCard:
    """Read and check a rate card; None is the built-in one, in force since 1970-01-01T00:00:00Z.

    Raises SettingsError, one line with the file, the version (counted from 1) and the field.
    """
    file = _DEFAULT_FILE if path is None else path
    document = _read(file)
    entries = (
        document["versions"] if isinstance(document, dict) and set(document) == {"versions"} else document
    )
    if not isinstance(entries, list):
        _refuse(file, "must be a list of versions, or an object with `versions` and nothing else")
    if not entries:
        _refuse(file, "has no version")
    versions = [_version(file, number, entry) for number, entry in enumerate(entries, start=1)]
    first_with: dict[int, int] = {}
    for number, version in enumerate(versions, start=1):
        earlier = first_with.setdefault(version.effective_from_ms, number)
        if earlier != number:
            _refuse(
                file, f"version {number}: effective_from: {version.name} is that of version {earlier} too"
            )
    return RateCard(versions)


def _refuse(file: Path, what: str) -> NoReturn:
    raise SettingsError(f"rate card {file}: {what}") from None


def _read(file: Path) -> object:
    try:
        content = file.read_bytes()
    except OSError as error:
        _refuse(file, error.strerror or str(error))
    if file.suffix.lower() == ".toml":
        try:
            return tomllib.loads(content.decode("utf-8"))
        except UnicodeDecodeError:
            _refuse(file, "not UTF-8 text")
        except (ValueError, RecursionError) as error:
            _refuse(file, f"not TOML: {one_line(str(error))}")
    try:
        return parse(content, unique_keys=True)
    except NotJson as error:
        _refuse(file, f"not JSON: {error}")


def _version(file: Path, number: int, entry: object) -> RateVersion:
    where = f"version {number}"
    if not isinstance(entry, dict):
        _refuse(file, f"{where}: must be an object")
    try:
        model = RateVersionEntry.model_validate(entry)
    except ValidationError as error:
        _refuse(file, f"{where}: {_explain(error.errors(include_url=False)[0])}")
    rates = model.rates or model
    beside = sorted(RateFields.model_fields.keys() & entry.keys())
    if model.rates is not None and beside:
        _refuse(file, f"{where}: {beside[0]}: must stand in `rates` or beside it, not in both places")
    try:
        effective_from_ms = parse_rfc3339_ms(model.effective_from)
    except ValueError as error:
        _refuse(file, f"{where}: effective_from: {_shown(model.effective_from)} {error}")
    if not FIRST_MS <= effective_from_ms <= LAST_MS:
        _refuse(file, f"{where}: effective_from: {_shown(model.effective_from)} is outside the years 1..9999")
    return RateVersion(effective_from_ms, rates.asr, rates.nmt, rates.tts, rates.node_credit)


def _explain(error: ErrorDetails) -> str:
    field = ".".join(str(part) for part in error["loc"])
    if error["type"] == "missing":
        return f"{field}: is missing"
    if error["type"] == "extra_forbidden":
        return f"{field}: is not a field of a version"
    return f"{field}: {explain_value_error(error)}, not {_shown(error['input'])}"


def _shown(value: Any) -> str:
    if isinstance(value, (list, dict)):
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
