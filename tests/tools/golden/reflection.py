from platforms import DiffusionTestCase

ONE_GPU_CASES = [DiffusionTestCase("a")]
globals()["ONE_GPU_CASES"].append(DiffusionTestCase("b"))
exec('ONE_GPU_CASES.append(DiffusionTestCase("c"))')
