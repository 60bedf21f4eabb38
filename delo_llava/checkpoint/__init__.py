"""Files of a run: where they lie, how they are published atomically, how they are checked."""
