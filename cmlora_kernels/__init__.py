"""Kernels for several LoRAs in one batch. torch and triton only; knows no diffusers and no pipeline."""

from cmlora_kernels.combine_noise import combine_noise
from cmlora_kernels.combine_places import combine_local, combine_regions
from cmlora_kernels.dominant import dominant_from_latents
from cmlora_kernels.feature_bank import concat_channels, scatter_rows
from cmlora_kernels.geglu import geglu
from cmlora_kernels.group_norm import group_norm_silu
from cmlora_kernels.merged_bank import merge_weights, merged_linear, merged_weight
from cmlora_kernels.modulated_norm import modulated_norm
from cmlora_kernels.multi_lora import multi_lora_add_, multi_lora_linear
from cmlora_kernels.multi_lora_conv2d import multi_lora_conv2d, multi_lora_conv2d_add_
from cmlora_kernels.multi_lora_gate import multi_lora_geglu
from cmlora_kernels.places import place_masks, place_strength
from cmlora_kernels.rotary_norm import rotary_norm
from cmlora_kernels.spectrum import high_frequency_share, radial_profile

__all__ = [
    "combine_local",
    "combine_noise",
    "combine_regions",
    "concat_channels",
    "dominant_from_latents",
    "geglu",
    "group_norm_silu",
    "high_frequency_share",
    "merge_weights",
    "merged_linear",
    "merged_weight",
    "modulated_norm",
    "multi_lora_add_",
    "multi_lora_conv2d",
    "multi_lora_conv2d_add_",
    "multi_lora_geglu",
    "multi_lora_linear",
    "place_masks",
    "place_strength",
    "radial_profile",
    "rotary_norm",
    "scatter_rows",
]
