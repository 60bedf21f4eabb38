"""A run on disk: what is left to do, published atomically, locked, resumed."""
