"""The decisions that methods take, beyond computing and reusing: one kind a file."""
