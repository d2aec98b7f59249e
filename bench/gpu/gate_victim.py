"""A worker to be frozen and killed: spins on the GPU, holds a GiB, grants its channels over the socket it inherited."""

from __future__ import annotations

import socket
import sys
import time

import torch

from bench.gpu.gate import Spinner
from nvdriver.api import GateOptions, make_grant, open_gate, send_grant


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    held = torch.zeros(2**30, dtype=torch.uint8, device="cuda")
    Spinner.warm_up()
    gate = open_gate(options=GateOptions(lease_s=60.0))
    spinner = Spinner()
    spinner.start(int(spinner.turns_per_second() * 30))
    send_grant(sock, *make_grant(gate))
    time.sleep(60)
    del held


if __name__ == "__main__":
    main()
