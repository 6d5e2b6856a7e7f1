"""The README tells the truth: its commands do what it shows, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.cli import app
from tests.support.commands import clean_environment

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])

COMMANDS = {command.name or getattr(command.callback, "__name__", "") for command in app.registered_commands}
COMMANDS |= {
    group.name or (group.typer_instance and group.typer_instance.info.name) or ""
    for group in app.registered_groups
}


def console_blocks(text: str) -> list[str]:
    """The blocks that show commands with their output."""
    return re.findall(r"^```console\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def steps(block: str) -> Iterator[tuple[str, str]]:
    """Each command of a block, a here-document included, and the output that is shown for it."""
    lines = block.splitlines(keepends=True)
    while lines:
        assert lines[0].startswith("$ "), f"not a command: {lines[0]}"
        command = lines.pop(0).removeprefix("$ ")
        if marker := re.search(r"<<'(\w+)'$", command.rstrip()):
            while not command.endswith(f"\n{marker[1]}\n"):
                command += lines.pop(0)
        output = ""
        while lines and not lines[0].startswith("$ "):
            output += lines.pop(0)
        yield command, output


def test_the_commands_print_what_is_shown(tmp_path: Path) -> None:
    """Every command of the README that shows its output, one after the other, in one directory."""
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(Path(sys.executable).parent)
    blocks = console_blocks(README)
    assert len(blocks) == 2
    for command, shown in [step for block in blocks for step in steps(block)]:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=tmp_path,
            env=clean_environment(),
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, shown, ""), command


def test_the_rate_card_that_is_shown_is_one(tmp_path: Path) -> None:
    """`settle` takes it; and the shown bill is priced by its first version, as without it."""
    [card] = re.findall(r"^```json\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    (tmp_path / "card.json").write_text(card)
    events = next(steps(console_blocks(README)[0]))[0].split("\n", 1)[1].removesuffix("END\n")
    bills = [
        subprocess.run(
            [sys.executable, "-m", "app", "settle", "-"],
            input=events.encode(),
            env=clean_environment(**settings),
            capture_output=True,
            timeout=60,
            check=True,
        ).stdout
        for settings in ({}, {"rate_card": str(tmp_path / "card.json")})
    ]
    assert bills[0] == bills[1] != b""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link and picture of the documents exists, and so does the heading that it names."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if target.startswith(("http://", "https://")):
            continue
        path, _, heading = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), f"{page.name}: {target}"
        if heading:
            headings = re.findall(r"^#+ (.*)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {anchor(text) for text in headings}, f"{page.name}: {target}"


def anchor(heading: str) -> str:
    """The name that a code-hosting page gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_only_commands_that_exist_are_named(page: Path) -> None:
    """`metering ...` and `make ...` in the documents are commands, or on the list of what is planned."""
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`(?:\.venv/bin/)?metering ([a-z][a-z-]*)", text))
    named |= set(re.findall(r"^(?:\$ )?\.venv/bin/metering ([a-z][a-z-]*)", text, re.MULTILINE))
    assert named <= COMMANDS
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE)) <= targets
