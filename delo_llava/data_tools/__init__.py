"""Looking after data on disk: checking it, showing it, preparing it from official downloads."""
