"""The library inside programs that bring their own model: `functional` for any engine, `diffusers` for its Wan."""
