"""The other process of `gate`: freezes the one that granted, and prints `ok` with latencies in seconds, or the reason."""

from __future__ import annotations

import socket
import sys
import time

from nvdriver.api import GateOptions, open_gate, receive_grant
from nvdriver.errors import NvDriverError


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[1]))
    try:
        grant, files = receive_grant(sock)
        if sys.argv[2] == "grant":
            for file in files:
                file.close()
            files = []
        with open_gate(grant, files, options=GateOptions(lease_s=5.0)) as gate:
            times = []
            for _ in range(50):
                started = time.perf_counter()
                gate.freeze()
                times.append(time.perf_counter() - started)
                gate.thaw()
                time.sleep(0.002)
        print("ok", *times)
    except NvDriverError as error:
        print(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
