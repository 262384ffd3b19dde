from elsewhere import SKIP, slow
from platforms import DiffusionTestCase as C

ONE_GPU_CASES = [C("a"), C("b")]
ONE_GPU_CASES = [c for c in ONE_GPU_CASES if c.id not in SKIP]
TWO_GPU_CASES = [C("c"), C("d")]
TWO_GPU_CASES.remove(slow())
