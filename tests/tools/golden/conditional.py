from platforms import DiffusionTestCase, current_platform, is_hip, memory

ONE_GPU_CASES = [DiffusionTestCase("always"), DiffusionTestCase("x" if memory() > 80 else "y")]
if not current_platform.is_hip():
    ONE_GPU_CASES.append(DiffusionTestCase("cuda"))
    if memory() > 40:
        ONE_GPU_CASES.append(DiffusionTestCase("large"))
if is_hip():
    EXTRA = []
else:
    EXTRA = [DiffusionTestCase("extra")]
ONE_GPU_CASES += EXTRA
