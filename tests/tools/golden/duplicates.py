from platforms import DiffusionTestCase as C
from platforms import is_hip

ONE_GPU_CASES = [C("a"), C("b"), C("a")]
TWO_GPU_CASES = [C("b"), C("c")]
if is_hip():
    TWO_GPU_CASES.append(C("either"))
else:
    TWO_GPU_CASES.append(C("either"))
