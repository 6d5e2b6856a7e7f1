"""Bytewax wiring, one module per flow: `build_flow(sources, sinks, rules)`. Step ids are schema: renaming one
empties its state."""
