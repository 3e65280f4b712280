"""Training: plain loops and the data they read."""
