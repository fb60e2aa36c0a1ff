"""Our engine as another side of `versus vllm-plugin`, in a process of its own; speaks as vllm_worker does.

settings["total_bytes"] is what the process may take in all, so what its code takes is not the engine's.
"""

from __future__ import annotations

import json
import os
import resource
import sys
from pathlib import Path

from fluxmoe.experiments.lib.machines import Machine
from fluxmoe.experiments.lib.models import checkpoint_source
from fluxmoe.experiments.serving.engines import OurPeer
from fluxmoe.runtime.memory.budget import BudgetError, format_bytes
from fluxmoe.runtime.serving.config import EngineConfig

# Of numba's and LLVM's compiled code, which comes with the first pass.
_COMPILED_BYTES = 128 << 20


def main() -> None:
    settings = json.loads(sys.argv[1])
    context, total = settings["max_model_len"], settings["total_bytes"]
    if settings["device"] == "cpu":
        # As vLLM counts it: files that are mapped, too.
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        total -= pages * os.sysconf("SC_PAGE_SIZE") + _COMPILED_BYTES
    if total <= 0:
        raise BudgetError(f"code alone takes {format_bytes(settings['total_bytes'] - total)}")
    config = EngineConfig(
        max_batch=settings["max_batch"], max_context=context, budget_bytes=total, min_kv_tokens=context
    )
    peer = OurPeer(Machine(settings["device"]), checkpoint_source(settings["model"]), settings["placement"], config)
    print("RESULT " + json.dumps({"kv_tokens": peer.kv_tokens}), flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        timing = peer.run(job["prompts"], job["output_tokens"])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print("RESULT " + json.dumps(timing._replace(peak_bytes=peak)._asdict()), flush=True)
    peer.close()


if __name__ == "__main__":
    main()
