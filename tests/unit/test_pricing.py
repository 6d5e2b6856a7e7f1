"""Prices, in figures: each stage has its own rate, and every part of the program uses this one rule."""

from __future__ import annotations

from metering.live import LiveScope
from metering.pricing import cost_us, credit_us
from metering.settle import Settling
from schemas.rate_card import RateCard, RateVersion
from tests.support.events import START_MS, at, usage

RATES = RateVersion(0, asr=2, nmt=30, tts=500, node_credit=7)
UTTERANCE = usage("e-1", START_MS, room=None, asr=11, nmt=13, tts=17, gpu=19)


def test_each_stage_has_its_own_rate() -> None:
    """11 ms at 2, 13 ms at 30 and 17 ms at 500; 19 ms of GPU time at 7."""
    assert cost_us(UTTERANCE, RATES) == 22 + 390 + 8_500
    assert credit_us(UTTERANCE, RATES) == 133


def test_the_file_and_the_live_bill_charge_it() -> None:
    """The same figures in a settled vector and in a live posting."""
    settling, live = Settling(RateCard([RATES])), LiveScope("session/s-1", RateCard([RATES]))
    settling.add(UTTERANCE)
    live.apply(at(UTTERANCE, 0))
    emission = live.emit()
    assert emission is not None
    assert emission.cells[0].amounts == {"user/u-1": -8_912, "node/n-1": 133}
    settled = {line.account: line.amount_us for line in settling.lines()}
    assert settled == {"user/u-1": -8_912, "node/n-1": 133, "platform/revenue": 8_779}
