"""Proving the books and repairing them: resettle, rebuild, reconcile, and the process that runs them on timers."""
