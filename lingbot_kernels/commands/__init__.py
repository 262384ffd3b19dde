"""The subcommands of `lingbot-kernels`: a module each, with what they share beside them."""
