"""What `lingbot-kernels bench kernels` measures with: cases, correctness gates, timing, peers, rows and plots."""
