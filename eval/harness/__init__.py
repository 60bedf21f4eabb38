"""One stage answered: its questions, the decoding, the run's folder, and what is written at the end."""
