"""Training: a plain loop around a fresh engine per stage; the run's folder decides what is left to do."""
