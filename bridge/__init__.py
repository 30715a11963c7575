"""Linen modules as nnx Modules, and nnx Modules as Linen modules."""

from bridge import variables as variables
from bridge.functional import Functional as Functional
from bridge.functional import functional as functional
from bridge.to_linen import ToLinen as ToLinen
from bridge.to_linen import to_linen as to_linen
from bridge.to_linen import to_linen_class as to_linen_class
from bridge.to_nnx import ToNNX as ToNNX
from bridge.to_nnx import lazy_init as lazy_init
from bridge.variables import NNXMeta as NNXMeta
from bridge.variables import linen_vars_to_nnx_attrs as linen_vars_to_nnx_attrs
from bridge.variables import nnx_attrs_to_linen_vars as nnx_attrs_to_linen_vars
from bridge.variables import to_linen_var as to_linen_var
from bridge.variables import to_nnx_var as to_nnx_var
from bridge.variables import with_partitioning as with_partitioning
