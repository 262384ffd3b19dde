from platforms import DiffusionTestCase

NAMES = ["u", "v"]
ONE_GPU_CASES = [DiffusionTestCase(f"m_{k}") for k in NAMES if k != "w"]
for n in (1, 2):
    ONE_GPU_CASES.append(DiffusionTestCase(f"a_{n}"))
for i, (name, gpus) in enumerate(zip(NAMES, range(1, 3))):
    ONE_GPU_CASES.append(DiffusionTestCase(f"{name}_{gpus}_{i}"))
for key, value in {"p": 1, "q": 2}.items():
    if key == "q":
        break
    ONE_GPU_CASES.append(DiffusionTestCase(f"{key}{value}"))
n = 0
while n < 2:
    n += 1
    ONE_GPU_CASES.append(DiffusionTestCase(f"w{n}"))
