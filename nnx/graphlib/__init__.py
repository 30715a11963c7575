"""Graph functions: between objects with shared references and pure states.

README.md of `nnx/engine` says how the C++ engine under them works.
"""

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
from nnx.graphlib.flat import IndexMap as IndexMap
from nnx.graphlib.flat import RefMap as RefMap
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
from nnx.graphlib.registry import Key as Key
from nnx.graphlib.registry import (
  register_graph_node_type as register_graph_node_type,
)
from nnx.graphlib.traversal import find_duplicates as find_duplicates
from nnx.graphlib.traversal import is_graph_node as is_graph_node
from nnx.graphlib.traversal import is_node as is_node
from nnx.graphlib.traversal import iter_children as iter_children
from nnx.graphlib.traversal import iter_graph as iter_graph
from nnx.graphlib.traversal import recursive_map as recursive_map
