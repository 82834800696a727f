"""One exception family: every message says what was expected, what came, and what to do."""


class CMLoRAError(Exception):
    """Base of all errors that this library raises on purpose."""


class ConfigError(CMLoRAError, ValueError):
    """A field of CMLoRAConfig is out of its range or contradicts another."""


class AdapterError(CMLoRAError):
    """An adapter is missing, fused, disabled, or of a kind that cannot be batched."""


class UnsupportedModelError(CMLoRAError, TypeError):
    """The pipeline or its UNet is not one that this library can run."""


class RunError(CMLoRAError, RuntimeError):
    """A denoising run does something that the method cannot follow."""
