from elsewhere import discover
from platforms import DiffusionTestCase

ONE_GPU_CASES = [DiffusionTestCase("a")]
for model in discover():
    ONE_GPU_CASES.append(DiffusionTestCase(f"m_{model}"))
