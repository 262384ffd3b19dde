"""A world small enough to ship: a made courtyard, walks through it, and the network that learns to continue them."""
