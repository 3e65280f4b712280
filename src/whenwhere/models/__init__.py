"""Networks of our own that have weights."""
