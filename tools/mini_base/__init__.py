"""The workshop of the small bases: pretraining, the gate that judges them, data cards (extra `mini-base`)."""
