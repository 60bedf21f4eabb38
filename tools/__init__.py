"""Workshops that made what this project ships; run from a checkout, no part of the wheel."""
