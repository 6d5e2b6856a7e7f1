"""What one utterance costs and what it earns, at one version of the rates: the one place that says so."""

from __future__ import annotations

from schemas.events import Usage
from schemas.rate_card import RateVersion


def stages_cost_us(asr_ms: int, nmt_ms: int, tts_ms: int, rates: RateVersion) -> int:
    """asr, nmt and tts time (ms) at their rates (us per ms)."""
    return asr_ms * rates.asr + nmt_ms * rates.nmt + tts_ms * rates.tts


def gpu_credit_us(gpu_ms: int, rates: RateVersion) -> int:
    """GPU time (ms) at the node's rate (us per ms)."""
    return gpu_ms * rates.node_credit


def cost_us(usage: Usage, rates: RateVersion) -> int:
    """What the utterance costs its payers."""
    return stages_cost_us(usage.asr_time_ms, usage.nmt_time_ms, usage.tts_time_ms, rates)


def credit_us(usage: Usage, rates: RateVersion) -> int:
    """What the utterance earns its node."""
    return gpu_credit_us(usage.gpu_active_time_ms, rates)
