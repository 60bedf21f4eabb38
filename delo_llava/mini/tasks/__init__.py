"""The six tasks of mini6, one file each: `records(split, rng)` yields examples without end."""
