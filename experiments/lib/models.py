"""Where a model comes from: a checkpoint, a published model's config, or a preset made on first use."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from fluxmoe.models import ARCHITECTURES
from fluxmoe.models.checkpoint import Checkpoint
from fluxmoe.models.config import ModelConfig, load_config
from fluxmoe.models.published import PUBLISHED, published_config

from .args import known, option
from .checkpoints import ModelShape, hf_config, write_checkpoint
from .results import UsageError, digest, write_json


@dataclass(frozen=True)
class Preset:
    """A model that is made and a workload that suits it."""

    model: ModelShape
    requests: int
    context: int
    output_tokens: int
    max_batch: int
    budgets: tuple[str, ...]


_SMALL_MOE = ModelShape(
    arch="qwen3_moe", layers=8, experts=32, top_k=4, hidden=512, moe_intermediate=512, heads=8, kv_heads=8,
    head_dim=64, vocab=8192, max_positions=4096,
)  # fmt: skip

_QWEN3_WIDE = ModelShape(
    arch="qwen3_moe", layers=8, experts=64, top_k=8, hidden=2048, moe_intermediate=768, heads=32, kv_heads=4,
    head_dim=128, vocab=32768, max_positions=2048,
)  # fmt: skip

PRESETS = {
    # Ends within 4 minutes on two cores.
    "demo": Preset(
        replace(_SMALL_MOE, layers=6), requests=32, context=320, output_tokens=96, max_batch=32,
        budgets=("96MiB", "144MiB", "224MiB", "320MiB", "352MiB", "416MiB", "512MiB"),
    ),
    # The committed figure: 403 MB of experts, KV of a full batch 537 MB.
    "small": Preset(
        _SMALL_MOE, requests=64, context=512, output_tokens=128, max_batch=64,
        budgets=("144MiB", "176MiB", "208MiB", "256MiB", "304MiB", "352MiB", "384MiB", "432MiB", "464MiB", "496MiB",
                 "560MiB", "688MiB", "960MiB"),
    ),
    # Five times as large: 2.0 GB of experts, KV of a full batch 537 MB.
    "medium": Preset(
        replace(_SMALL_MOE, experts=64, hidden=1024, moe_intermediate=640, heads=16), requests=64, context=512,
        output_tokens=128, max_batch=64,
        budgets=("512MiB", "768MiB", "1GiB", "1536MiB", "2GiB", "2560MiB"),
    ),
    # Qwen3-Next's kinds of layers: 403 MB of experts, recurrent states of a full batch 27 MB, its KV 134 MB.
    "next": Preset(
        replace(_SMALL_MOE, arch="qwen3_next", experts=64, top_k=6, moe_intermediate=256), requests=64, context=512,
        output_tokens=128, max_batch=64,
        budgets=("160MiB", "256MiB", "352MiB", "448MiB", "512MiB", "640MiB"),
    ),
    # Deep, as the paper's models: an eighth of the layers is more than two slots hold. 302 and 352 MB of experts.
    "deep-next": Preset(
        replace(_SMALL_MOE, arch="qwen3_next", layers=24, moe_intermediate=128, kv_heads=4),
        requests=32, context=512, output_tokens=128, max_batch=32, budgets=("384MiB", "512MiB"),
    ),
    "deep-mixtral": Preset(
        replace(_SMALL_MOE, arch="mixtral", layers=32, experts=8, top_k=2, hidden=256, moe_intermediate=896,
                head_dim=32),
        requests=32, context=512, output_tokens=128, max_batch=32, budgets=("384MiB", "512MiB"),
    ),
    # OLMoE-1B-7B's true size, 13.8 GB, for `versus walls`.
    "olmoe-1b-7b": Preset(
        ModelShape(
            arch="olmoe", layers=16, experts=64, top_k=8, hidden=2048, moe_intermediate=1024, heads=16, kv_heads=16,
            head_dim=128, vocab=50304, max_positions=4096),
        requests=32, context=128, output_tokens=32, max_batch=32, budgets=("4GB", "6GB", "8GB", "12GB"),
    ),
    # For rehearsals: seconds, whatever the machine.
    "tiny": Preset(
        ModelShape(
            arch="qwen3_moe", layers=2, experts=4, top_k=2, hidden=128, moe_intermediate=128, heads=2, kv_heads=2,
            head_dim=64, vocab=512, max_positions=256),
        requests=2, context=40, output_tokens=4, max_batch=2, budgets=("64MiB",),
    ),
    # Layers of Qwen3-30B-A3B's width on a GPU, made and loaded in seconds: 2.4 GB of experts.
    "gpu-short": Preset(
        replace(_QWEN3_WIDE, layers=4), requests=128, context=1024, output_tokens=64, max_batch=64,
        budgets=("2304MiB", "2816MiB", "3584MiB"),
    ),
    # The same, deeper: 4.8 GB of experts, KV of a full batch 1.1 GB.
    "gpu": Preset(
        _QWEN3_WIDE, requests=128, context=1024, output_tokens=128, max_batch=64,
        budgets=("1GiB", "2GiB", "3GiB", "4GiB", "5GiB", "5632MiB", "6GiB", "7GiB"),
    ),
    # The shape of Qwen3-Next-80B-A3B in all but depth: 8 layers of 48, 25.8 GB.
    "gpu-next": Preset(
        ModelShape(
            arch="qwen3_next", layers=8, experts=512, top_k=10, hidden=2048, moe_intermediate=512, heads=16,
            kv_heads=2, head_dim=256, vocab=32768, max_positions=4096),
        requests=128, context=2048, output_tokens=128, max_batch=64,
        budgets=("8GiB", "16GiB", "24GiB", "28GiB", "32GiB"),
    ),
}  # fmt: skip


class Source(NamedTuple):
    """What to serve. checkpoint: None for a model that is known by its config alone."""

    checkpoint: Path | None
    config: ModelConfig
    name: str

    @property
    def weights(self) -> Path:
        """The checkpoint; UsageError if there is none."""
        if self.checkpoint is None:
            raise UsageError(f"{self.name} has no weights here: it can only be simulated, with --device sim")
        return self.checkpoint

    @property
    def content(self) -> str:
        """Changes with the model, whatever its name: a digest of its config, and of its weights if it has any."""
        has_weights = self.checkpoint is not None and any(self.checkpoint.glob("*.safetensors"))
        return digest(asdict(self.config), Checkpoint(self.weights).content if has_weights else None)


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """One of a checkpoint, a preset and, where a command also simulates, a published model."""

    model: str | None = option("Hugging Face checkpoint", None, metavar="DIR")
    preset: str | None = option("a model that is made if needed", None, choices=tuple(sorted(PRESETS)))
    config: str | None = option(
        f"a published model by name, simulated: {', '.join(PUBLISHED)}; or FILE.yaml, which holds settings", None,
        metavar="NAME",
    )  # fmt: skip
    checkpoints: Path = option("where presets keep their model", Path("checkpoints"))

    def __post_init__(self) -> None:
        if sum(value is not None for value in (self.model, self.preset, self.config)) != 1:
            raise UsageError("give one of --model, --preset and --config: what to serve")

    @property
    def architecture(self) -> ModelConfig:
        """The model's config; nothing is made."""
        if self.config:
            return published_source(self.config).config
        return preset_config(self.preset) if self.preset else load_config(self.model or "")

    def source(self, simulated: bool = False) -> Source:
        """The model; a preset is made if needed. simulated: whether weights are needed at all."""
        if self.config:
            if not simulated:
                raise UsageError("--config names a model without weights: it needs --device sim")
            return published_source(self.config)
        return preset_source(self.preset, self.checkpoints) if self.preset else checkpoint_source(self.model or "")


def checkpoint_source(directory: str) -> Source:
    return Source(Path(directory), load_config(Path(directory)), directory)


def check_context(context: int, model: ModelConfig) -> None:
    """UsageError where a model takes no sequence so long."""
    if context > model.max_position_embeddings:
        raise UsageError(f"--context {context} is beyond the model's limit of {model.max_position_embeddings}")


def published_source(name: str) -> Source:
    """A published model by its name, in any case; UsageError says which there are."""
    name = known(name, PUBLISHED, "published model")
    return Source(None, published_config(name), name)


def preset_source(name: str, checkpoints: Path) -> Source:
    """A preset's model, made on first use."""
    checkpoint = preset_model(name, checkpoints)
    return Source(checkpoint, load_config(checkpoint), name)


def preset_config(name: str) -> ModelConfig:
    """What a preset's model would be, without making it."""
    spec = PRESETS[name].model
    return ARCHITECTURES[spec.arch].config_from_hf(hf_config(spec))


def simulated_preset(name: str) -> Source:
    """A preset's model by its config alone."""
    return Source(None, preset_config(name), name)


def preset_model(name: str, directory: Path, seed: int = 0, router_skew: float = 0.0) -> Path:
    """The preset's checkpoint, made on first use; one with uneven routers has a folder of its own."""
    skew = {"router_skew": router_skew} if router_skew else {}
    target, shape = directory / (f"{name}-skew{router_skew:g}" if skew else name), PRESETS[name].model
    wanted = json.loads(json.dumps(asdict(shape) | {"seed": seed} | skew))
    marker = target / "preset.json"
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        return target
    if target.exists():
        raise UsageError(f"{target} holds another model than preset {name} wants; remove it or give --checkpoints")
    write_checkpoint(shape, target, seed, router_skew=router_skew)
    write_json(marker, wanted)
    return target
