"""Neural networks in jax with mutable objects, on a C++ engine.

Modules are Python objects whose state lives in Variables; `split`, `merge`,
`update` and the transforms carry it in and out of jax.
"""

import importlib as _importlib
import typing as _typing

from nnx import compat as compat
from nnx import errors as errors
from nnx import filterlib as filterlib
from nnx import graph as graph
from nnx import graphlib as graphlib
from nnx import neighbours as _neighbours
from nnx import nn as nn
from nnx import partitioning as partitioning
from nnx import pytreelib as pytreelib
from nnx import reprlib as reprlib
from nnx import rnglib as rnglib
from nnx import runtime as _runtime  # noqa: F401
from nnx import spmd as spmd
from nnx import statelib as statelib
from nnx import tracers as tracers
from nnx import traversals as traversals
from nnx import variablelib as variablelib
from nnx.containers import Dict as Dict
from nnx.containers import List as List
from nnx.containers import Sequential as Sequential
from nnx.errors import TraceContextError as TraceContextError
from nnx.filterlib import All as All
from nnx.filterlib import Any as Any
from nnx.filterlib import Everything as Everything
from nnx.filterlib import Not as Not
from nnx.filterlib import Nothing as Nothing
from nnx.filterlib import OfType as OfType
from nnx.filterlib import PathContains as PathContains
from nnx.filterlib import PathIn as PathIn
from nnx.filterlib import WithTag as WithTag
from nnx.graphlib.cached import cached_partial as cached_partial
from nnx.graphlib.contexts import MergeContext as MergeContext
from nnx.graphlib.contexts import SplitContext as SplitContext
from nnx.graphlib.contexts import UpdateContext as UpdateContext
from nnx.graphlib.contexts import (
  current_update_context as current_update_context,
)
from nnx.graphlib.contexts import merge_context as merge_context
from nnx.graphlib.contexts import split_context as split_context
from nnx.graphlib.contexts import update_context as update_context
from nnx.graphlib.definitions import GraphDef as GraphDef
from nnx.graphlib.definitions import GraphState as GraphState
from nnx.graphlib.definitions import NodeDef as NodeDef
from nnx.graphlib.definitions import PureState as PureState
from nnx.graphlib.definitions import call as call
from nnx.graphlib.extraction import NodeStates as NodeStates
from nnx.graphlib.extraction import from_tree as from_tree
from nnx.graphlib.extraction import to_tree as to_tree
from nnx.graphlib.flat import flatten as flatten
from nnx.graphlib.flat import unflatten as unflatten
from nnx.graphlib.functional import clone as clone
from nnx.graphlib.functional import graphdef as graphdef
from nnx.graphlib.functional import merge as merge
from nnx.graphlib.functional import pop as pop
from nnx.graphlib.functional import split as split
from nnx.graphlib.functional import state as state
from nnx.graphlib.functional import unpack as unpack
from nnx.graphlib.functional import update as update
from nnx.graphlib.functional import variables as variables
from nnx.graphlib.leaves import as_pure as as_pure
from nnx.graphlib.leaves import map as map
from nnx.graphlib.leaves import pure as pure
from nnx.graphlib.leaves import set_metadata as set_metadata
from nnx.graphlib.leaves import vars_as as vars_as
from nnx.graphlib.leaves import with_vars as with_vars
from nnx.graphlib.modes import set_graph_mode as set_graph_mode
from nnx.graphlib.modes import set_graph_updates as set_graph_updates
from nnx.graphlib.modes import set_named_scopes as set_named_scopes
from nnx.graphlib.registry import (
  register_graph_node_type as register_graph_node_type,
)
from nnx.graphlib.traversal import find_duplicates as find_duplicates
from nnx.graphlib.traversal import iter_graph as iter_graph
from nnx.graphlib.traversal import recursive_map as recursive_map
from nnx.in_place import use_updates_in_place as use_updates_in_place
from nnx.in_place import using_updates_in_place as using_updates_in_place
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
from nnx.nn.attention_cache import init_cache as init_cache
from nnx.nn.attention_cache import rewind_cache as rewind_cache
from nnx.nn.attention_step import AttentionStep as AttentionStep
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
from nnx.nn.quantized import Quantized as Quantized
from nnx.nn.quantized import QuantizedEmbed as QuantizedEmbed
from nnx.nn.quantized import QuantizedLinear as QuantizedLinear
from nnx.nn.quantized import quantize as quantize
from nnx.nn.recurrent import RNN as RNN
from nnx.nn.recurrent import Bidirectional as Bidirectional
from nnx.nn.recurrent import GRUCell as GRUCell
from nnx.nn.recurrent import LSTMCell as LSTMCell
from nnx.nn.recurrent import OptimizedLSTMCell as OptimizedLSTMCell
from nnx.nn.recurrent import RNNCellBase as RNNCellBase
from nnx.nn.recurrent import SimpleCell as SimpleCell
from nnx.nn.rope_scaling import Llama3Scaling as Llama3Scaling
from nnx.nn.rope_scaling import RopeScaling as RopeScaling
from nnx.nn.rope_scaling import YarnScaling as YarnScaling
from nnx.nn.rotary import RoPE as RoPE
from nnx.nn.rotary import (
  dot_product_attention_with_rope as dot_product_attention_with_rope,
)
from nnx.nn.stochastic import Dropout as Dropout
from nnx.nn.weight_normalization import SpectralNorm as SpectralNorm
from nnx.nn.weight_normalization import WeightNorm as WeightNorm
from nnx.partitioning import logical_axis_rules as logical_axis_rules
from nnx.pytreelib import Data as Data
from nnx.pytreelib import Object as Object
from nnx.pytreelib import Pytree as Pytree
from nnx.pytreelib import Static as Static
from nnx.pytreelib import check_pytree as check_pytree
from nnx.pytreelib import data as data
from nnx.pytreelib import dataclass as dataclass
from nnx.pytreelib import has_data as has_data
from nnx.pytreelib import is_data as is_data
from nnx.pytreelib import register_data_type as register_data_type
from nnx.pytreelib import static as static
from nnx.rnglib import ForkStates as ForkStates
from nnx.rnglib import RngCount as RngCount
from nnx.rnglib import RngKey as RngKey
from nnx.rnglib import Rngs as Rngs
from nnx.rnglib import RngState as RngState
from nnx.rnglib import RngStream as RngStream
from nnx.rnglib import SplitBackups as SplitBackups
from nnx.rnglib import backup_keys as backup_keys
from nnx.rnglib import fork as fork
from nnx.rnglib import fork_rngs as fork_rngs
from nnx.rnglib import reseed as reseed
from nnx.rnglib import restore_rngs as restore_rngs
from nnx.rnglib import split_rngs as split_rngs
from nnx.rnglib import with_rngs as with_rngs
from nnx.spmd import PARTITION_NAME as PARTITION_NAME
from nnx.spmd import abstract_with_sharding as abstract_with_sharding
from nnx.spmd import as_abstract as as_abstract
from nnx.spmd import get_abstract_model as get_abstract_model
from nnx.spmd import get_named_sharding as get_named_sharding
from nnx.spmd import get_partition_spec as get_partition_spec
from nnx.spmd import with_partitioning as with_partitioning
from nnx.spmd import with_sharding_constraint as with_sharding_constraint
from nnx.statelib import FlatState as FlatState
from nnx.statelib import State as State
from nnx.statelib import diff as diff
from nnx.statelib import filter_state as filter_state
from nnx.statelib import from_flat_state as from_flat_state
from nnx.statelib import map_state as map_state
from nnx.statelib import merge_state as merge_state
from nnx.statelib import replace_by_pure_dict as replace_by_pure_dict
from nnx.statelib import restore_int_paths as restore_int_paths
from nnx.statelib import split_state as split_state
from nnx.statelib import to_flat_state as to_flat_state
from nnx.statelib import to_pure_dict as to_pure_dict
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
from nnx.transforms.combinators import Pmap as Pmap
from nnx.transforms.combinators import Remat as Remat
from nnx.transforms.combinators import Scan as Scan
from nnx.transforms.combinators import Vmap as Vmap
from nnx.transforms.control_flow import cond as cond
from nnx.transforms.control_flow import fori_loop as fori_loop
from nnx.transforms.control_flow import switch as switch
from nnx.transforms.control_flow import while_loop as while_loop
from nnx.transforms.custom_vjp import CustomVjp as CustomVjp
from nnx.transforms.custom_vjp import custom_vjp as custom_vjp
from nnx.transforms.diff_states import DiffState as DiffState
from nnx.transforms.grad import grad as grad
from nnx.transforms.grad import value_and_grad as value_and_grad
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
from nnx.transforms.vjp import jvp as jvp
from nnx.transforms.vjp import vjp as vjp
from nnx.transforms.vmap import StateAxes as StateAxes
from nnx.transforms.vmap import pmap as pmap
from nnx.transforms.vmap import transform_metadata as transform_metadata
from nnx.transforms.vmap import vmap as vmap
from nnx.variablelib import A as A
from nnx.variablelib import BatchStat as BatchStat
from nnx.variablelib import Cache as Cache
from nnx.variablelib import Intermediate as Intermediate
from nnx.variablelib import Param as Param
from nnx.variablelib import Perturbation as Perturbation
from nnx.variablelib import Variable as Variable
from nnx.variablelib import VariableMetadata as VariableMetadata
from nnx.variablelib import VariableState as VariableState
from nnx.variablelib import register_variable_name as register_variable_name
from nnx.variablelib import (
  register_variable_name_type_pair as register_variable_name_type_pair,
)
from nnx.variablelib import use_eager_sharding as use_eager_sharding
from nnx.variablelib import using_eager_sharding as using_eager_sharding
from nnx.variablelib import var_defaults as var_defaults
from nnx.variablelib import variable_name_from_type as variable_name_from_type
from nnx.variablelib import variable_type_from_name as variable_type_from_name
from nnx.variablelib import with_metadata as with_metadata
from nnx.visualization import display as display

__version__ = "0.1.0"

_neighbours.find()

# Flax's other names of some modules.
filters = filterlib
pytree = pytreelib
reprs = reprlib
rngs = rnglib

if _typing.TYPE_CHECKING:
  from nnx import bridge as bridge
  from nnx import kernels as kernels
else:

  def __getattr__(name: str):
    if name in ("bridge", "kernels"):  # only when asked for: one imports flax
      return _importlib.import_module(f"nnx.{name}")
    raise AttributeError(f"module `nnx` has no attribute `{name}`")
