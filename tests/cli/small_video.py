"""Options of a rollout that takes milliseconds."""

SMALL = ("--height", "32", "--width", "32", "--device", "cpu")
