from platforms import DiffusionTestCase, ServerArgs


def _make_x(case_id="default", *, gpus=1):
    return DiffusionTestCase(f"{case_id}_{gpus}gpu", ServerArgs(num_gpus=gpus))


ONE_GPU_CASES = []
ONE_GPU_CASES.append(_make_x())
ONE_GPU_CASES.append(_make_x("id", gpus=2))
