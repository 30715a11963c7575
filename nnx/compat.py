"""The names of `flax.nnx.compat`, for programs that spell them so.

They are the functions of `nnx` in graph mode with updates, whatever the
switches say.

Example:

  >>> import nnx
  >>> tied = [nnx.Param(1.0)] * 2
  >>> with nnx.set_graph_mode(False):
  ...   graphdef, state = nnx.compat.split(tied)
  >>> list(state)
  [0]
"""

import functools
import typing

from nnx.graphlib.cached import cached_partial as cached_partial
from nnx.graphlib.flat import flatten as flatten
from nnx.graphlib.functional import clone as clone
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
from nnx.rnglib import fork_rngs as fork_rngs
from nnx.rnglib import reseed as reseed
from nnx.rnglib import split_rngs as split_rngs
from nnx.spmd import get_abstract_model as get_abstract_model
from nnx.transforms.control_flow import cond as cond
from nnx.transforms.control_flow import fori_loop as fori_loop
from nnx.transforms.control_flow import switch as switch
from nnx.transforms.control_flow import while_loop as while_loop
from nnx.transforms.custom_vjp import custom_vjp as custom_vjp
from nnx.transforms.grad import grad as grad
from nnx.transforms.grad import value_and_grad as value_and_grad
from nnx.transforms.jit import jit as jit
from nnx.transforms.remat import remat as remat
from nnx.transforms.scan import scan as scan
from nnx.transforms.sharded import shard_map as shard_map
from nnx.transforms.tracing import checkify as checkify
from nnx.transforms.tracing import eval_shape as eval_shape
from nnx.transforms.vjp import jvp as jvp
from nnx.transforms.vjp import vjp as vjp
from nnx.transforms.vmap import pmap as pmap
from nnx.transforms.vmap import vmap as vmap

if not typing.TYPE_CHECKING:  # They keep their types.
  _graph = functools.partial(functools.partial, graph=True)
  backup_keys = _graph(backup_keys)
  clone = _graph(clone)
  flatten = _graph(flatten)
  get_abstract_model = _graph(get_abstract_model)
  graphdef = _graph(graphdef)
  iter_children = _graph(iter_children)
  iter_graph = _graph(iter_graph)
  iter_modules = _graph(iter_modules)
  recursive_map = _graph(recursive_map)
  reseed = _graph(reseed)
  split = _graph(split)
  state = _graph(state)
  view = _graph(view)
  view_info = _graph(view_info)

  _updates = functools.partial(_graph, graph_updates=True)
  cached_partial = _updates(cached_partial)
  checkify = _updates(checkify)
  cond = _updates(cond)
  custom_vjp = _updates(custom_vjp)
  eval_shape = _updates(eval_shape)
  fori_loop = _updates(fori_loop)
  fork_rngs = _updates(fork_rngs)
  grad = _updates(grad)
  jit = _updates(jit)
  jvp = _updates(jvp)
  pmap = _updates(pmap)
  remat = _updates(remat)
  scan = _updates(scan)
  shard_map = _updates(shard_map)
  split_rngs = _updates(split_rngs)
  switch = _updates(switch)
  value_and_grad = _updates(value_and_grad)
  vjp = _updates(vjp)
  vmap = _updates(vmap)
  while_loop = _updates(while_loop)
