from _more import MORE_CASES, make_y
from elsewhere import OTHER_CASES
from platforms import DiffusionTestCase

ONE_GPU_CASES = [DiffusionTestCase("a"), *MORE_CASES]
ONE_GPU_CASES.append(make_y("y"))
TWO_GPU_CASES = [*OTHER_CASES, DiffusionTestCase("b")]
