"""Triton kernels: one module an op, launchers that write into given outputs and check nothing but `why_not`."""
