"""Measuring: a pipeline plainly and with methods, on the same prompts and seeds, taking turns."""
