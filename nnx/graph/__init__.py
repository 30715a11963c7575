"""Graph functions: between objects with shared references and pure states.

See README.md in this folder for how the C++ engine works.
"""

# The modules of the library import the engine, and modules here import them in
# turn: `nnx.graph` must only import what lies below `nnx.module`.
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
from nnx.graph.functional import IndexMap as IndexMap
from nnx.graph.functional import RefMap as RefMap
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
from nnx.graph.registry import Key as Key
from nnx.graph.registry import (
  register_graph_node_type as register_graph_node_type,
)
from nnx.graph.traversal import find_duplicates as find_duplicates
from nnx.graph.traversal import is_graph_node as is_graph_node
from nnx.graph.traversal import is_node as is_node
from nnx.graph.traversal import iter_children as iter_children
from nnx.graph.traversal import iter_graph as iter_graph
from nnx.graph.traversal import recursive_map as recursive_map
