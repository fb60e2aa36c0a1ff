"""Budget, placement, expert store, streaming slots, KV cache, scheduler, engine. Knows kernels and models."""
