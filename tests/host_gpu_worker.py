"""The offline worker on `host_gpu`: `host_gpu_worker.py SLAB_BYTES` and the worker's own arguments."""

from __future__ import annotations

import os
import sys

import torch
from host_gpu import Queue, QueueDevice, QueueStreams, install

from engine.colocate import cuda_gate, cuda_worker, worker
from engine.memory import cuda_vmm

if __name__ == "__main__":
    torch.set_num_threads(1)
    install(setattr, int(sys.argv.pop(1)), Queue())
    streams = cuda_gate.NoStreams if os.environ.get("SLUICE_TEST_STREAMS") == "none" else QueueStreams
    cuda_gate.CudaStreams = streams  # type: ignore[assignment,misc]
    cuda_worker.CudaDevice = QueueDevice  # type: ignore[assignment,misc]
    cuda_worker.CudaVmm = cuda_vmm.CudaVmm
    os._exit(worker.main())
