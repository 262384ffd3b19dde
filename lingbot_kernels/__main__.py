"""`python -m lingbot_kernels` is the command line `lingbot-kernels`."""

from lingbot_kernels.cli import main

main(prog_name="lingbot-kernels")
