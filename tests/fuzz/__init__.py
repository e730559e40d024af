"""Random calls of every op against float64 oracles: `make fuzz`, or `cd tests && python -m fuzz --help`.

A case is a dict of plain values, drawn from a seed and a number; an op's file draws and checks its cases. A new
argument of the rule is a line in `rules.OPTIONS`, a new op is a class with `draw` and `check` under `@fuzzed`.
"""
