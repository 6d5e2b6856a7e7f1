"""What one utterance costs and what it earns, at one version of the rates."""

from __future__ import annotations

from schemas.events import Usage
from schemas.rate_card import RateVersion


def cost_us(usage: Usage, rates: RateVersion) -> int:
    """asr, nmt and tts time at their rates (us per ms)."""
    return usage.asr_time_ms * rates.asr + usage.nmt_time_ms * rates.nmt + usage.tts_time_ms * rates.tts


def credit_us(usage: Usage, rates: RateVersion) -> int:
    """GPU time at the node's rate (us per ms)."""
    return usage.gpu_active_time_ms * rates.node_credit
