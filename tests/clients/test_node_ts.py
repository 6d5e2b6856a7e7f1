"""The TypeScript client, built from the npm registry and run against the broker of the tests.

It is built in `.cache/node-ts`, outside of what is committed. Without `node` and `npm` there is nothing to run.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from clients.node import UsageEmitter
from schemas.decode import decode_event, reference_decode_event
from schemas.events import LifecycleKind, Usage
from schemas.settings import Settings
from tests.support.node_client import PARTITIONS, read_topic

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "clients" / "node-ts"
BUILT = ROOT / ".cache" / "node-ts"
SCHEMAS = ROOT / "schemas" / "exported"

pytestmark = pytest.mark.skipif(
    shutil.which("npm") is None or shutil.which("node") is None,
    reason="node and npm are not installed: the TypeScript client cannot be built",
)


def run(*command: str, cwd: Path = BUILT, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Its output, as text; a failure shows what it said."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert not check or result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def built() -> Path:
    """The directory with the compiled client; what did not change is neither fetched nor compiled again."""
    BUILT.mkdir(parents=True, exist_ok=True)
    files = {
        path.relative_to(SOURCE): path.read_bytes()
        for path in (*SOURCE.glob("*.json"), SOURCE / ".npmrc", *SOURCE.glob("src/*.ts"))
    }
    packages = digest(files[Path("package-lock.json")])
    everything = digest(*(b"%b\0%b" % (bytes(path), files[path]) for path in sorted(files)))
    installed, compiled = BUILT / "node_modules" / ".installed", BUILT / "dist" / ".compiled"
    if not compiled.exists() or compiled.read_text() != everything:
        for name in ("src", "dist"):
            shutil.rmtree(BUILT / name, ignore_errors=True)
        for path, content in files.items():
            (BUILT / path).parent.mkdir(exist_ok=True)
            (BUILT / path).write_bytes(content)
        if not installed.exists() or installed.read_text() != packages:
            run("npm", "ci", "--no-audit", "--no-fund")
            installed.write_text(packages)
        run("node", "node_modules/typescript/bin/tsc")
        compiled.write_text(everything)
    return BUILT


def digest(*parts: bytes) -> str:
    """One for all of them."""
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def test_the_lock_file_names_no_registry() -> None:
    """Packages come from whatever registry npm is set up with, and are known by their hashes."""
    lock = json.loads((SOURCE / "package-lock.json").read_text())
    packages = {name: package for name, package in lock["packages"].items() if name}
    assert len(packages) >= 5
    assert [name for name, package in packages.items() if "resolved" in package] == []
    assert [name for name, package in packages.items() if "integrity" not in package] == []


def test_the_example_emits_what_the_decoder_accepts_where_the_python_client_puts_it(
    settings: Settings, make_topic: Callable[[int], str], built: Path, tmp_path: Path
) -> None:
    """Every printed event is in the topic, whole, keyed by its scope, in the partition of its key."""
    topic = make_topic(PARTITIONS)
    result = run("node", "dist/example.js", settings.kafka, str(SCHEMAS), topic)
    printed = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(printed) == 8 * 4 + 3
    keys = {line["key"] for line in printed}
    assert keys == {f"room/r-{room}" for room in range(8)} | {"session/s-alone"}

    with UsageEmitter(settings.kafka, "n-17", tmp_path / "spool", topic=topic) as emitter:
        for key in keys:
            kind, _, name = key.partition("/")
            if kind == "room":
                emitter.room_joined(room_id=name, user_id="u-9")
            else:
                emitter.session_started(session_id=name, user_id="u-9")
        assert emitter.flush(60.0)

    messages = read_topic(settings.kafka, topic, len(printed) + len(keys))
    partitions: dict[str, dict[bytes, int | None]] = {"ts": {}, "python": {}}
    by_key: dict[str, list[str]] = {key: [] for key in keys}
    for message in messages:
        value, key_bytes = message.value(), message.key()
        assert value is not None
        assert key_bytes is not None
        event = decode_event(value)
        assert event == reference_decode_event(value)
        assert key_bytes == event.scope.encode()
        client = "ts" if event.source == "node/n-desktop" else "python"
        assert partitions[client].setdefault(key_bytes, message.partition()) == message.partition()
        if client == "ts":
            by_key[event.scope].append(value.decode())
    assert partitions["ts"] == partitions["python"]
    assert len(set(partitions["ts"].values())) > 1
    for key, values in by_key.items():
        assert values == [line["value"] for line in printed if line["key"] == key], "whole, and in order"
    for line in printed:
        assert partitions["ts"][line["key"].encode()] == line["partition"]

    events = [decode_event(line["value"].encode()) for line in printed]
    ids = [event.id for event in events]
    assert ids == sorted(set(ids))
    spoken = events[1]
    assert isinstance(spoken, Usage)
    assert (spoken.user_id, spoken.room_id, spoken.node_id, spoken.audio_ms) == (
        "u-1",
        "r-0",
        "n-desktop",
        1200,
    )
    assert (spoken.nmt_time_ms, spoken.tts_time_ms, spoken.gpu_active_time_ms) == (81, 200, 250)
    assert spoken.asr_time_ms >= 11
    alone = events[-2]
    assert isinstance(alone, Usage)
    assert (alone.scope, alone.asr_time_ms, alone.gpu_active_time_ms) == ("session/s-alone", 8, 0)
    kinds = [event.kind for event in events if not isinstance(event, Usage)]
    assert kinds[:3] == [LifecycleKind.JOINED, LifecycleKind.LEFT, LifecycleKind.CLOSED]
    assert kinds[-2:] == [LifecycleKind.SESSION_STARTED, LifecycleKind.SESSION_ENDED]


CHECKS = """
import { EventSchemas, InvalidEvent } from "./dist/events.js";
const schemas = new EventSchemas(process.argv[1]);
for (const line of process.argv.slice(2)) {
  try { schemas.check(JSON.parse(line)); console.log("accepted"); }
  catch (problem) {
    if (!(problem instanceof InvalidEvent)) throw problem;
    console.log(problem.message);
  }
}
"""


def test_what_the_decoder_refuses_is_refused_before_it_is_sent(built: Path) -> None:
    """The same events to both: the schema, and the one rule that it cannot say."""
    data = {
        "session_id": "s-1",
        "user_id": "u-1",
        "node_id": "n-1",
        "utterance_id": "ut-1",
        "asr_time_ms": 10,
        "nmt_time_ms": 0,
        "tts_time_ms": 0,
        "gpu_active_time_ms": 10,
    }
    event = {
        "specversion": "1.0",
        "id": "1",
        "source": "node/n-1",
        "type": "lingua.usage.utterance.v1",
        "time": "2026-01-01T00:00:00.000Z",
        "data": data,
    }
    cases = {
        "accepted": event,
        "room_id": event | {"data": data | {"room_id": "r/1"}},
        "asr_time_ms": event | {"data": data | {"asr_time_ms": 3_600_001}},
        "nmt_time_ms": event | {"data": data | {"nmt_time_ms": 0.5}},
        "gpu_active_time_ms": event | {"data": data | {"gpu_active_time_ms": 11}},
        "time": event | {"time": "yesterday"},
        "user_id": event | {"data": {name: value for name, value in data.items() if name != "user_id"}},
        "type": event | {"type": "lingua.unknown.v1"},
    }
    lines = [json.dumps(case) for case in cases.values()]
    told = run("node", "--input-type=module", "-e", CHECKS, str(SCHEMAS), *lines).stdout.splitlines()
    assert len(told) == len(cases)
    for name, line, words in zip(cases, lines, told, strict=True):
        assert name in words
        if name == "accepted":
            decode_event(line.encode())
        else:
            with pytest.raises(Exception, match=name):
                decode_event(line.encode())
