"""FluxMoE inside vLLM: `vllm serve MODEL --quantization fluxmoe [--additional-config '{"fluxmoe": {…}}']`.

    __init__    the entry point
    config      vLLM's QuantizationConfig: which layers are ours
    settings    PagingConfig from --additional-config and the environment
    kv_tokens   the least paging that leaves so much KV cache
    room        what vLLM has for experts and KV cache
    kv_cache    how much KV cache it then has, and would have without us
    method      vLLM's FusedMoEMethodBase: one layer, its weights and its call
    loading     experts, put together from the matrices that a loader brings
    paged_model all layers of a model around one ExpertPager
    hook        `vllm_kernels`: where layers that vLLM makes are ours, whatever their method
    unchanged   vLLM's RoutedExperts with its own method, over tensors that are streamed
    streamed_layers  all of these layers of a model around one streamer
    graph_passes  passes inside CUDA graphs that vLLM captures and launches
    offloader   vLLM's hooks around these
    operation   a layer as one operation, which torch.compile and graphs take as it is
    features    what vLLM can do and we cannot
    report      what a user is told: where experts lie, and what was brought
    metrics     the same as counters at /metrics

Only `config`, `hook`, `room`, `kv_cache`, `method`, `offloader` and `unchanged` import vLLM. Written for vLLM 0.32
(MoERunner and RoutedExperts).
"""

from __future__ import annotations

import os
import sys


def register() -> None:
    """Entry point `vllm.general_plugins`: make `fluxmoe` a quantization method.

    vLLM calls it in each of its processes, more than once, whatever is served: it loads no kernels, and changes nothing
    that a run without us would see, but for how many threads numba will have.
    """
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS, register_quantization_config

    # vLLM pins a worker's main thread to one core. Numba counts the cores that the thread may use when it is imported,
    # which for vLLM is soon after this, and has no more threads ever after: once they run, another number is an error.
    running = getattr(sys.modules.get("numba.np.ufunc.parallel"), "_is_initialized", False)
    if not running and (threads := os.environ.get("OMP_NUM_THREADS", "")).isdigit():
        os.environ.setdefault("NUMBA_NUM_THREADS", threads)
    if "fluxmoe" not in QUANTIZATION_METHODS:
        from .config import FluxMoEConfig

        register_quantization_config("fluxmoe")(FluxMoEConfig)
    from .hook import hook_layers

    hook_layers()
