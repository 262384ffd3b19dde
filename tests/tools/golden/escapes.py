from elsewhere import decorate, register
from platforms import DiffusionTestCase

ONE_GPU_CASES = [DiffusionTestCase("a")]
TWO_GPU_CASES = [DiffusionTestCase("b")]
register(TWO_GPU_CASES)


@decorate
def add():
    ONE_GPU_CASES.append(DiffusionTestCase("perhaps"))
