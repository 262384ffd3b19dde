from platforms import DiffusionTestCase

ONE_GPU_CASES = [DiffusionTestCase("a")]
NIGHTLY_CASES = [DiffusionTestCase("b")]
