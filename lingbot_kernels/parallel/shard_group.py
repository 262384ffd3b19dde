"""The ranks that share each chunk, and their agreement on what they are about to do together.

Before a forward every rank compares its arguments with the others', on the host alone, so that ranks that differ are
refused by name on each of them and none waits for the others in an exchange.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lingbot_kernels.parallel import peer_memory
from lingbot_kernels.parallel.peer_exchange import PeerSession, PeerShard
from lingbot_kernels.parallel.sequence_shard import SequenceShard, all_gather, sequence_splits
from lingbot_kernels.realtime.kv_cache import CacheLayout, KVCache
from lingbot_kernels.realtime.runtime_cache import TensorIdentity
from lingbot_kernels.realtime.weights import fingerprint

LAYOUTS = ("ulysses",)
PEER_MEMORY = "peer memory"


class ShardGroup:
    """The ranks over which a model shards its chunks; a single rank where made without arguments.

    Attributes:
        rank, ranks: this rank's index and their number.
        exchange: how tokens become heads: "peer memory", or "all-to-all" and why; "" on a single rank.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, control: dist.ProcessGroup | None = None) -> None:
        self.rank, self.ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        self._group = group
        self._control = control
        self._shards: dict[int, SequenceShard] = {}
        self._weights: tuple[object, str] = (None, "")
        self.exchange = ""
        self._int8_push = os.environ.get(peer_memory.SWITCH) == peer_memory.WITH_INT8

    @classmethod
    def join(cls, group: dist.ProcessGroup | None, layout: str, model: Any) -> ShardGroup:
        """The ranks of `group` (the default group where None), once they agree on the model and can share it.

        Raises:
            ValueError, RuntimeError: on every rank alike: another layout, ranks that do not divide the heads, another
                configuration, dtype, device type or weights; no process group, or one without this rank or device.
        """
        if group is None:
            if not dist.is_initialized():
                raise RuntimeError(
                    "shard_sequence: there is no process group; call torch.distributed.init_process_group, or start "
                    "with torchrun inside lingbot_kernels.parallel.launch.process_group()"
                )
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise ValueError(f"group: got {group!r}, must be a process group that this rank belongs to")
        joined = cls(group, _control_group(group))
        facts: dict[str, Any] = {
            **{f"config.{name}": value for name, value in model.config.to_dict().items()},
            "layout": layout,
            "dtype": model.dtype,
            "precision": model.recipe or "as the dtype",
            "device": model.device.type,
            "backends": sorted(device.type for device in group._device_types),
            "torch": torch.__version__,
            "weights": joined._weights_digest(model, model._weights.token(model)),
            f"{peer_memory.SWITCH}={peer_memory.WITH_INT8}": joined._int8_push,
        }
        joined.agree(facts)
        if layout not in LAYOUTS:
            raise ValueError(f"layout: got {layout!r}, must be one of {', '.join(LAYOUTS)}")
        heads = model.config.num_heads
        if heads % joined.ranks:
            raise ValueError(f"ranks: got {joined.ranks}, must divide num_heads = {heads}")
        if model.device.type not in facts["backends"]:
            raise ValueError(
                f"group: got one for {', '.join(facts['backends'])} tensors, must be able to exchange the model's, on "
                f"{model.device.type}"
            )
        if joined.ranks > 1:
            assert joined._control is not None
            reason = peer_memory.why_not(group, joined._control, model.device)
            joined.exchange = PEER_MEMORY if reason is None else f"all-to-all ({reason})"
        if model.int8_qk:
            joined.exchange_int8()
        return joined

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardGroup:
        """A copy of a sharded model is shared by the same ranks, each of which copies its own."""
        copied = ShardGroup(self._group, self._control)
        copied.exchange, copied._int8_push = self.exchange, self._int8_push
        return copied

    def __reduce__(self) -> tuple[type[ShardGroup], tuple[()]]:
        if self.ranks > 1:
            raise TypeError(
                "model: got one to pickle that is sharded over ranks, must be written by save_pretrained; "
                "shard_sequence shares the model that is read from there"
            )
        return ShardGroup, ()

    def exchange_int8(self) -> None:
        """Say that Q and K are exchanged in int8: by the collective, unless told otherwise by `peer_memory.SWITCH`."""
        if self.exchange == PEER_MEMORY and not self._int8_push:
            self.exchange = "all-to-all (Q and K are in int8)"

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks' process group; None on a single rank."""
        return self._group

    def shard(self, total: int, kv_cache: KVCache | None = None) -> SequenceShard:
        """This rank's part of a chunk of `total` tokens, for the session of `kv_cache` where given."""
        if total not in self._shards:
            self._shards[total] = SequenceShard(sequence_splits(total, self.ranks), self.rank, self._group)
        shard = self._shards[total]
        if kv_cache is not None and isinstance(kv_cache.memory, PeerSession):
            return PeerShard(shard.splits, shard.rank, shard.group, session=kv_cache.memory)
        return shard

    def ring_memory(self, layout: CacheLayout) -> PeerSession | None:
        """What a new session's rings lie in: memory shared with the other ranks where they exchange through it."""
        if self.exchange != PEER_MEMORY or layout.dtype not in peer_memory.DTYPES:
            return None
        if layout.k_dtype is not None and not self._int8_push:
            return None
        assert self._group is not None
        return PeerSession(self._group, layout)

    def agree(self, facts: Mapping[str, object]) -> None:
        """Return where every rank has the same facts; waits for the other ranks, not for a device.

        Raises:
            ValueError: on every rank, naming each fact that differs and what each rank has.
            RuntimeError: another rank did not answer within the process group's timeout.
        """
        if self.ranks == 1:
            return
        own = {name: str(value) for name, value in facts.items()}
        digest = torch.frombuffer(bytearray(_hash(repr(own).encode())), dtype=torch.uint8)
        digests = digest.new_empty(self.ranks * digest.numel())
        try:
            all_gather(digests, digest, group=self._control)
            if bool((digests.view(self.ranks, -1) == digest).all(1).all()):
                return
            everyone: list[Any] = [None] * self.ranks
            dist.all_gather_object(everyone, own, group=self._control)
        except RuntimeError as error:
            raise RuntimeError(
                f"sequence sharding: rank {self.rank} of {self.ranks} got no answer from another rank, which has "
                f"failed or not come this far within the group's timeout: {error}"
            ) from error
        differences = _differences(everyone)
        advice = "; where a forward failed on some of them only, state.dispose() on every rank starts again"
        raise ValueError(
            f"the ranks must agree, but differ in {differences}{advice if 'state.' in differences else ''}"
        )

    def agree_on_forward(self, model: Any, weights: object, state: Any, **arguments: Any) -> None:
        """Have the ranks compare a forward's arguments: shapes and values, positions, prompt, weights (by token).

        What is in the tensors is read, which waits for the device, only where it is new: the prompt's when it changes,
        the latents' and camera's when a session begins.
        """
        if self.ranks == 1:
            return
        facts: dict[str, object] = {name: _describe(value) for name, value in arguments.items()}
        facts["precision"] = model.recipe or "as the dtype"
        facts["weighted_padding"] = model.weighted_padding
        facts["weights"] = self._weights_digest(model, weights)
        facts |= {f"state.{name}": getattr(state, name) for name in ("next_frame", "chunk_start_frame")}
        this_chunk = (arguments["start_frame"], *getattr(arguments["latents"], "shape", ())[2:3])
        facts["state.unfinished"] = None if state.unfinished == this_chunk else state.unfinished
        text = arguments["text"]
        if isinstance(text, Tensor):
            identity = TensorIdentity(text)
            if state.agreed_text is None or state.agreed_text[0] != identity:
                state.agreed_text = (identity, _content(text))
            facts["the prompt in text"] = state.agreed_text[1]
        if state.kv_cache is None:
            for name in ("latents", "camera"):
                if isinstance(arguments[name], Tensor):
                    facts[f"the values of {name}"] = _content(arguments[name])
        else:
            facts["state.kv_cache"] = list(state.kv_cache.layout.shape)
        self.agree(facts)

    def agree_on_noise(self, generator: torch.Generator | None, device: torch.device) -> None:
        """Have the ranks compare the state of the generator (torch's own where None) that noise is drawn from."""
        if self.ranks == 1:
            return
        if generator is not None:
            random = generator.get_state()
        else:
            random = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state(device)
        self.agree({"the random generator's state (seed every rank alike)": _content(random)})

    def _weights_digest(self, model: Any, token: object) -> str:
        if self._weights[0] is not token:
            self._weights = (token, fingerprint(model))
        return self._weights[1]


def _control_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that can exchange host memory."""
    if torch.device("cpu") in group._device_types:
        return group
    return dist.new_group(dist.get_process_group_ranks(group), backend="gloo", use_local_synchronization=True)


def _hash(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()


def _content(x: Tensor) -> str:
    return _hash(x.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()).hex()


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device.type}"
    return repr(value)


def _differences(everyone: list[dict[str, str]]) -> str:
    """ "start_frame (rank 0: 3; rank 1: 6)" for each fact that differs, ranks of one mind together."""
    names = dict.fromkeys(name for facts in everyone for name in facts)
    described = []
    for name in names:
        holders: dict[str, list[str]] = {}
        for rank, facts in enumerate(everyone):
            holders.setdefault(facts.get(name, "nothing"), []).append(str(rank))
        if len(holders) > 1:
            each = [f"rank{'s' * (len(ranks) > 1)} {', '.join(ranks)}: {value}" for value, ranks in holders.items()]
            described.append(f"{name} ({'; '.join(each)})")
    return ", ".join(described)
