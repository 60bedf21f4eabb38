"""What methods inject into a frozen base, and the files it is kept in."""
