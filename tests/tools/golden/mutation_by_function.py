from platforms import DiffusionTestCase


def add(cases, *names, prefix="x"):
    for n in names:
        cases.append(DiffusionTestCase(f"{prefix}_{n}"))


def reset():
    global TWO_GPU_CASES
    TWO_GPU_CASES = [DiffusionTestCase("t")]


ONE_GPU_CASES = []
add(ONE_GPU_CASES, "a", "b")
add(ONE_GPU_CASES, *("c",), **{"prefix": "y"})
reset()
