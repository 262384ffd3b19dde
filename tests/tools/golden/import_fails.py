from platforms import DiffusionTestCase

ONE_GPU_CASES = [DiffusionTestCase("a")]
raise RuntimeError("not supported")
ONE_GPU_CASES.append(DiffusionTestCase("b"))
