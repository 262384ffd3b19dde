"""`RingPosition` by the path that programs import it from; it lives in `lingbot_kernels.ring`."""

from lingbot_kernels.ring import RingPosition

__all__ = ["RingPosition"]
