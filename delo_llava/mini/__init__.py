"""mini6 and mini-llava: six small real tasks and a tiny base for two CPU cores, from packages' data."""
