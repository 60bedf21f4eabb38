"""One stage: which records, in which order, by which arithmetic."""
