"""Neural networks in jax with mutable objects, on a C++ engine.

Modules are Python objects whose state lives in Variables; `split`, `merge`,
`update` and the transforms carry it in and out of jax.
"""

import importlib as _importlib
import sys as _sys

# `state`, `variables` and `display` are functions that take the names of
# modules. What imports those modules by name, the engine's side, must come
# before the functions, as it does in alphabetical order.
# The second name of a module is the one that it has in Flax.
from nnx import compat as compat
from nnx import errors as errors
from nnx import filters as filterlib  # noqa: F401
from nnx import filters as filters
from nnx import graph as graph
from nnx import graph as graphlib  # noqa: F401
from nnx import nn as nn
from nnx import partitioning as partitioning
from nnx import pytree as pytree
from nnx import pytree as pytreelib  # noqa: F401
from nnx import reprs as reprlib  # noqa: F401
from nnx import reprs as reprs
from nnx import rngs as rnglib  # noqa: F401
from nnx import rngs as rngs
from nnx import spmd as spmd
from nnx import state as statelib  # noqa: F401
from nnx import traversals as traversals
from nnx import variables as variablelib  # noqa: F401
from nnx.containers import Dict as Dict
from nnx.containers import List as List
from nnx.containers import Sequential as Sequential
from nnx.display import display as display
from nnx.errors import TraceContextError as TraceContextError
from nnx.filters import All as All
from nnx.filters import Any as Any
from nnx.filters import Everything as Everything
from nnx.filters import Not as Not
from nnx.filters import Nothing as Nothing
from nnx.filters import OfType as OfType
from nnx.filters import PathContains as PathContains
from nnx.filters import PathIn as PathIn
from nnx.filters import WithTag as WithTag
from nnx.graph import runtime as _runtime  # noqa: F401
from nnx.graph.contexts import MergeContext as MergeContext
from nnx.graph.contexts import SplitContext as SplitContext
from nnx.graph.contexts import UpdateContext as UpdateContext
from nnx.graph.contexts import current_update_context as current_update_context
from nnx.graph.contexts import merge_context as merge_context
from nnx.graph.contexts import split_context as split_context
from nnx.graph.contexts import update_context as update_context
from nnx.graph.definitions import GraphDef as GraphDef
from nnx.graph.definitions import GraphState as GraphState
from nnx.graph.definitions import NodeDef as NodeDef
from nnx.graph.definitions import PureState as PureState
from nnx.graph.definitions import call as call
from nnx.graph.extraction import NodeStates as NodeStates
from nnx.graph.extraction import from_tree as from_tree
from nnx.graph.extraction import to_tree as to_tree
from nnx.graph.functional import as_pure as as_pure
from nnx.graph.functional import cached_partial as cached_partial
from nnx.graph.functional import clone as clone
from nnx.graph.functional import flatten as flatten
from nnx.graph.functional import graphdef as graphdef
from nnx.graph.functional import map as map
from nnx.graph.functional import merge as merge
from nnx.graph.functional import pop as pop
from nnx.graph.functional import pure as pure
from nnx.graph.functional import set_metadata as set_metadata
from nnx.graph.functional import split as split
from nnx.graph.functional import state as state
from nnx.graph.functional import unflatten as unflatten
from nnx.graph.functional import unpack as unpack
from nnx.graph.functional import update as update
from nnx.graph.functional import variables as variables
from nnx.graph.functional import vars_as as vars_as
from nnx.graph.functional import with_vars as with_vars
from nnx.graph.modes import set_graph_mode as set_graph_mode
from nnx.graph.modes import set_graph_updates as set_graph_updates
from nnx.graph.registry import (
  register_graph_node_type as register_graph_node_type,
)
from nnx.graph.traversal import find_duplicates as find_duplicates
from nnx.graph.traversal import iter_graph as iter_graph
from nnx.graph.traversal import recursive_map as recursive_map
from nnx.module import Module as Module
from nnx.module import capture as capture
from nnx.module import iter_children as iter_children
from nnx.module import iter_module_children as iter_module_children
from nnx.module import iter_modules as iter_modules
from nnx.module import view as view
from nnx.module import view_info as view_info
from nnx.module import with_attributes as with_attributes
from nnx.nn import initializers as initializers
from nnx.nn.activations import PReLU as PReLU
from nnx.nn.activations import celu as celu
from nnx.nn.activations import elu as elu
from nnx.nn.activations import gelu as gelu
from nnx.nn.activations import glu as glu
from nnx.nn.activations import hard_sigmoid as hard_sigmoid
from nnx.nn.activations import hard_silu as hard_silu
from nnx.nn.activations import hard_swish as hard_swish
from nnx.nn.activations import hard_tanh as hard_tanh
from nnx.nn.activations import identity as identity
from nnx.nn.activations import leaky_relu as leaky_relu
from nnx.nn.activations import log_sigmoid as log_sigmoid
from nnx.nn.activations import log_softmax as log_softmax
from nnx.nn.activations import logsumexp as logsumexp
from nnx.nn.activations import one_hot as one_hot
from nnx.nn.activations import relu as relu
from nnx.nn.activations import relu6 as relu6
from nnx.nn.activations import selu as selu
from nnx.nn.activations import sigmoid as sigmoid
from nnx.nn.activations import silu as silu
from nnx.nn.activations import soft_sign as soft_sign
from nnx.nn.activations import softmax as softmax
from nnx.nn.activations import softplus as softplus
from nnx.nn.activations import standardize as standardize
from nnx.nn.activations import swish as swish
from nnx.nn.activations import tanh as tanh
from nnx.nn.attention import MultiHeadAttention as MultiHeadAttention
from nnx.nn.attention import combine_masks as combine_masks
from nnx.nn.attention import dot_product_attention as dot_product_attention
from nnx.nn.attention import make_attention_mask as make_attention_mask
from nnx.nn.attention import make_causal_mask as make_causal_mask
from nnx.nn.conv import Conv as Conv
from nnx.nn.conv import ConvTranspose as ConvTranspose
from nnx.nn.embed import Embed as Embed
from nnx.nn.initializers import Initializer as Initializer
from nnx.nn.linear import Einsum as Einsum
from nnx.nn.linear import Linear as Linear
from nnx.nn.linear import LinearGeneral as LinearGeneral
from nnx.nn.lora import LoRA as LoRA
from nnx.nn.lora import LoRALinear as LoRALinear
from nnx.nn.lora import LoRAParam as LoRAParam
from nnx.nn.normalization import BatchNorm as BatchNorm
from nnx.nn.normalization import GroupNorm as GroupNorm
from nnx.nn.normalization import InstanceNorm as InstanceNorm
from nnx.nn.normalization import LayerNorm as LayerNorm
from nnx.nn.normalization import RMSNorm as RMSNorm
from nnx.nn.pooling import avg_pool as avg_pool
from nnx.nn.pooling import max_pool as max_pool
from nnx.nn.pooling import min_pool as min_pool
from nnx.nn.pooling import pool as pool
from nnx.nn.recurrent import RNN as RNN
from nnx.nn.recurrent import Bidirectional as Bidirectional
from nnx.nn.recurrent import GRUCell as GRUCell
from nnx.nn.recurrent import LSTMCell as LSTMCell
from nnx.nn.recurrent import OptimizedLSTMCell as OptimizedLSTMCell
from nnx.nn.recurrent import RNNCellBase as RNNCellBase
from nnx.nn.recurrent import SimpleCell as SimpleCell
from nnx.nn.rotary import RoPE as RoPE
from nnx.nn.rotary import (
  dot_product_attention_with_rope as dot_product_attention_with_rope,
)
from nnx.nn.stochastic import Dropout as Dropout
from nnx.nn.weight_normalization import SpectralNorm as SpectralNorm
from nnx.nn.weight_normalization import WeightNorm as WeightNorm
from nnx.partitioning import logical_axis_rules as logical_axis_rules
from nnx.pytree import Data as Data
from nnx.pytree import Object as Object
from nnx.pytree import Pytree as Pytree
from nnx.pytree import Static as Static
from nnx.pytree import check_pytree as check_pytree
from nnx.pytree import data as data
from nnx.pytree import dataclass as dataclass
from nnx.pytree import has_data as has_data
from nnx.pytree import is_data as is_data
from nnx.pytree import register_data_type as register_data_type
from nnx.pytree import static as static
from nnx.rngs import RngCount as RngCount
from nnx.rngs import RngKey as RngKey
from nnx.rngs import Rngs as Rngs
from nnx.rngs import RngState as RngState
from nnx.rngs import RngStream as RngStream
from nnx.rngs import SplitBackups as SplitBackups
from nnx.rngs import backup_keys as backup_keys
from nnx.rngs import fork_rngs as fork_rngs
from nnx.rngs import reseed as reseed
from nnx.rngs import restore_rngs as restore_rngs
from nnx.rngs import split_rngs as split_rngs
from nnx.rngs import with_rngs as with_rngs
from nnx.spmd import PARTITION_NAME as PARTITION_NAME
from nnx.spmd import abstract_with_sharding as abstract_with_sharding
from nnx.spmd import as_abstract as as_abstract
from nnx.spmd import get_abstract_model as get_abstract_model
from nnx.spmd import get_named_sharding as get_named_sharding
from nnx.spmd import get_partition_spec as get_partition_spec
from nnx.spmd import with_partitioning as with_partitioning
from nnx.spmd import with_sharding_constraint as with_sharding_constraint
from nnx.state import FlatState as FlatState
from nnx.state import State as State
from nnx.state import diff as diff
from nnx.state import filter_state as filter_state
from nnx.state import from_flat_state as from_flat_state
from nnx.state import map_state as map_state
from nnx.state import merge_state as merge_state
from nnx.state import replace_by_pure_dict as replace_by_pure_dict
from nnx.state import restore_int_paths as restore_int_paths
from nnx.state import split_state as split_state
from nnx.state import to_flat_state as to_flat_state
from nnx.state import to_pure_dict as to_pure_dict
from nnx.summary import tabulate as tabulate
from nnx.training import metrics as metrics
from nnx.training import optimizer as optimizer
from nnx.training.ema import EMA as EMA
from nnx.training.metrics import Metric as Metric
from nnx.training.metrics import MultiMetric as MultiMetric
from nnx.training.optimizer import ModelAndOptimizer as ModelAndOptimizer
from nnx.training.optimizer import OptArray as OptArray
from nnx.training.optimizer import Optimizer as Optimizer
from nnx.training.optimizer import OptState as OptState
from nnx.training.optimizer import OptVariable as OptVariable
from nnx.training.train_state import TrainState as TrainState
from nnx.transforms.carry import Carry as Carry
from nnx.transforms.combinators import Jit as Jit
from nnx.transforms.combinators import Remat as Remat
from nnx.transforms.combinators import Scan as Scan
from nnx.transforms.combinators import Vmap as Vmap
from nnx.transforms.control_flow import cond as cond
from nnx.transforms.control_flow import fori_loop as fori_loop
from nnx.transforms.control_flow import switch as switch
from nnx.transforms.control_flow import while_loop as while_loop
from nnx.transforms.custom_vjp import CustomVjp as CustomVjp
from nnx.transforms.custom_vjp import custom_vjp as custom_vjp
from nnx.transforms.grad import DiffState as DiffState
from nnx.transforms.grad import grad as grad
from nnx.transforms.grad import jvp as jvp
from nnx.transforms.grad import value_and_grad as value_and_grad
from nnx.transforms.grad import vjp as vjp
from nnx.transforms.jit import JitWrapped as JitWrapped
from nnx.transforms.jit import StateSharding as StateSharding
from nnx.transforms.jit import jit as jit
from nnx.transforms.jit import jit_partial as jit_partial
from nnx.transforms.prefix import prefix as prefix
from nnx.transforms.remat import remat as remat
from nnx.transforms.scan import scan as scan
from nnx.transforms.sharded import shard_map as shard_map
from nnx.transforms.tracing import checkify as checkify
from nnx.transforms.tracing import eval_shape as eval_shape
from nnx.transforms.tracing import make_jaxpr as make_jaxpr
from nnx.transforms.vmap import StateAxes as StateAxes
from nnx.transforms.vmap import pmap as pmap
from nnx.transforms.vmap import transform_metadata as transform_metadata
from nnx.transforms.vmap import vmap as vmap
from nnx.variables import A as A
from nnx.variables import BatchStat as BatchStat
from nnx.variables import Cache as Cache
from nnx.variables import Intermediate as Intermediate
from nnx.variables import Param as Param
from nnx.variables import Perturbation as Perturbation
from nnx.variables import Variable as Variable
from nnx.variables import VariableMetadata as VariableMetadata
from nnx.variables import VariableState as VariableState
from nnx.variables import register_variable_name as register_variable_name
from nnx.variables import (
  register_variable_name_type_pair as register_variable_name_type_pair,
)
from nnx.variables import use_eager_sharding as use_eager_sharding
from nnx.variables import using_eager_sharding as using_eager_sharding
from nnx.variables import var_defaults as var_defaults
from nnx.variables import variable_name_from_type as variable_name_from_type
from nnx.variables import variable_type_from_name as variable_type_from_name
from nnx.variables import with_metadata as with_metadata

# Importable by their second names too: `from nnx.variablelib import Param`.
for _name in (
  "filterlib",
  "graphlib",
  "pytreelib",
  "reprlib",
  "rnglib",
  "statelib",
  "variablelib",
):
  _sys.modules[f"{__name__}.{_name}"] = globals()[_name]


def __getattr__(name: str):
  if name == "bridge":  # imports flax, so only when asked for
    return _importlib.import_module("nnx.bridge")
  raise AttributeError(f"module `nnx` has no attribute `{name}`")
