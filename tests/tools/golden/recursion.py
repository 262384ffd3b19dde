from platforms import DiffusionTestCase


def forever(n):
    return forever(n + 1)


def countdown(n):
    return [] if n == 0 else [DiffusionTestCase(f"c{n}"), *countdown(n - 1)]


ONE_GPU_CASES = [DiffusionTestCase("a"), forever(0), *countdown(3)]
