"""DeLo experts for vision-language models: continual learning of task sequences with missing modalities."""

__version__ = "0.1.0"
