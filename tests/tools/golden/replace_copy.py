import copy
from dataclasses import replace

from platforms import DiffusionTestCase

base = DiffusionTestCase("base", 1)
ONE_GPU_CASES = [replace(base, id="b"), copy.copy(base), copy.deepcopy(replace(base, gpus=2, id="d"))]
TWO_GPU_CASES = [replace(c, id=c.id + "_2gpu") for c in ONE_GPU_CASES]
