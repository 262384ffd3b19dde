from platforms import DiffusionTestCase

MORE_CASES = [DiffusionTestCase("more_1"), DiffusionTestCase("more_2")]


def make_y(name):
    return DiffusionTestCase(f"made_{name}")
