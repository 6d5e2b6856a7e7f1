"""Real servers that run without Docker, Java or root: a broker, a Redis-compatible server, ClickHouse.

For development, the demo and the tests; production runs the same flows against real clusters, by settings
alone. Every server listens on loopback only.
"""
