"""The ops, one file each; adding one is a file and a line here."""

from . import cfg as _cfg
from . import noising as _noising
from . import randn as _randn
from . import step as _step
from .cfg import cfg
from .noising import noising
from .randn import randbits, randn, streams_of
from .step import step

OPS = {module.OP.name: module.OP.register() for module in (_step, _noising, _cfg, _randn)}

__all__ = ["OPS", "cfg", "noising", "randbits", "randn", "step", "streams_of"]
