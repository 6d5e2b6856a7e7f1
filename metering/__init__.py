"""The pure core: what usage costs, who pays, who earns. No I/O, no clock, no engine.

Everything here is a function of its arguments; time is an argument too. `metering.settle` computes the bill
of a whole set of events at once; `metering.live` is the state machine that arrives at the same bill event by
event, and the two are tested against each other.
"""
