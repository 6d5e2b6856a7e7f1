"""One utterance: how long each stage took, and how long the GPU was active.

The laws.

1. A stage's time is the time in which it was entered at least once, by any thread. Entered twice one after the
   other, it adds up; entered twice at once, nothing counts double. Different stages may overlap, and each counts.
2. Times are taken in ns from a monotonic clock, summed in ns, and rounded once, half up, to ms. What exceeds
   an hour counts as an hour: that is the longest duration the contract knows.
3. GPU time is what was set, or else the difference of the counter between beginning and end, or else 0. It is
   rounded half up and never more than the three rounded stages together.
4. The utterance's end ends the stages that are still open. What they do later is not counted.
5. An exception in the body changes nothing: what was measured until then is sent, since the work was done.
6. An utterance in which no stage was entered is not sent. There is no usage in it, and an event without usage
   would make its user one of the payers of a room's minute.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import TracebackType

from .events import MAX_DURATION_MS, checked_ms, checked_text, whole_ms

_logger = logging.getLogger("clients.node")

_NS_PER_MS = 1_000_000


class Stage:
    """A context manager that counts the time in which it is entered. Threads may share it."""

    __slots__ = ("_depth", "_since_ns", "_total_ns", "_utterance", "used")

    def __init__(self, utterance: Utterance) -> None:
        self._utterance = utterance
        self._depth = 0
        self._since_ns = 0
        self._total_ns = 0
        self.used = False

    def __enter__(self) -> None:
        """Raises RuntimeError outside of the utterance's `with` block."""
        utterance = self._utterance
        with utterance._lock:
            utterance._check_open()
            self.used = True
            if self._depth == 0:
                self._since_ns = utterance._timer_ns()
            self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        utterance = self._utterance
        with utterance._lock:
            # Zero when the utterance ended first: that counted the stage up to there.
            if self._depth == 0:
                return
            self._depth -= 1
            if self._depth == 0:
                self._total_ns += max(0, utterance._timer_ns() - self._since_ns)

    def _add_ms(self, duration_ms: float) -> None:
        self.used = True
        self._total_ns += _rounded_ns(duration_ms)

    def _end(self, now_ns: int) -> int:
        """Whole ms, once and for all."""
        if self._depth:
            self._total_ns += max(0, now_ns - self._since_ns)
            self._depth = 0
        return whole_ms(self._total_ns)


class Utterance:
    """A context manager; made by `UsageEmitter.utterance`, which says what the fields are.

    Leaving the block hands the event over and does not wait, unless `durable` was asked for.
    """

    __slots__ = (
        "_asr",
        "_audio_ms",
        "_discarded",
        "_finish",
        "_gpu_active_ms",
        "_gpu_at_start_ms",
        "_gpu_counter",
        "_lock",
        "_nmt",
        "_source_lang",
        "_state",
        "_target_lang",
        "_timer_ns",
        "_tts",
        "gpu_counter_failed",
    )

    def __init__(
        self,
        timer_ns: Callable[[], int],
        finish: Callable[[Utterance, dict[str, int | str | None], bool], None],
        gpu: Callable[[], float] | None,
        audio_ms: int | None,
        source_lang: str | None,
        target_lang: str | None,
    ) -> None:
        self._timer_ns = timer_ns
        self._finish = finish
        self._lock = threading.Lock()
        self._state = "made"
        self._asr = Stage(self)
        self._nmt = Stage(self)
        self._tts = Stage(self)
        self._gpu_counter = gpu
        self._gpu_at_start_ms: float | None = None
        self._gpu_active_ms: float | None = None
        self._discarded = False
        self.gpu_counter_failed = False
        """Whether the GPU counter raised, or went back: then the GPU time is 0."""
        self.audio_ms = audio_ms
        self.source_lang = source_lang
        self.target_lang = target_lang

    def asr(self) -> Stage:
        """Speech recognition: `with utterance.asr(): ...`."""
        return self._asr

    def nmt(self) -> Stage:
        """Translation."""
        return self._nmt

    def tts(self) -> Stage:
        """Speech synthesis."""
        return self._tts

    def add_ms(self, *, asr: float = 0, nmt: float = 0, tts: float = 0) -> None:
        """Add what was measured elsewhere, in ms. Raises TypeError, ValueError, or RuntimeError at the end."""
        added = [
            (self._asr, checked_ms("asr", asr)),
            (self._nmt, checked_ms("nmt", nmt)),
            (self._tts, checked_ms("tts", tts)),
        ]
        with self._lock:
            self._check_open()
            for stage, duration_ms in added:
                if duration_ms:
                    stage._add_ms(duration_ms)

    def discard(self) -> None:
        """Send nothing: it was no work after all."""
        self._discarded = True

    @property
    def gpu_active_ms(self) -> float | None:
        """ms in which the GPU was active, as it was set. What is set wins over the counter."""
        return self._gpu_active_ms

    @gpu_active_ms.setter
    def gpu_active_ms(self, value: float) -> None:
        self._gpu_active_ms = checked_ms("gpu_active_ms", value)

    @property
    def audio_ms(self) -> int | None:
        """ms of speech, if known. More than an hour counts as an hour."""
        return self._audio_ms

    @audio_ms.setter
    def audio_ms(self, value: float | None) -> None:
        self._audio_ms = None if value is None else whole_ms(_rounded_ns(checked_ms("audio_ms", value)))

    @property
    def source_lang(self) -> str | None:
        """The language spoken, if known; it may be set when it was recognised."""
        return self._source_lang

    @source_lang.setter
    def source_lang(self, value: str | None) -> None:
        self._source_lang = None if value is None else checked_text("source_lang", value)

    @property
    def target_lang(self) -> str | None:
        """The language translated into, if known."""
        return self._target_lang

    @target_lang.setter
    def target_lang(self, value: str | None) -> None:
        self._target_lang = None if value is None else checked_text("target_lang", value)

    def __enter__(self) -> Utterance:
        """Raises RuntimeError the second time."""
        if self._state != "made":
            raise RuntimeError("an utterance is entered once")
        self._gpu_at_start_ms = self._read_gpu()
        self._state = "open"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        gpu_at_end_ms = None if self._gpu_active_ms is not None else self._read_gpu()
        with self._lock:
            self._state = "ended"
            now_ns = self._timer_ns()
            asr_ms, nmt_ms, tts_ms = self._asr._end(now_ns), self._nmt._end(now_ns), self._tts._end(now_ns)
        if self._discarded or not (self._asr.used or self._nmt.used or self._tts.used):
            return
        fields: dict[str, int | str | None] = {
            "audio_ms": self._audio_ms,
            "asr_time_ms": asr_ms,
            "nmt_time_ms": nmt_ms,
            "tts_time_ms": tts_ms,
            "gpu_active_time_ms": min(self._gpu_ms(gpu_at_end_ms), asr_ms + nmt_ms + tts_ms),
            "source_lang": self._source_lang,
            "target_lang": self._target_lang,
        }
        self._finish(self, fields, problem is not None)

    def _gpu_ms(self, at_end_ms: float | None) -> int:
        active_ms = self._gpu_active_ms
        if active_ms is None:
            if at_end_ms is None or self._gpu_at_start_ms is None:
                return 0
            active_ms = at_end_ms - self._gpu_at_start_ms
            if active_ms < 0:
                _logger.error(
                    "the GPU counter went back by %s ms; this utterance has no GPU time", -active_ms
                )
                self.gpu_counter_failed = True
                return 0
        return whole_ms(_rounded_ns(active_ms))

    def _read_gpu(self) -> float | None:
        if self._gpu_counter is None or self.gpu_counter_failed:
            return None
        try:
            return checked_ms("gpu", self._gpu_counter())
        except Exception:
            # A broken counter costs the node its credit; it must not cost the user the translation.
            _logger.exception("the GPU counter failed; this utterance has no GPU time")
            self.gpu_counter_failed = True
            return None

    def _check_open(self) -> None:
        if self._state != "open":
            raise RuntimeError(
                "the utterance has ended" if self._state == "ended" else "enter the utterance first"
            )


def _rounded_ns(duration_ms: float) -> int:
    """A measured duration as whole ns, at most the longest one that counts (a float may be huge)."""
    return round(min(duration_ms, MAX_DURATION_MS) * _NS_PER_MS)
