"""Studies: cells that differ in one thing, run and compared."""
