"""transformers' generate as another side of versus_vllm; speaks as vllm_worker does.

It knows no paged KV cache: requests are served in static batches, as many at a time as settings["max_batch"] says.
"""

import json
import sys
import time


def main() -> None:
    settings = json.loads(sys.argv[1])
    import torch
    from transformers import AutoModelForCausalLM

    device = settings["device"]
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=getattr(torch, settings["dtype"]), local_files_only=True
    )
    model = model.to(device).eval()
    print("RESULT {}", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        new, at_once = job["output_tokens"], settings["max_batch"]
        begin = time.perf_counter()
        for start in range(0, len(job["prompts"]), at_once):
            ids = torch.tensor(job["prompts"][start : start + at_once], device=device)
            with torch.inference_mode():
                out = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                    pad_token_id=0,
                )  # fmt: skip
            assert out.shape[1] == ids.shape[1] + new
        print("RESULT " + json.dumps({"seconds": time.perf_counter() - begin}), flush=True)


if __name__ == "__main__":
    main()
