from platforms import DiffusionTestCase


def make():
    c = DiffusionTestCase("a")
    return c


def outer():
    def inner(n):
        return DiffusionTestCase("inner_" + n)

    return inner("b")


ONE_GPU_CASES = [make(), outer(), (lambda n: DiffusionTestCase(n))("c")]
