"""llama.cpp as a side of `versus walls`: runs under a Python that has llama-cpp-python, and imports nothing of ours.

The weights are mapped (`mmap`), as llama.cpp does by itself, so behind a wall the kernel keeps what it can of them. All
prompts are one batch and one pass. unified: one KV cache for all sequences, which takes no more than they need; else
each has its own, which is faster and rounded up to 256 tokens.
"""

import ctypes
import json
import sys

import llama_cpp as llama
import numpy as np
import phases


class Llama:
    """A GGUF file with room for `sequences` of `context` tokens each, of which `prompt_tokens` come at once."""

    def __init__(self, model, threads, sequences, context, prompt_tokens, unified):
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.load_mode = llama.LLAMA_LOAD_MODE_MMAP
        self._model = llama.llama_model_load_from_file(model.encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        settings = llama.llama_context_default_params()
        settings.n_ctx, settings.n_seq_max = sequences * context, sequences
        settings.n_batch = settings.n_ubatch = sequences * prompt_tokens
        settings.n_outputs_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = unified
        self._context = llama.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp cannot make a context")
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._batch = llama.llama_batch_init(sequences * prompt_tokens, 0, 1)
        self._last, self._length = [], 0

    def prefill(self, prompts, most):
        self.keep(0)
        self._run([(token, at, sequence, at == len(ids) - 1) for sequence, ids in enumerate(prompts)
                   for at, token in enumerate(ids)])  # fmt: skip
        self._length = len(prompts[0])
        return self._last

    def decode(self):
        self._run([(token, self._length, sequence, True) for sequence, token in enumerate(self._last)])
        self._length += 1
        return len(self._last)

    def keep(self, count):
        memory = llama.llama_get_memory(self._context)
        for sequence in range(count, len(self._last)):
            llama.llama_memory_seq_rm(memory, sequence, -1, -1)
        self._last = self._last[:count]

    def counted(self):
        return {}

    held = counted

    def _run(self, entries):
        """One pass over (token, position, sequence, whether its logits are asked for); the last tokens are theirs."""
        batch = self._batch
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, wanted) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = llama.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode ended with {status}")
        self._last = [self._best(i) for i, (_, _, _, wanted) in enumerate(entries) if wanted]

    def _best(self, i):
        logits = llama.llama_get_logits_ith(self._context, i)
        return int(np.ctypeslib.as_array(ctypes.cast(logits, ctypes.POINTER(ctypes.c_float)), (self._vocab,)).argmax())


if __name__ == "__main__":
    phases.serve(Llama(**json.loads(sys.argv[1])))
