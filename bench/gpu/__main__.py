"""`python -m bench.gpu SECTION --out FOLDER [--dry-run]`: one section; `report` makes the table of all."""

from __future__ import annotations

import argparse
import importlib
import time
from pathlib import Path

SECTIONS = ("environment", "ceilings", "kernels", "tokens", "models", "throughput", "gate", "vmm", "colocation")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("section", choices=(*SECTIONS, "report"))
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON files and the table")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes on the CPU: does the code run at all")
    parser.add_argument("--only", default="", help="of the models: the one with this name")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds until whoever started this ends it")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.section == "report":
        from bench.gpu.report import write_table

        write_table(args.out, SECTIONS)
        return
    from bench.gpu.common import Bench, Skip

    bench = Bench(f"{args.section}_{args.only}" if args.only else args.section, args.dry_run, args.out, args.limit)
    started = time.monotonic()
    try:
        if not args.dry_run:
            from engine.kernels import cuda

            if reason := cuda.unavailable():
                raise Skip(reason)
        module = importlib.import_module(f"bench.gpu.{args.section}")
        module.run(bench, *([args.only] if args.only else []))
    except Exception as error:
        bench.row(args.section, None, "", note=f"{'skipped' if isinstance(error, Skip) else 'failed'}: {error}")
        if not isinstance(error, Skip):
            bench.save(args.out, time.monotonic() - started)
            raise
    bench.save(args.out, time.monotonic() - started)


if __name__ == "__main__":
    main()
