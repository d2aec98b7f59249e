"""A child that stands in for an offline worker: `toy_worker.py CONTROL_FD NUM_SLABS MODE [TAG]`.

spin      makes progress, stands still while the FROZEN word is 1
deaf      makes progress, whatever the word says
mortal    makes progress until it sees FROZEN, and dies
report    writes reports without end, each of which can be checked by itself
see       reports what it sees of the slabs, without end
"""

from __future__ import annotations

import os
import sys
import time

from engine.colocate.control import ControlPage, Word


def report(tag: int, number: int) -> dict[str, object]:
    """A report whose parts must agree, of a length that changes."""
    return {"tag": tag, "number": number, "echo": [number] * (number % 700), "end": number}


def main() -> None:
    mode, tag = sys.argv[3], int(sys.argv[4])
    control = ControlPage(int(sys.argv[2]), int(sys.argv[1]))
    number = 0
    while True:
        number += 1
        if mode == "report":
            control.write_report(report(tag, number))
        elif mode == "see":
            generation = control[Word.GENERATION]
            control.write_report([generation, [control.slab(slab) for slab in range(control.num_slabs)]])
        elif mode == "mortal" and control[Word.FROZEN]:
            os._exit(1)
        while mode == "spin" and control[Word.FROZEN]:
            time.sleep(1e-4)
        control[Word.PROGRESS_NS] = time.monotonic_ns()
        control[Word.PROGRESS] += 1


if __name__ == "__main__":
    main()
