"""The ops, one file each; adding one is a file and a line here."""

from . import attention as _attention
from . import attention_backward as _attention_backward
from . import cfg as _cfg
from . import conv3x3 as _conv3x3
from . import conv3x3_weight_gradient as _conv3x3_weight_gradient
from . import group_norm_linear as _group_norm_linear
from . import group_norm_silu as _group_norm_silu
from . import group_norm_silu_backward as _group_norm_silu_backward
from . import linear as _linear
from . import load_images as _load_images
from . import noising as _noising
from . import pack_conv3x3 as _pack_conv3x3
from . import randn as _randn
from . import step as _step
from . import teacher_step as _teacher_step
from . import weighted_mse as _weighted_mse
from . import weighted_mse_backward as _weighted_mse_backward
from .attention import attention
from .cfg import cfg
from .conv3x3 import conv3x3
from .group_norm_linear import group_norm_linear
from .group_norm_silu import group_norm_silu
from .linear import available as linear_available
from .linear import linear
from .linear import pack as pack_linear
from .load_images import load_images
from .noising import noising
from .pack_conv3x3 import available as conv3x3_available
from .pack_conv3x3 import pack_conv3x3
from .randn import randbits, randn, streams_of
from .step import step
from .teacher_step import teacher_step
from .weighted_mse import weighted_mse

OPS = {
    module.OP.name: module.OP.register()
    for module in (
        *(_step, _noising, _cfg, _randn, _linear),
        *(_pack_conv3x3, _conv3x3, _conv3x3_weight_gradient),
        *(_group_norm_silu, _group_norm_silu_backward, _group_norm_linear),
        *(_attention, _attention_backward, _weighted_mse, _weighted_mse_backward, _teacher_step),
        _load_images,
    )
}

__all__ = [
    "OPS",
    "attention",
    "cfg",
    "conv3x3",
    "conv3x3_available",
    "group_norm_linear",
    "group_norm_silu",
    "linear",
    "linear_available",
    "load_images",
    "noising",
    "pack_conv3x3",
    "pack_linear",
    "randbits",
    "randn",
    "step",
    "streams_of",
    "teacher_step",
    "weighted_mse",
]
