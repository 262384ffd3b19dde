from platforms import DiffusionTestCase as C

SKIP = {"b"}
ONE_GPU_CASES = [C("a"), C("b"), C("c"), C("d"), C("e")]
ONE_GPU_CASES = [c for c in ONE_GPU_CASES if c.id not in SKIP]
ONE_GPU_CASES.remove(ONE_GPU_CASES[0])
del ONE_GPU_CASES[0]
ONE_GPU_CASES.pop()
