"""What a decision costs: multiply-adds in two conventions, and bytes."""
