"""Several LoRAs in one image, as one batch: CMLoRA (arXiv 2502.04923) and its family for diffusers pipelines."""

from cmlora.accelerate import accelerate, accelerated, restore, summary, supported_pipelines
from cmlora.config import CMLoRAConfig
from cmlora.errors import AdapterError, CMLoRAError, ConfigError, RunError, UnsupportedModelError
from cmlora.summary import Summary
from cmlora.warming import warm_up

__all__ = [
    "AdapterError",
    "CMLoRAConfig",
    "CMLoRAError",
    "ConfigError",
    "RunError",
    "Summary",
    "UnsupportedModelError",
    "accelerate",
    "accelerated",
    "restore",
    "summary",
    "supported_pipelines",
    "warm_up",
]
