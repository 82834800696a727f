"""Kernels for several LoRAs in one batch. torch and triton only; knows no diffusers and no pipeline."""

from cmlora_kernels.combine_noise import combine_noise
from cmlora_kernels.feature_bank import gather_concat, scatter_rows
from cmlora_kernels.merged_bank import merge_weights, merged_linear
from cmlora_kernels.multi_lora import multi_lora_add_, multi_lora_conv2d, multi_lora_linear
from cmlora_kernels.spectrum import high_frequency_share, radial_profile, select_dominant

__all__ = [
    "combine_noise",
    "gather_concat",
    "high_frequency_share",
    "merge_weights",
    "merged_linear",
    "multi_lora_add_",
    "multi_lora_conv2d",
    "multi_lora_linear",
    "radial_profile",
    "scatter_rows",
    "select_dominant",
]
