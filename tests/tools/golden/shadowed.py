from platforms import DiffusionTestCase

ONE_GPU_CASES = [DiffusionTestCase("a")]


def build():
    ONE_GPU_CASES = []
    ONE_GPU_CASES.append(DiffusionTestCase("local"))
    return len(ONE_GPU_CASES)


COUNT = build()


class Suites:
    TWO_GPU_CASES = [DiffusionTestCase("attribute")]
