"""Runs side by side: which may share a table, their rows, their differences, leaderboards."""
