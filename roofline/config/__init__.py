"""What a model is and how an engine runs it: frozen, checked when built, composed. No torch here.

Derived sizes are returned by functions, never written back; the environment is read by
`environment_options` alone.
"""

from roofline.config.engine import (
    CHANNEL,
    DEFAULT_GROUP_SIZE,
    GROUP_SIZES,
    EngineConfig,
    StepLimits,
    WeightFormat,
    check_option,
    environment_options,
    option_path,
    parse_option,
)
from roofline.config.model import PRESETS, ModelConfig, RopeScaling
from roofline.config.parallel import UNIT, ParallelConfig

__all__ = [
    "CHANNEL",
    "DEFAULT_GROUP_SIZE",
    "GROUP_SIZES",
    "PRESETS",
    "UNIT",
    "EngineConfig",
    "ModelConfig",
    "ParallelConfig",
    "RopeScaling",
    "StepLimits",
    "WeightFormat",
    "check_option",
    "environment_options",
    "option_path",
    "parse_option",
]
