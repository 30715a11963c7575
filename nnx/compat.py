"""The names of `flax.nnx.compat`, for programs that spell them so.

Flax keeps here its functions with the graph mode switched on, whatever the
switches say. Those that no mode changes are the functions of `nnx` themselves.

Example:

  >>> import nnx
  >>> nnx.compat.jit is nnx.jit
  True
"""

import functools

from nnx import rnglib
from nnx.graphlib.functional import cached_partial as cached_partial
from nnx.graphlib.functional import clone as clone
from nnx.graphlib.functional import flatten as flatten
from nnx.graphlib.functional import graphdef as graphdef
from nnx.graphlib.functional import split as split
from nnx.graphlib.functional import state as state
from nnx.graphlib.traversal import iter_graph as iter_graph
from nnx.graphlib.traversal import recursive_map as recursive_map
from nnx.module import iter_children as iter_children
from nnx.module import iter_modules as iter_modules
from nnx.module import view as view
from nnx.module import view_info as view_info
from nnx.rnglib import backup_keys as backup_keys
from nnx.rnglib import reseed as reseed
from nnx.spmd import get_abstract_model as get_abstract_model
from nnx.transforms import custom_vjp as custom_vjp_lib
from nnx.transforms import grad as grad_lib
from nnx.transforms.control_flow import cond as cond
from nnx.transforms.control_flow import fori_loop as fori_loop
from nnx.transforms.control_flow import switch as switch
from nnx.transforms.control_flow import while_loop as while_loop
from nnx.transforms.grad import jvp as jvp
from nnx.transforms.grad import vjp as vjp
from nnx.transforms.jit import jit as jit
from nnx.transforms.remat import remat as remat
from nnx.transforms.scan import scan as scan
from nnx.transforms.sharded import shard_map as shard_map
from nnx.transforms.tracing import checkify as checkify
from nnx.transforms.tracing import eval_shape as eval_shape
from nnx.transforms.vmap import pmap as pmap
from nnx.transforms.vmap import vmap as vmap

_as_graphs = functools.partial(
  functools.partial, graph=True, graph_updates=True
)
custom_vjp = _as_graphs(custom_vjp_lib.custom_vjp)
fork_rngs = _as_graphs(rnglib.fork_rngs)
grad = _as_graphs(grad_lib.grad)
split_rngs = _as_graphs(rnglib.split_rngs)
value_and_grad = _as_graphs(grad_lib.value_and_grad)
