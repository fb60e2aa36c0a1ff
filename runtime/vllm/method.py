"""FluxMoEMethod: one layer's experts, as vLLM makes, loads and calls them.

Weights are parameters on the meta device, which take no memory: the loader brings matrices one by one, and each expert
goes to its tier as soon as it has all three.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fluxmoe.kernels.ops import ExpertDims
from fluxmoe.models.config import load_config
from fluxmoe.models.packed import PackedExperts
from torch import Tensor
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoEQuantConfig
from vllm.model_executor.models.utils import extract_layer_index
from vllm.model_executor.utils import set_weight_attrs

from ..experts.config import SettingError
from .host import Host
from .loading import Assembly
from .operation import handle_of


class FluxMoEMethod(FusedMoEMethodBase):
    """moe: vLLM's FusedMoEConfig of the layer; name: of the layer in the model; model: directory or name of the
    checkpoint. SettingError for experts of another kind than SwiGLU without bias, in bf16 or fp32."""

    # Nothing of it has to be brought to the device after loading.
    requires_device_loading = False

    def __init__(self, moe: Any, name: str, host: Host, model: str) -> None:
        super().__init__(moe)
        extras = [what for what, has in (("biases", moe.has_bias), ("a clamp", moe.swiglu_limit is not None)) if has]
        if moe.activation.value != "silu" or extras:
            raise SettingError(
                f"--quantization fluxmoe: {name} has experts with {' and '.join([moe.activation.value, *extras])}; "
                "only SwiGLU experts (silu) without biases and clamps are served"
            )
        self.name, self.host, self.model = name, host, Path(model)

    @property
    def is_monolithic(self) -> bool:
        return False

    def get_fused_moe_quant_config(self, layer: torch.nn.Module) -> Any:
        return FusedMoEQuantConfig.make()

    # Loading.

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **attributes: Any,
    ) -> None:
        """num_experts: of this rank."""
        if params_dtype not in (torch.bfloat16, torch.float32):
            raise SettingError(f"--quantization fluxmoe serves bf16 or fp32 experts, got {params_dtype}; give --dtype")
        self.dims = ExpertDims(
            hidden_size, intermediate_size_per_partition, num_experts, self.moe.experts_per_token, params_dtype
        )
        self.layer = self.host.add_layer(self.dims)
        layer.register_buffer("fluxmoe_handle", handle_of(self.host, self.layer), persistent=False)
        self._local = layer._map_global_expert_id_to_local_expert_id
        self._assembly = Assembly(
            self.name, self.dims, lambda *expert: self.host.put(self.layer, *expert), self.moe.tp_rank, self.moe.tp_size
        )
        for name, shape in zip(("w13_weight", "w2_weight"), self.dims.shapes, strict=True):
            weight = torch.empty(num_experts, *shape, dtype=params_dtype, device="meta")
            parameter = torch.nn.Parameter(weight, requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self._load})
            layer.register_parameter(name, parameter)

    def _load(
        self, param: Tensor, loaded_weight: Tensor, weight_name: str, shard_id: str, expert_id: int,
        return_success: bool = False,
    ) -> bool | None:  # fmt: skip
        """vLLM's weight loader: a whole matrix of an expert, of any rank. Returns whether it is one of ours."""
        local = self._local(expert_id)
        if local != -1:
            self._assembly.add(local, shard_id, loaded_weight)
        return local != -1 if return_success else None

    def process_weights_after_loading(self, layer: Any) -> None:
        if PackedExperts.in_directory(self.model):
            self._load_packed()
        self._assembly.finish()
        del layer.w13_weight, layer.w2_weight
        self.host.loaded()

    def _load_packed(self) -> None:
        """The layer of a packed checkpoint, of which vLLM's loader sees all but the experts."""
        packed, number = PackedExperts(self.model, load_config(self.model)), extract_layer_index(self.name)
        for _, expert, gate_up, down in packed.experts(lambda layer, expert: layer == number):
            gate, up = gate_up.chunk(2)
            for matrix, weight in (("w1", gate), ("w3", up), ("w2", down)):
                self._load(weight, weight, "", matrix, expert)

    # Serving.

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x [T, H]; topk_ids, topk_weights [T, top_k], ids of all ranks' experts → [T, H], this rank's share of the
        sum. Shared experts are the runner's."""
        if layer.expert_map is not None:
            topk_ids = layer.expert_map[topk_ids.long()]
        if layer.apply_router_weight_on_input:
            # Only with one expert a token, which then gets the scaled token.
            x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
        return torch.ops.fluxmoe.experts(x, topk_ids, topk_weights, layer.fluxmoe_handle)
