"""vLLM's own load on a server, `vllm bench serve`, whose command asks for a distribution that the CPU's is not."""

from __future__ import annotations

from typing import Any

from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser

# Of each client, of each request.
REQUESTS, OUTPUT_TOKENS = 4, 8


def load(url: str, tokenizer: str, clients: int) -> dict[str, Any]:
    """What it says of so many clients with REQUESTS each, random tokens, 16 in and OUTPUT_TOKENS out."""
    arguments = {
        "backend": "openai", "base-url": url, "model": "model", "tokenizer": tokenizer, "dataset-name": "random",
        "random-input-len": 16, "random-output-len": OUTPUT_TOKENS, "num-prompts": REQUESTS * clients,
        "max-concurrency": clients,
    }  # fmt: skip
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    given = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    return main(parser.parse_args([*given, "--ignore-eos", "--disable-tqdm"]))
