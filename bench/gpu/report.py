"""The table of all sections, from their JSON files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from bench.gpu.common import Row, line


def write_table(folder: Path, sections: Sequence[str]) -> None:
    """Print the table and leave it in `gpu_check.txt`."""
    lines: list[str] = []
    for section in sections:
        files = sorted(folder.glob(f"gpu_{section}.json")) + sorted(folder.glob(f"gpu_{section}_*.json"))
        if not files:
            lines += [f"== {section}: no result (out of time, or it died; see gpu_check.log)", ""]
        for file in files:
            result = json.loads(file.read_text(encoding="utf-8"))
            dry = ", DRY RUN: the numbers mean nothing" if result["dry_run"] else ""
            lines.append(f"== {result['section']} ({result['seconds']} s{dry})")
            lines += [*(line(Row(**row)) for row in result["rows"]), ""]
    text = "\n".join(lines)
    (folder / "gpu_check.txt").write_text(text + "\n", encoding="utf-8")
    print(text)
