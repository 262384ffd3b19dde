"""One chunk over several GPUs: token splits, the exchange of heads for tokens, and starting the ranks."""
