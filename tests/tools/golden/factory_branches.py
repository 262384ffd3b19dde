from platforms import DiffusionTestCase, is_hip, is_npu


def make():
    if is_hip():
        return DiffusionTestCase("hip")
    if is_npu():
        return DiffusionTestCase("npu")
    return DiffusionTestCase("cuda")


ONE_GPU_CASES = [make()]
