"""What the processes tell about themselves: metrics and log lines. A leaf, next to `schemas`."""
