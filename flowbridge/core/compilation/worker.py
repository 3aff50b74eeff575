"""Compile an exported program in a process of its own: ``python -m flowbridge.core.compilation.worker JOB``.

A compiler that crashes, or needs more memory than there is, then takes nothing else with it, and its threads and caches
do not meet those of a running simulation.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any


def compile_program(program: Path, package: Path, options: dict[str, Any]) -> None:
    """Compile the exported program in one file to a package in another, and run it once."""
    import torch
    import torch._inductor

    warnings.simplefilter("ignore")  # of torch about its own internals
    torch.set_num_threads(1)
    exported = torch.export.load(program)
    compile_package = torch._inductor.aoti_compile_and_package
    try:
        # Without trying out every instruction set that the processor says it has, which takes a third of a small compilation.
        compile_package(exported, package_path=str(package), inductor_configs={**options, "cpp.vec_isa_ok": True})
    except Exception:
        compile_package(exported, package_path=str(package), inductor_configs=options)
    example, _ = exported.example_inputs or ((), {})
    # In this process a crash of the compiled code is only a failed compilation.
    torch._inductor.aoti_load_package(str(package))(*example)


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    compile_program(Path(job["program"]), Path(job["package"]), job["options"])
