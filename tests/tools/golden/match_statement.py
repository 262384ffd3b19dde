from platforms import DiffusionTestCase as C
from platforms import backend

MODE = "full"
ONE_GPU_CASES = []
match MODE:
    case "small":
        ONE_GPU_CASES.append(C("small"))
    case "full" | "all":
        ONE_GPU_CASES.append(C("full"))
match backend():
    case "cuda":
        ONE_GPU_CASES.append(C("cuda"))
    case _:
        ONE_GPU_CASES.append(C("other"))
