"""What happens when a model runs: the hooks, what a call says of its tokens, and what is edited."""
