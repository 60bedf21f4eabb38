"""Answers and what is kept beside them: stored ones with their keys, answer files of others, their scores."""
