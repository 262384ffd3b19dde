ONE_GPU_CASES = [
    DiffusionTestCase("a",
