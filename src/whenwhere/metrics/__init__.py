"""Measures of quality: pure functions, tensors in, numbers out."""
