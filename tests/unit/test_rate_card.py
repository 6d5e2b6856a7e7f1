"""Rate cards: which version prices an instant, and what is said about a wrong file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from schemas.rate_card import RateCard, RateVersion, load_rate_card
from schemas.settings import SettingsError

NEW_YEAR_MS = 1_767_225_600_000


def written(directory: Path, content: object, name: str = "card.json") -> Path:
    """A file with this content: bytes, text, or a document as JSON."""
    file = directory / name
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return file


def test_the_built_in_card() -> None:
    """One minute is charged per minute processed, and a node earns half, since 1970."""
    card = load_rate_card(None)
    assert card.versions == (RateVersion(0, asr=1000, nmt=1000, tts=1000, node_credit=500),)
    assert card.version_at(-1) is None
    assert card.version_at(0) is card.versions[0]


@pytest.mark.parametrize(
    ("time_ms", "name"),
    [
        (NEW_YEAR_MS - 1, None),
        (NEW_YEAR_MS, "2026-01-01T00:00:00.000Z"),
        (NEW_YEAR_MS + 3_599_999, "2026-01-01T00:00:00.000Z"),
        (NEW_YEAR_MS + 3_600_000, "2026-01-01T01:00:00.000Z"),
        (NEW_YEAR_MS + 10**15, "2026-01-01T01:00:00.000Z"),
    ],
)
def test_effective_from_is_inclusive(time_ms: int, name: str | None) -> None:
    """Just before, exactly at and just past; before the first version there is none."""
    card = RateCard([RateVersion(NEW_YEAR_MS + 3_600_000), RateVersion(NEW_YEAR_MS)])
    version = card.version_at(time_ms)
    assert (version.name if version else None) == name


RATES = {"asr": 0, "nmt": 2, "tts": 3, "node_credit": 100_000_000}
ENTRIES: list[dict[str, Any]] = [
    {"effective_from": "2026-01-01T02:00:00+01:00", **RATES},
    {"effective_from": "2026-01-01T00:00:00Z"},
]
EXPECTED = (
    RateVersion(NEW_YEAR_MS, 1000, 1000, 1000, 500),
    RateVersion(NEW_YEAR_MS + 3_600_000, 0, 2, 3, 10**8),
)

TOML = """
[[versions]]
effective_from = 2026-01-01T02:00:00+01:00
asr = 0
nmt = 2
tts = 3
node_credit = 100_000_000

[[versions]]
effective_from = "2026-01-01T00:00:00Z"
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("card.json", {"versions": ENTRIES}),
        ("card.json", ENTRIES),
        ("card.JSON", list(reversed(ENTRIES))),
        ("card", ENTRIES),
        ("card.txt", {"versions": ENTRIES}),
        ("card.toml", TOML),
        (
            "card.json",
            [
                {"effective_from": "2026-01-01T01:00:00Z", "rates": RATES},
                {"effective_from": "2026-01-01T00:00:00Z", "rates": {}},
            ],
        ),
    ],
)
def test_the_forms_of_a_file(tmp_path: Path, name: str, content: Any) -> None:
    """A list or an object, JSON or TOML, flat or nested rates, in any order."""
    card = load_rate_card(written(tmp_path, content, name))
    assert card.versions == EXPECTED
    assert [version.name for version in card.versions] == [
        "2026-01-01T00:00:00.000Z",
        "2026-01-01T01:00:00.000Z",
    ]


def version(**fields: Any) -> list[dict[str, Any]]:
    """A card with a good version and one with these fields."""
    return [{"effective_from": "2026-01-01T00:00:00Z"}, {"effective_from": "2027-01-01T00:00:00Z"} | fields]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "not JSON: expected a value at character 0"),
        ("{", "not JSON: expected a key in double quotes"),
        (b"\xff", "not JSON: invalid UTF-8 at byte 0"),
        (b"\xef\xbb\xbf[]", "not JSON: starts with a byte order mark"),
        ('[{"asr": 1, "asr": 2}]', "not JSON: the key 'asr' is repeated"),
        ('{"versions": [], "versions": []}', "not JSON: the key 'versions' is repeated"),
        ("[" * 100_000, "not JSON: expected a value"),
        ([], "has no version"),
        ({"versions": []}, "has no version"),
        ({}, "must be a list of versions"),
        ({"versions": {}}, "must be a list of versions"),
        ({"versions": ENTRIES, "currency": "us"}, "must be a list of versions"),
        (7, "must be a list of versions"),
        ([7], "version 1: must be an object"),
        ([{}], "version 1: effective_from: is missing"),
        (version(effective_from=5), "version 2: effective_from: must be a valid string, not 5"),
        (version(effective_from="2027-01-01"), "version 2: effective_from: '2027-01-01' is not YYYY-MM-DD"),
        (version(effective_from="2027-02-30T00:00:00Z"), "is a date that does not exist"),
        (version(effective_from="0001-01-01T00:00:00+01:00"), "is outside the years 1..9999"),
        (
            version(effective_from="2026-01-01T01:00:00.0001+01:00"),
            "version 2: effective_from: 2026-01-01T00:00",
        ),
        (version(asr=-1), "version 2: asr: must be greater than or equal to 0, not -1"),
        (version(nmt=100_000_001), "version 2: nmt: must be less than or equal to 100000000, not 100000001"),
        (version(tts=1.0), "version 2: tts: must be a valid integer, not 1.0"),
        (version(node_credit=True), "version 2: node_credit: must be a valid integer, not True"),
        (version(asr="1000"), "version 2: asr: must be a valid integer, not '1000'"),
        (version(asr=None), "version 2: asr: must be a valid integer, not None"),
        (
            '[{"effective_from": "2026-01-01T00:00:00Z", "asr": 1' + "0" * 5000 + "}]",
            "version 1: asr: must be less than or equal to 100000000, not 1000",
        ),
        (version(gpu=5), "version 2: gpu: is not a field of a version"),
        (version(rates=5), "version 2: rates: must be"),
        (version(rates={"gpu": 5}), "version 2: rates.gpu: is not a field of a version"),
        (version(rates={"asr": -5}), "version 2: rates.asr: must be greater than or equal to 0, not -5"),
        (version(rates={"asr": 5}, nmt=5), "version 2: nmt: must stand in `rates` or beside it"),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, content: Any, problem: str) -> None:
    """The line has the file, the version and the field."""
    file = written(tmp_path, content)
    with pytest.raises(SettingsError) as caught:
        load_rate_card(file)
    line = str(caught.value)
    assert line.startswith(f"rate card {file}: ")
    assert problem in line
    assert "\n" not in line
    assert len(line.removeprefix(f"rate card {file}")) < 200


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("versions = [", "not TOML: "),
        (b"\xff", "not UTF-8 text"),
        ("", "must be a list of versions"),
        ("[[versions]]\neffective_from = 2026-01-01", "version 1: effective_from: must be a valid string"),
        ("[[versions]]\neffective_from = 2026-01-01T00:00:00", "'2026-01-01T00:00:00' is not YYYY-MM-DD"),
        (
            '[[versions]]\neffective_from = "2026-01-01T00:00:00Z"\nasr = 1.0',
            "asr: must be a valid integer, not 1.0",
        ),
    ],
)
def test_a_wrong_toml_file_is_one_clear_line(tmp_path: Path, content: str | bytes, problem: str) -> None:
    """The same for TOML, where an instant without an offset is none."""
    file = written(tmp_path, content, "card.toml")
    with pytest.raises(SettingsError) as caught:
        load_rate_card(file)
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "problem"), [("missing.json", "No such file"), ("", "Is a directory")])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str, problem: str) -> None:
    """A missing file and a directory."""
    with pytest.raises(SettingsError, match=f"^rate card .*: {problem}"):
        load_rate_card(tmp_path / name)


def test_a_card_is_valid_by_construction() -> None:
    """Without a version, or with two that start together, there is no card."""
    with pytest.raises(ValueError, match="at least one"):
        RateCard([])
    with pytest.raises(ValueError, match="same time"):
        RateCard([RateVersion(5), RateVersion(5, asr=1)])
