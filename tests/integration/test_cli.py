"""The command line without servers: exact outputs, and one clear line for whatever goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import clean_environment, metering, one_line

NOBODY = "127.0.0.1:1"
"""No server listens on this port."""

ROOM = b"""\
{"specversion":"1.0","id":"j1","source":"s","type":"lingua.room.joined.v1","time":"2026-01-01T00:00:00Z",\
"data":{"room_id":"r-1","user_id":"u-1"}}
{"specversion":"1.0","id":"j2","source":"s","type":"lingua.room.joined.v1","time":"2026-01-01T00:00:00Z",\
"data":{"room_id":"r-1","user_id":"u-2"}}

{"specversion":"1.0","id":"x1","source":"node/n-1","type":"lingua.usage.utterance.v1",\
"time":"2026-01-01T00:00:59.999Z","data":{"session_id":"s-1","room_id":"r-1","user_id":"u-1","node_id":"n-1",\
"utterance_id":"t-1","asr_time_ms":1,"nmt_time_ms":2,"tts_time_ms":4,"gpu_active_time_ms":6}}
not json
{"specversion":"2.0"}
"""


def test_settle_prints_every_account_of_every_cell_sorted() -> None:
    """Compact JSON lines in the documented order; refused lines go to stderr; the exit code is 0."""
    done = metering("settle", "-", stdin=ROOM)
    assert done.returncode == 0
    cell = "room/r-1@1767225600000"
    assert done.stdout.decode().splitlines() == [
        f'{{"account":"node/n-1","cell_id":"{cell}","amount_us":3000,"events":1}}',
        f'{{"account":"platform/revenue","cell_id":"{cell}","amount_us":4000,"events":1}}',
        f'{{"account":"user/u-1","cell_id":"{cell}","amount_us":-3500,"events":1}}',
        f'{{"account":"user/u-2","cell_id":"{cell}","amount_us":-3500,"events":1}}',
    ]
    assert done.stderr.decode().splitlines() == [
        '{"line":5,"reason":"not_json"}',
        '{"line":6,"reason":"unsupported_version"}',
    ]


def test_settle_reads_a_file_like_standard_input(tmp_path: Path) -> None:
    """FILE and - give the same."""
    file = tmp_path / "events.jsonl"
    file.write_bytes(ROOM)
    assert metering("settle", str(file)).stdout == metering("settle", "-", stdin=ROOM).stdout


def test_settle_uses_the_rate_card_that_a_setting_names(tmp_path: Path) -> None:
    """METERING_RATE_CARD prices the events; usage before its first version is refused."""
    card = tmp_path / "card.json"
    card.write_text(
        json.dumps(
            [{"effective_from": "2026-01-01T00:01:00Z", "asr": 1, "nmt": 1, "tts": 1, "node_credit": 1}]
        )
    )
    environment = clean_environment(rate_card=str(card))
    done = metering("settle", "-", stdin=ROOM, environment=environment)
    assert (done.returncode, done.stdout) == (0, b"")
    assert b'{"line":4,"reason":"no_rate"}' in done.stderr


def test_generate_is_reproducible_and_feeds_settle() -> None:
    """The same seed and start give the same bytes, as many lines as asked for, and a bill that sums to zero."""
    options = ("--seed", "7", "--events", "500", "--start", "2026-01-01T00:00:00Z", "--duplicates", "0.1")
    first = metering("generate", *options)
    assert first.returncode == 0
    assert first.stdout.count(b"\n") == 550
    assert first.stdout == metering("generate", *options).stdout
    settled = metering("settle", "-", stdin=first.stdout)
    assert settled.stderr == b""
    assert sum(json.loads(line)["amount_us"] for line in settled.stdout.splitlines()) == 0


def test_a_plain_generate_ends_now() -> None:
    """Without --start the event times lie in the 15 minutes before now, so that live flows take them."""
    lines = metering("generate", "--events", "300").stdout.splitlines()
    times = sorted(json.loads(line)["time"] for line in lines)
    now_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    earliest = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(time.time() - 15 * 60 - 60))
    assert earliest <= times[0] <= times[-1] <= now_text + "Z"


def test_meetings_become_rooms(tmp_path: Path) -> None:
    """--rttm makes one room per meeting, staggered as asked, written to --out."""
    rttm = tmp_path / "two.rttm"
    rttm.write_text(
        "SPEAKER m1 1 0.5 2.0 <NA> <NA> anna <NA> <NA>\nSPEAKER m2 1 0.0 1.0 <NA> <NA> ben <NA> <NA>\n"
    )
    out = tmp_path / "events.jsonl"
    options = ("--start", "2026-01-01T00:00:00Z", "--stagger", "90", "--out", str(out))
    done = metering("generate", "--rttm", str(rttm), *options)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    events = [json.loads(line) for line in out.read_bytes().splitlines()]
    assert [(event["type"].split(".")[-2], event["subject"], event["time"][11:]) for event in events] == [
        ("joined", "room/m1", "00:00:00.000Z"),
        ("utterance", "room/m1", "00:00:02.500Z"),
        ("left", "room/m1", "00:00:03.500Z"),
        ("closed", "room/m1", "00:00:03.500Z"),
        ("joined", "room/m2", "00:01:30.000Z"),
        ("utterance", "room/m2", "00:01:31.000Z"),
        ("left", "room/m2", "00:01:32.000Z"),
        ("closed", "room/m2", "00:01:32.000Z"),
    ]


def test_output_into_a_closed_pipe_is_no_error_message() -> None:
    """`metering generate | head -1` ends early and says nothing on stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "app", "generate", "--events", "20000"],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline().startswith(b"{")
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(30) == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("settle", "nowhere.jsonl"), "metering: nowhere.jsonl: No such file or directory"),
        (("emit", "nowhere.jsonl"), "metering: nowhere.jsonl: No such file or directory"),
        (("generate", "--rttm", "nowhere.rttm"), "metering: nowhere.rttm: No such file or directory"),
        (("generate", "--out", "nowhere/x.jsonl"), "metering: nowhere/x.jsonl: No such file or directory"),
        (
            ("generate", "--start", "yesterday"),
            "metering: --start 'yesterday' is not YYYY-MM-DDTHH:MM:SS[.digits](Z|+HH:MM|-HH:MM)",
        ),
        (
            (
                "generate",
                "--events",
                "3",
                "--sessions",
                "9",
                "--rooms",
                "0",
                "--start",
                "2026-01-01T00:00:00Z",
            ),
            "metering: 3 events do not hold 9 sessions and 0 rooms, whose comings and goings alone are",
        ),
        (
            ("balance", "anna"),
            "metering: 'anna' is no account: it is user/<id>, node/<id> or platform/<name>",
        ),
        (("bill", "r-9"), "metering: 'r-9' is no scope: it is room/<id> or session/<id>"),
        (("explain", "user/u-1"), "metering: which line of user/u-1? user/u-1#1 is its first"),
        (("explain", "user/u-1", "x"), "metering: 'x' is no number of a ledger line"),
        (("explain", "user/u-1#0"), "metering: '0' is no number of a ledger line"),
        (("explain", "anna/1"), "metering: 'anna/1' is nothing that can be explained"),
        (
            ("explain", "room/r@61000"),
            "metering: 61000 is no start of a window: the one that holds it starts",
        ),
        (("explain", "--cell", "room/r"), "metering: 'room/r' is no cell"),
        (("explain", "--utterance", "u", "--scope", "r"), "metering: 'r' is no scope"),
        (("explain",), "metering: explain one thing"),
        (("explain", "u-1", "--source", "s"), "metering: explain one thing"),
        (("explain", "--id", "s"), "metering: explain one thing"),
        (("topup", "user/u-1", "ten"), "metering: 'ten' is no number of minutes"),
        (("topup", "user/u-1", "NaN"), "metering: 'NaN' minutes are no amount of a single command"),
        (("topup", "user/u-1", "1e99"), "metering: '1e99' minutes are no amount of a single command"),
        (
            ("topup", "user/u-1", "0.00000001"),
            "metering: '0.00000001' minutes are not a whole number of microseconds",
        ),
        (("topup", "user/u-1", "0"), "metering: this top-up would be refused: out_of_range"),
        (("topup", "user/u 1", "5"), "metering: this top-up would be refused: bad_id"),
        (("up", "--dir", "x", "--broker", "rabbit"), "metering: there is no broker 'rabbit'"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(
    arguments: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    """What the command was given is wrong: it says what, and touches nothing."""
    done = metering(*arguments)
    assert done.returncode == 2
    assert one_line(done.stderr).startswith(line)
    assert done.stdout == b""


def test_a_bad_rttm_line_is_named(tmp_path: Path) -> None:
    """File, line number and what is wrong."""
    rttm = tmp_path / "bad.rttm"
    rttm.write_text("SPEAKER m1 1 0.5 2.0 <NA> <NA> anna <NA> <NA>\nSPEAKER m1 1 0.5\n")
    done = metering("generate", "--rttm", str(rttm))
    assert done.returncode == 2
    assert one_line(done.stderr) == (
        f"metering: {rttm}, line 2: a SPEAKER line has at least 8 fields, this one has 4"
    )


@pytest.mark.parametrize(
    ("setting", "value", "words"),
    [
        ("METERING_PARTITIONS", "many", "METERING_PARTITIONS='many'"),
        ("METERING_KAFAK", "localhost:9092", "METERING_KAFAK is not a setting: did you mean METERING_KAFKA?"),
        ("METERING_RATE_CARD", "nowhere.json", "rate card nowhere.json: No such file or directory"),
        ("METERING_SETTINGS", "nowhere.toml", "settings file nowhere.toml: No such file or directory"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_code_2(setting: str, value: str, words: str) -> None:
    """A setting, or a file that it names, is wrong: one line names it."""
    done = metering("settle", os.devnull, environment=clean_environment() | {setting: value})
    assert done.returncode == 2
    assert one_line(done.stderr).startswith(f"metering: {words}")


@pytest.mark.parametrize(
    ("arguments", "server"),
    [
        (("emit", os.devnull), "METERING_KAFKA=127.0.0.1:1: no broker answers: "),
        (("topup", "user/u-1", "5"), "METERING_KAFKA=127.0.0.1:1: no broker answers: "),
        (("balance", "user/u-1"), "Redis does not answer: "),
        (("statement", "user/u-1"), "METERING_CLICKHOUSE=http://127.0.0.1:1: "),
        (("bill", "room/r-1"), "METERING_CLICKHOUSE=http://127.0.0.1:1: "),
        (("explain", "user/u-1#1"), "METERING_CLICKHOUSE=http://127.0.0.1:1: "),
        (("migrate",), "METERING_CLICKHOUSE=http://127.0.0.1:1: "),
    ],
)
def test_a_server_that_is_not_there_is_one_line_and_exit_code_1(
    arguments: tuple[str, ...], server: str
) -> None:
    """Within seconds the command says which server does not answer."""
    environment = clean_environment(kafka=NOBODY, redis=f"redis://{NOBODY}/0", clickhouse=f"http://{NOBODY}")
    done = metering(*arguments, environment=environment, timeout_s=60)
    assert done.returncode == 1
    assert one_line(done.stderr).startswith(f"metering: {server}")
    assert done.stdout == b""


def test_help_lists_the_commands() -> None:
    """Nobody has to guess what there is."""
    shown = metering("--help").stdout.decode()
    for command in (
        *("generate", "settle", "emit", "up", "migrate", "adopt-log"),
        *("balance", "statement", "bill", "explain", "topup", "demo"),
    ):
        assert command in shown
