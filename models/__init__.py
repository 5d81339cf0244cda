"""The network: a transformers backbone with exits and policies; reads no file, loops over no data."""

from offramp.models.families import Family, family_of, supported_families
from offramp.models.network import EarlyExitNetwork, NetworkSpec, WalkOutputs

__all__ = ["EarlyExitNetwork", "Family", "NetworkSpec", "WalkOutputs", "family_of", "supported_families"]
