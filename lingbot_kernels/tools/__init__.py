"""Tools that stand apart from the model; each runs by path with the standard library alone."""
