"""The processes of one training: alone, or started by `torchrun` on one machine or several (gloo).

    torchrun --nproc-per-node 2 -m flowsage.pipelines.cli train FLOWS… --output DIR

Rank 0 reads the flows and writes the model; the others need neither file. Gradients and states go from memory to
memory, as tensors: nothing is pickled.
"""

from __future__ import annotations

import os
from datetime import timedelta
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.numpy import load, save
from torch import Tensor

from flowsage.collector.errors import FlowsageError
from flowsage.models.columns import Array

PATIENCE = timedelta(days=7)
"""The others wait so long at most while rank 0 reads the flows; if it dies, torchrun ends them all."""


class World:
    """rank of size processes; as a context it joins them, and leaves. Alone, every operation is trivial."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.size = int(os.environ.get("WORLD_SIZE", "1"))
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))

    def __enter__(self) -> World:
        if self.size > 1:
            try:
                dist.init_process_group("gloo", timeout=PATIENCE)
            except (RuntimeError, ValueError) as e:
                first = str(e).splitlines()[0]
                raise FlowsageError(f"the {self.size} processes cannot join ({first}); start them by torchrun") from e
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        if self.size > 1 and dist.is_initialized() and kind is None:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process reads, writes and talks."""
        return self.rank == 0

    def gather(self, mine: Tensor) -> list[Tensor]:
        """f32[n] of every process, in the order of ranks."""
        if self.size == 1:
            return [mine]
        told = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(told, mine.contiguous())
        return told

    def share(self, arrays: dict[str, Array] | None) -> dict[str, Array]:
        """The arrays of rank 0, at every process."""
        if self.size == 1:
            assert arrays is not None
            return arrays
        packed = {} if arrays is None else {k: np.asarray(a, order="C") for k, a in arrays.items()}
        data = torch.frombuffer(bytearray(save(packed)), dtype=torch.uint8) if self.leads else torch.empty(0)
        size = torch.tensor([len(data)])
        dist.broadcast(size, 0)
        if not self.leads:
            data = torch.empty(int(size), dtype=torch.uint8)
        dist.broadcast(data, 0)
        found: dict[str, Any] = load(data.numpy().tobytes())
        return found

    def device(self, wanted: str) -> torch.device:
        """Where this process computes gradients: "auto" is a GPU of its own where there is one."""
        if wanted == "auto":
            if not torch.cuda.is_available():
                return torch.device("cpu")
            return torch.device("cuda", self.local_rank % torch.cuda.device_count())
        try:
            device = torch.device(wanted)
            torch.zeros(1, device=device)
        except (RuntimeError, AssertionError, ValueError) as e:
            raise FlowsageError(
                f"the device {wanted!r} cannot be used ({str(e).splitlines()[0]}); `--device auto` takes what is there"
            ) from e
        return device
