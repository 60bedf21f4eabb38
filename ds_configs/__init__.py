"""DeepSpeed files; a file's name is its key for `--zero`. Batch sizes come from the run's configuration."""
