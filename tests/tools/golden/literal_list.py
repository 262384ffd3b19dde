from platforms import DiffusionTestCase, ServerArgs

ONE_GPU_CASES: list[DiffusionTestCase] = [
    DiffusionTestCase("a", ServerArgs(model_path="m", extras=["--x"]), run_perf_check=False),
    DiffusionTestCase(id="b", server_args=ServerArgs()),
]
TWO_GPU_CASES = [DiffusionTestCase("c")]
