from platforms import DiffusionTestCase


def all_cases():
    out = []
    for n in ("a", "b"):
        out.append(DiffusionTestCase(n))
    return out


def generate():
    yield DiffusionTestCase("y1")
    yield from [DiffusionTestCase("y2")]


ONE_GPU_CASES = [*generate(), DiffusionTestCase("z")]
ONE_GPU_CASES.extend(all_cases())
TWO_GPU_CASES = []
TWO_GPU_CASES += [DiffusionTestCase(f"two_{c.id}") for c in all_cases()]
