"""Which kernels serve a device: the one place that knows what there is."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from engine.errors import InvalidConfig
from engine.kernels.api import Attention, Ops
from engine.kernels.reference import TorchAttention, TorchOps

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Backend:
    """The kernels of one device. `attention` takes the KV as `KVLayout.view` gives it."""

    name: str
    device: torch.device
    ops: Ops
    attention: Callable[[torch.Tensor], Attention]


def load_backend(device: str = "auto") -> Backend:
    """The best kernels for `device` ("auto", "cpu" or "cuda"). Raises InvalidConfig, with the remedy, if it cannot serve."""
    if device in ("auto", "cpu"):
        return _cpu()
    if device == "cuda":
        raise InvalidConfig("device 'cuda' is not available in this version of Sluice: use --device cpu")
    raise InvalidConfig(f"device must be auto, cpu or cuda, got {device!r}")


def _cpu() -> Backend:
    """The compiled kernels, or the reference where numba or torch's OpenMP and oneDNN are missing."""
    device = torch.device("cpu")
    if torch.backends.mkldnn.is_available():
        _log.info("loading the CPU kernels; the first start of a version compiles them, up to ten seconds")
        try:
            from engine.kernels import cpu, cpu_loops
        except ModuleNotFoundError as error:
            _log.info("no compiled CPU kernels (%s): several times slower", error)
        else:
            if cpu_loops.is_available():
                return Backend("cpu", device, cpu.CpuOps(), cpu.make_attention)
    return Backend("cpu-reference", device, TorchOps(), TorchAttention)
