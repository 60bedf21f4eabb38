"""Frozen queries of a sample, and statistics over them. Nothing here knows PEFT or a model family."""
