from platforms import DiffusionTestCase

ONE_GPU_CASES = []
ONE_GPU_CASES.append(DiffusionTestCase("a"))
ONE_GPU_CASES.append(
    DiffusionTestCase(
        id="b",
    )
)
