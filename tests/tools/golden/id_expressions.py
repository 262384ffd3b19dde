import enum

from platforms import DiffusionTestCase

BASE = "flux"
IDS = {"k": "from_dict"}


class Ids:
    WAN = "wan"


class Kind(enum.Enum):
    T2V = "t2v"


class Text(str, enum.Enum):
    I2V = "i2v"


ONE_GPU_CASES = [
    DiffusionTestCase(f"{BASE}_t2i"),
    DiffusionTestCase(BASE + "_plus"),
    DiffusionTestCase("%s_%02d" % (BASE, 3)),
    DiffusionTestCase(f"{BASE}-{1}"),
    DiffusionTestCase(Ids.WAN),
    DiffusionTestCase(IDS["k"]),
    DiffusionTestCase(Kind.T2V.value),
    DiffusionTestCase(Text.I2V),
    DiffusionTestCase("_".join(["a", BASE.upper()])),
]
