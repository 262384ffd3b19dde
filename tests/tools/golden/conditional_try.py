from platforms import DiffusionTestCase

ONE_GPU_CASES = [DiffusionTestCase("a")]
try:
    import flash_attn

    ONE_GPU_CASES.append(DiffusionTestCase("flash"))
except ImportError:
    ONE_GPU_CASES.append(DiffusionTestCase("fallback"))
try:
    import triton

    HAS_TRITON = True
except ImportError:
    HAS_TRITON = False
if HAS_TRITON:
    ONE_GPU_CASES.append(DiffusionTestCase("triton"))
