"""Decide when and where a Transformer computes."""
