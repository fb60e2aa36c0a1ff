"""vLLM's own load on a server, `vllm bench serve`, whose command needs a distribution of another name than the CPU's.

    python -m tests_vllm.load URL TOKENIZER RESULTS CLIENTS …

For each number of clients, four requests each, random tokens, 16 in and 8 out. RESULTS, JSON: what it says of each.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

REQUESTS, TOKENS = 4, 8


def load(url: str, tokenizer: str, clients: int) -> dict:
    arguments = {
        "backend": "openai", "base-url": url, "model": "model", "tokenizer": tokenizer, "dataset-name": "random",
        "random-input-len": 16, "random-output-len": TOKENS, "num-prompts": REQUESTS * clients,
        "max-concurrency": clients,
    }  # fmt: skip
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    given = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    return main(parser.parse_args([*given, "--ignore-eos", "--disable-tqdm"]))


if __name__ == "__main__":
    url, tokenizer, results, *clients = sys.argv[1:]
    said = [load(url, tokenizer, int(each)) for each in clients]
    Path(results).write_text(json.dumps(said, default=str))
