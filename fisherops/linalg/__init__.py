"""Linear algebra with Fisher operators."""
