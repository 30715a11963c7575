"""Linen modules as nnx Modules, and nnx Modules as Linen modules."""

from bridge import variables as variables
from bridge.from_flax import from_flax_nnx as from_flax_nnx
from bridge.functional import Functional as Functional
from bridge.functional import functional as functional
from bridge.module import AttrPriority as AttrPriority
from bridge.module import Module as Module
from bridge.module import Scope as Scope
from bridge.module import compact as compact
from bridge.module import current_context as current_context
from bridge.module import current_module as current_module
from bridge.module import linen_in_bridge_mdl as linen_in_bridge_mdl
from bridge.module import nnx_in_bridge_mdl as nnx_in_bridge_mdl
from bridge.to_linen import ToLinen as ToLinen
from bridge.to_linen import to_linen as to_linen
from bridge.to_linen import to_linen_class as to_linen_class
from bridge.to_nnx import ToNNX as ToNNX
from bridge.to_nnx import lazy_init as lazy_init
from bridge.to_nnx import linen_variables as linen_variables
from bridge.to_nnx import load_linen_variables as load_linen_variables
from bridge.variables import NNXMeta as NNXMeta
from bridge.variables import linen_vars_to_nnx_attrs as linen_vars_to_nnx_attrs
from bridge.variables import nnx_attrs_to_linen_vars as nnx_attrs_to_linen_vars
from bridge.variables import to_linen_var as to_linen_var
from bridge.variables import to_nnx_var as to_nnx_var
from bridge.variables import with_partitioning as with_partitioning
from nnx import initializers as initializers
