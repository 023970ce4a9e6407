"""Ways to adapt a frozen base, each with its own search space."""
