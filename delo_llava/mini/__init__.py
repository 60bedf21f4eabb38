"""mini6, mini8 and their bases: small real tasks for two CPU cores, built from packages' data."""
