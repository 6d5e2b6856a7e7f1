"""Compute nodes of different speed, and the utterances that they process.

Processing times are factors of the audio's duration: a fast node recognises ten seconds of speech in half a
second, a slow one in three.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from app.workload.ids import distinct_codes, ulid
from schemas.cloudevents import MAX_DURATION_MS
from schemas.events import Usage

LANGUAGES = ("en", "zh", "es", "de", "fr", "ja", "pt", "ar", "hi", "ko", "it", "tr")


@dataclass(frozen=True)
class Node:
    """Stage times per millisecond of audio, and the share of them in which the GPU is busy."""

    node_id: str
    asr_factor: float
    nmt_factor: float
    tts_factor: float
    gpu_share: float


@dataclass(frozen=True)
class Speaker:
    """Whose speech it is, and where it belongs."""

    scope: str
    session_id: str
    room_id: str | None
    user_id: str
    source_lang: str | None
    target_lang: str | None


@dataclass(frozen=True)
class StageTimes:
    """Processing times of one utterance, in ms; the GPU is never busy for longer than the stages."""

    asr_ms: int
    nmt_ms: int
    tts_ms: int
    gpu_ms: int


def make_nodes(count: int, rng: Random) -> list[Node]:
    """Nodes lent by volunteers: from a data-centre card to an old notebook, four times as slow."""
    return [
        _make_node(node_id, speed=rng.uniform(0.5, 2.0), rng=rng)
        for node_id in distinct_codes("n-", count, 6, rng)
    ]


def _make_node(node_id: str, speed: float, rng: Random) -> Node:
    return Node(
        node_id=node_id,
        asr_factor=rng.uniform(0.08, 0.14) / speed,
        nmt_factor=rng.uniform(0.02, 0.05) / speed,
        tts_factor=rng.uniform(0.06, 0.16) / speed,
        gpu_share=rng.uniform(0.70, 0.97),
    )


def stage_times(node: Node, audio_ms: int, rng: Random) -> StageTimes:
    """How long the node takes; one utterance in twelve is only shown as text, not spoken."""
    asr_ms = _jittered(node.asr_factor * audio_ms, rng)
    nmt_ms = _jittered(15.0 + node.nmt_factor * audio_ms, rng)
    tts_ms = 0 if rng.random() < 1 / 12 else _jittered(node.tts_factor * audio_ms, rng)
    stages_ms = asr_ms + nmt_ms + tts_ms
    busy_share = min(1.0, node.gpu_share * rng.uniform(0.95, 1.05))
    # A single duration is bounded too, so an hour of speech on a slow node reports the bound.
    return StageTimes(asr_ms, nmt_ms, tts_ms, min(int(stages_ms * busy_share), MAX_DURATION_MS))


def _jittered(duration_ms: float, rng: Random) -> int:
    return min(int(duration_ms * rng.uniform(0.85, 1.3)), MAX_DURATION_MS)


def make_usage(speaker: Speaker, node: Node, time_ms: int, audio_ms: int, rng: Random) -> Usage:
    """The event that the node emits when the utterance is done; an old client leaves out what is optional."""
    times = stage_times(node, audio_ms, rng)
    old_client = rng.random() < 0.02
    return Usage(
        scope=speaker.scope,
        source=f"node/{node.node_id}",
        id=ulid(time_ms, rng),
        time_ms=time_ms,
        session_id=speaker.session_id,
        room_id=speaker.room_id,
        user_id=speaker.user_id,
        node_id=node.node_id,
        utterance_id=f"ut-{ulid(time_ms, rng)}",
        audio_ms=None if old_client else audio_ms,
        asr_time_ms=times.asr_ms,
        nmt_time_ms=times.nmt_ms,
        tts_time_ms=times.tts_ms,
        gpu_active_time_ms=times.gpu_ms,
        source_lang=None if old_client else speaker.source_lang,
        target_lang=None if old_client else speaker.target_lang,
    )
