from dataclasses import replace

from elsewhere import tweak
from platforms import DiffusionTestCase


def _with_gpus(cases, gpus):
    return [replace(case, server_args=replace(case.server_args, num_gpus=gpus)) for case in cases]


ONE_GPU_CASES = [DiffusionTestCase("a"), DiffusionTestCase("b")]
ONE_GPU_CASES = _with_gpus(ONE_GPU_CASES, 2)
TWO_GPU_CASES = [DiffusionTestCase("c")]
TWO_GPU_CASES = tweak(TWO_GPU_CASES)
