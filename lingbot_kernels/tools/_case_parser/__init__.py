"""The two readers of the case parser: `worlds` runs a config under stubs, `visitor` reads its tree as upstream does."""
