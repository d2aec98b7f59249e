"""A process that stands in for the main process, to be stopped and killed: `toy_main.py CONTROL_FD NUM_SLABS`.

Starts a deaf toy worker and a guardian, prints their process ids, and obeys lines: "freeze", "thaw". Freezes again when told
that the guardian thawed the worker, as the owner of the gate must.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

from engine.colocate.control import ControlPage
from engine.colocate.gate import ProcessGate
from engine.colocate.guardian import Guardian


def main() -> None:
    control = ControlPage(int(sys.argv[2]), int(sys.argv[1]))
    toy = Path(__file__).parent / "toy_worker.py"
    worker = subprocess.Popen(
        [sys.executable, str(toy), sys.argv[1], sys.argv[2], "deaf", "0"], pass_fds=[control.fd], stdin=subprocess.DEVNULL
    )
    gate = ProcessGate(control, worker.pid)
    guardian = Guardian(control)
    guardian.start()
    guardian.watch(worker.pid)
    lock = threading.Lock()
    frozen = False

    def beat() -> None:
        while True:
            with lock:
                if guardian.check() and frozen:
                    gate.freeze()
            time.sleep(0.05)

    threading.Thread(target=beat, daemon=True).start()
    print(worker.pid, guardian.pid, flush=True)
    for line in sys.stdin:
        with lock:
            frozen = line.strip() == "freeze"
            (gate.freeze if frozen else gate.thaw)()
        print("done", flush=True)


if __name__ == "__main__":
    main()
