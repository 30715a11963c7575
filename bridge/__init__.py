"""Linen modules as nnx Modules, and nnx Modules as Linen modules."""

import importlib.util as _util

if _util.find_spec("flax") is None:
  raise ModuleNotFoundError(
    "`nnx.bridge` must have the package `flax`, but it is not installed."
    " Install it: `pip install flax`.",
    name="flax",
  )

from nnx import initializers as initializers
from nnx import register_variable_name as register_variable_name
from nnx import variable_name_from_type as variable_name_from_type
from nnx import variable_type_from_name as variable_type_from_name

from . import variables as variables
from .from_flax import from_flax_nnx as from_flax_nnx
from .in_module import linen_in_bridge_mdl as linen_in_bridge_mdl
from .in_module import nnx_in_bridge_mdl as nnx_in_bridge_mdl
from .init_apply import Functional as Functional
from .init_apply import functional as functional
from .module import Module as Module
from .module import compact as compact
from .module import current_module as current_module
from .module_context import AttrPriority as AttrPriority
from .module_context import Scope as Scope
from .module_context import current_context as current_context
from .to_linen_module import ToLinen as ToLinen
from .to_linen_module import to_linen as to_linen
from .to_linen_module import to_linen_class as to_linen_class
from .to_nnx import ToNNX as ToNNX
from .to_nnx import lazy_init as lazy_init
from .to_nnx import linen_variables as linen_variables
from .to_nnx import load_linen_variables as load_linen_variables
from .variables import NNXMeta as NNXMeta
from .variables import linen_vars_to_nnx_attrs as linen_vars_to_nnx_attrs
from .variables import nnx_attrs_to_linen_vars as nnx_attrs_to_linen_vars
from .variables import to_linen_var as to_linen_var
from .variables import to_nnx_var as to_nnx_var
from .variables import with_partitioning as with_partitioning
