from dataclasses import dataclass, field


@dataclass(frozen=True)
class DiffusionTestCase:
    gpus: int
    id: str
    tags: list = field(default_factory=list)


ONE_GPU_CASES = [DiffusionTestCase(1, "second_position"), DiffusionTestCase(id="keyword", gpus=2)]
