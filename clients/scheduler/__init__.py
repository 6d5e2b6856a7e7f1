"""Admission: may this session run, given what its user has and what other sessions hold?

    with Scheduler("redis://...") as scheduler:
        if scheduler.admit("u-5", "s-123", Hold.of_minutes(10, lasts_s=900)):
            ...  # run it; admit it again before 900 s are over
        scheduler.release("u-5", "s-123")

Nothing but redis is needed: the folder may be copied as it is.
"""

from .admission import Admission, Hold, Reason, Release, Swept
from .breaker import Breaker, State
from .client import SCRIPT, SHA, AsyncScheduler, Scheduler
from .degraded import AdmitFromLastKnown, Deny, Policy
from .observer import Observer, PrometheusObserver

__all__ = [
    "SCRIPT",
    "SHA",
    "Admission",
    "AdmitFromLastKnown",
    "AsyncScheduler",
    "Breaker",
    "Deny",
    "Hold",
    "Observer",
    "Policy",
    "PrometheusObserver",
    "Reason",
    "Release",
    "Scheduler",
    "State",
    "Swept",
]
