"""`make chaos`: kill every process of a running system again and again, under load, and prove the books.

Laws:
- The plan is a function of the seed alone (`plan`): which faults, in which order, after which pauses. What a fault
  meets is up to the machine, so a replay meets it again sooner or later, not at the same instruction.
- What was sent is read back from the broker's log and settled by the pure function (`bill`). Nothing that a flow
  says about itself is believed.
- Every kind of fault ends with probes: events sent the moment it strikes, one into each partition. It is over when
  all of them are on the balances, in the ledger and in the usage store.
- After each round everything comes to rest and is compared, account by account and cell by cell (`books`). Where
  no window froze, no repair runs before that, since a repair would hide what live settlement did wrong.

The harness is itself the supervisor of servers and flows (`keeper`), so that it can hold one down, start one with a
fault point armed, or put a proxy in between; in the scene "up" it is `metering up`, which is killed then too.
"""
