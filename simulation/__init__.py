"""A deterministic simulation: the project's own settlement code in one process, with a clock that a seed turns.

    python -m simulation --seeds 1000

Laws:
- Everything follows from the seed: one `random.Random` makes every choice, and nothing depends on the order of a
  set, on the wall clock, or on the machine.
- What runs is the project's code: `flows.settlement` (`decode`, `SettleScope`, `post`, `decode_commands`) around
  `metering.live`, the ledger flow's writer, the usage store flow's rows and writer, `metering.resettle`,
  `metering.rebuild`, and the scripts through their twin, `sinks.balances_memory`. What is simulated is what lies
  between: the log, the exchange between workers, epochs and recovery stores, the wire to the servers, death.
- A process dies only between two effects, and may die between any two of them.
- Live settlement alone is compared with the pure function, at rest, before any resettle: a resettle heals, and so
  hides. Then a resettle has to make every cell exact.

`simulation.bugs` has variants of the code with one rule weakened each; a test proves that the simulation finds
every one of them.
"""
