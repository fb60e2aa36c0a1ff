"""The research engine: scheduler, KV cache, the one serving loop; a host of the pager."""
