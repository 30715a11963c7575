"""Jit, Remat, Vmap and Scan: Modules whose methods are transformed.

The manner of Flax 0.10; a transform around a function does the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
import functools
import operator
from typing import Any

from nnx.graphlib import modes
from nnx.module import Module
from nnx.transforms import by_filters
from nnx.transforms import jit as jit_lib
from nnx.transforms import remat as remat_lib

# The mode of Flax 0.10.
_GRAPH = modes.Mode.GRAPH.arguments


class _Method:
  """What to call on a Module: names and items to look up, one after another."""

  def __init__(self, lifted: LiftedModule, steps: tuple[Any, ...]):
    self._lifted = lifted
    self._steps = steps

  def __getattr__(self, name: str) -> _Method:
    return _Method(self._lifted, (*self._steps, (getattr, name)))

  def __getitem__(self, key: Any) -> _Method:
    return _Method(self._lifted, (*self._steps, (operator.getitem, key)))

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    lifted = self._lifted
    run = lifted._transformed(self._steps)
    return run(lifted._submodule, *args, **kwargs)


def _by_method(
  transform: Callable[[Callable[..., Any]], Callable[..., Any]],
) -> Callable[[tuple[Any, ...]], Callable[..., Any]]:
  """Makes one transformed function for each method, and keeps it."""

  @functools.lru_cache(maxsize=256)
  def transformed(steps: tuple[Any, ...]) -> Callable[..., Any]:
    def call(module, *args, **kwargs):
      for look_up, name in steps:
        module = look_up(module, name)
      return module(*args, **kwargs)

    return transform(call)

  return transformed


class LiftedModule(Module):
  """A Module that calls another one under a transform.

  `lifted(...)` calls the Module inside, `lifted.call.method(...)` a method of
  it. Subclasses are `Jit`, `Remat`, `Vmap`, `Pmap` and `Scan`.

  Example:

    >>> import nnx
    >>> embed = nnx.Jit.constructor(nnx.Embed)(4, 3, rngs=nnx.Rngs(0))
    >>> embed.call.attend(embed(2)).shape
    (4,)
  """

  _transformed: Callable[[tuple[Any, ...]], Callable[..., Any]]
  _inside: str  # The attribute that holds the Module.

  @property
  def _submodule(self) -> Any:
    return getattr(self, self._inside)

  @property
  def call(self) -> Any:
    """The Module inside, to call methods of under the transform."""
    method = _Method(self, ())
    return method.call if isinstance(self._submodule, LiftedModule) else method

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    """Calls the Module inside under the transform."""
    return self.call(*args, **kwargs)

  @classmethod
  def constructor(
    cls, module_constructor: Callable[..., Any], **options: Any
  ) -> Callable[..., Any]:
    """Returns a function of the arguments of `module_constructor`.

    Args:
      module_constructor: makes the Module inside, say its class.
      **options: those of the transform; see the class.

    Returns:
      A function that makes the Module and puts it inside of a new one of this
      class.
    """

    def construct(*args: Any, **kwargs: Any) -> LiftedModule:
      return cls(
        module_constructor=module_constructor,
        module_init_args=args,
        module_init_kwargs=kwargs,
        **options,
      )

    return construct


class _OfMethods(LiftedModule):
  """One whose methods are transformed, but not how its Module is made."""

  _transform: Callable[..., Any]

  def __init__(
    self,
    module_constructor: Callable[..., Any],
    *,
    module_init_args: tuple[Any, ...] = (),
    module_init_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
  ):
    self._transformed = _by_method(
      functools.partial(type(self)._transform, **options)
    )
    self.module_constructor = module_constructor
    inside = module_constructor(*module_init_args, **module_init_kwargs or {})
    setattr(self, self._inside, inside)


class Jit(_OfMethods):
  """A Module whose methods are compiled by `nnx.jit`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> linear = nnx.Jit.constructor(nnx.Linear)(2, 3, rngs=nnx.Rngs(0))
    >>> linear(jnp.ones((1, 2))).shape, linear.jit_module.kernel.shape
    ((1, 3), (2, 3))

  Args:
    module_constructor: makes the Module inside.
    module_init_args: its positional arguments.
    module_init_kwargs: its keyword arguments.
    **options: those of `nnx.jit`; argument 0 is the Module.
  """

  _inside = "jit_module"
  _transform = staticmethod(functools.partial(jit_lib.jit, **_GRAPH))


class Remat(_OfMethods):
  """A Module whose methods are under `nnx.remat`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> linear = nnx.Remat.constructor(nnx.Linear)(2, 3, rngs=nnx.Rngs(0))
    >>> linear(jnp.ones((1, 2))).shape, linear.remat_module.kernel.shape
    ((1, 3), (2, 3))

  Args:
    module_constructor: as in `nnx.Jit`.
    module_init_args: the same.
    module_init_kwargs: the same.
    **options: those of `nnx.remat`; argument 0 is the Module.
  """

  _inside = "remat_module"
  _transform = staticmethod(functools.partial(remat_lib.remat, **_GRAPH))


class Vmap(LiftedModule):
  """Modules made and called under `nnx.vmap`, as one.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> Layers = nnx.Vmap.constructor(
    ...   nnx.Linear, state_axes={nnx.Param: 0}, axis_size=5
    ... )
    >>> layers = Layers(2, 3, rngs=nnx.Rngs(0))
    >>> layers.vmap_module.kernel.shape, layers(jnp.ones((5, 1, 2))).shape
    ((5, 2, 3), (5, 1, 3))

  Args:
    module_constructor: makes the Module inside. It runs once, mapped: its
      arguments are the same for all, but for their split streams.
    in_axes: an axis or `None` for each positional argument of a call, or one
      for all; argument 0 is the Module.
    out_axes: the axis of the result.
    axis_name: as in `nnx.vmap`.
    axis_size: the same; needed to make the Module.
    spmd_axis_name: the same.
    in_axes_kwargs: the axis of keyword arguments.
    state_axes: axes of Variables by filter; others are the same for all.
    split_rngs: a filter of the streams of which each element gets its own keys;
      others are the same for all.
    transform_metadata: as in `nnx.vmap`.
    module_init_args: positional arguments for `module_constructor`.
    module_init_kwargs: its keyword arguments.
  """

  _inside = "vmap_module"

  def __init__(
    self,
    module_constructor: Callable[..., Any],
    *,
    in_axes: Any = 0,
    out_axes: Any = 0,
    axis_name: Any = None,
    axis_size: int | None = None,
    spmd_axis_name: Any = None,
    in_axes_kwargs: Any = 0,
    state_axes: Mapping[Any, Any] = by_filters.ALL_MAPPED,
    split_rngs: Any = ...,
    transform_metadata: Mapping[str, Any] | None = None,
    module_init_args: tuple[Any, ...] = (),
    module_init_kwargs: Mapping[str, Any] | None = None,
  ):
    transform = functools.partial(
      by_filters.vmap,
      axis_name=axis_name,
      axis_size=axis_size,
      spmd_axis_name=spmd_axis_name,
      state_axes=state_axes,
      split_rngs=split_rngs,
      transform_metadata=transform_metadata,
    )
    construct = transform(
      module_constructor, in_axes=None, in_axes_kwargs=None, out_axes=None
    )
    self.module_constructor = module_constructor
    self.vmap_module = construct(*module_init_args, **module_init_kwargs or {})
    self._transformed = _by_method(
      functools.partial(
        transform,
        in_axes=in_axes,
        in_axes_kwargs=in_axes_kwargs,
        out_axes=out_axes,
      )
    )


class Pmap(LiftedModule):
  """Modules made under `nnx.vmap` and called under `nnx.pmap`, one a device.

  Example:

    >>> import jax
    >>> import jax.numpy as jnp
    >>> import nnx
    >>> n = jax.device_count()
    >>> layers = nnx.Pmap.constructor(nnx.Linear, axis_size=n)(
    ...   2, 3, rngs=nnx.Rngs(0)
    ... )
    >>> layers.pmap_module.kernel.shape == (n, 2, 3)
    True
    >>> layers(jnp.ones((n, 1, 2))).shape == (n, 1, 3)
    True

  Args:
    module_constructor: as in `nnx.Vmap`.
    axis_name: as in `nnx.pmap`.
    in_axes: as in `nnx.Vmap`.
    out_axes: the axis of the result.
    static_broadcasted_argnums: must be empty: a method gets its arguments
      mapped.
    devices: as in `nnx.pmap`.
    backend: the same.
    axis_size: the same; needed to make the Module.
    donate_argnums: must be empty.
    global_arg_shapes: must be None; jax has given it up.
    in_axes_kwargs: as in `nnx.Vmap`.
    state_axes: the same.
    split_rngs: the same.
    transform_metadata: as in `nnx.pmap`.
    module_init_args: positional arguments for `module_constructor`.
    module_init_kwargs: its keyword arguments.
  """

  _inside = "pmap_module"

  def __init__(
    self,
    module_constructor: Callable[..., Any],
    *,
    axis_name: Any = None,
    in_axes: Any = 0,
    out_axes: Any = 0,
    static_broadcasted_argnums: Any = (),
    devices: Any = None,
    backend: str | None = None,
    axis_size: int | None = None,
    donate_argnums: Any = (),
    global_arg_shapes: Any = None,
    in_axes_kwargs: Any = 0,
    state_axes: Mapping[Any, Any] = by_filters.ALL_MAPPED,
    split_rngs: Any = ...,
    transform_metadata: Mapping[str, Any] | None = None,
    module_init_args: tuple[Any, ...] = (),
    module_init_kwargs: Mapping[str, Any] | None = None,
  ):
    by_filters.check_left_out(
      static_broadcasted_argnums=static_broadcasted_argnums,
      donate_argnums=donate_argnums,
      global_arg_shapes=global_arg_shapes,
    )
    self.module_constructor = module_constructor
    self.pmap_module = Vmap(
      module_constructor,
      axis_name=axis_name,
      axis_size=axis_size,
      state_axes=state_axes,
      split_rngs=split_rngs,
      transform_metadata=transform_metadata,
      module_init_args=module_init_args,
      module_init_kwargs=module_init_kwargs,
    ).vmap_module
    self._transformed = _by_method(
      functools.partial(
        by_filters.pmap,
        axis_name=axis_name,
        in_axes=in_axes,
        out_axes=out_axes,
        devices=devices,
        backend=backend,
        axis_size=axis_size,
        in_axes_kwargs=in_axes_kwargs,
        state_axes=state_axes,
        split_rngs=split_rngs,
        transform_metadata=transform_metadata,
      )
    )


class Scan(LiftedModule):
  """Modules made under `nnx.vmap` and called one after another, by `nnx.scan`.

  Example:

    >>> import jax.numpy as jnp
    >>> import nnx
    >>> Layers = nnx.Scan.constructor(
    ...   nnx.Linear, state_axes={nnx.Param: 0}, length=5, scan_output=False
    ... )
    >>> layers = Layers(3, 3, rngs=nnx.Rngs(0))
    >>> layers.scan_module.kernel.shape, layers(jnp.ones((1, 3))).shape
    ((5, 3, 3), (1, 3))

  Args:
    module_constructor: as in `nnx.Vmap`.
    length: the number of iterations; needed to make the Module.
    reverse: as in `nnx.scan`.
    unroll: the same.
    _split_transpose: the same.
    in_axes: an axis for each positional argument of a call, or `None` for what
      is the same for all iterations, or one for all; argument 0 is the Module.
    in_axes_kwargs: the axis of keyword arguments.
    out_axes: the axis of the results that are not the carry.
    carry_argnum: which argument is the carry.
    state_axes: axes of Variables by filter; others are carried.
    split_rngs: as in `nnx.Vmap`.
    transform_metadata: as in `nnx.scan`.
    scan_output: whether methods return a pair of the carry and results that
      are stacked, instead of the carry.
    module_init_args: as in `nnx.Vmap`.
    module_init_kwargs: the same.
  """

  _inside = "scan_module"

  def __init__(
    self,
    module_constructor: Callable[..., Any],
    *,
    length: int | None = None,
    reverse: bool = False,
    unroll: int | bool = 1,
    _split_transpose: bool = False,
    in_axes: Any = 0,
    in_axes_kwargs: Any = 0,
    out_axes: Any = 0,
    carry_argnum: int = 1,
    state_axes: Mapping[Any, Any] = by_filters.ALL_MAPPED,
    split_rngs: Any = ...,
    transform_metadata: Mapping[str, Any] | None = None,
    scan_output: bool = True,
    module_init_args: tuple[Any, ...] = (),
    module_init_kwargs: Mapping[str, Any] | None = None,
  ):
    self.module_constructor = module_constructor
    self.scan_module = Vmap(
      module_constructor,
      axis_size=length,
      state_axes=state_axes,
      split_rngs=split_rngs,
      transform_metadata=transform_metadata,
      module_init_args=module_init_args,
      module_init_kwargs=module_init_kwargs,
    ).vmap_module
    self._transformed = _by_method(
      functools.partial(
        by_filters.scan,
        length=length,
        reverse=reverse,
        unroll=unroll,
        _split_transpose=_split_transpose,
        in_axes=in_axes,
        in_axes_kwargs=in_axes_kwargs,
        out_axes=out_axes,
        carry_argnum=carry_argnum,
        state_axes=state_axes,
        split_rngs=split_rngs,
        transform_metadata=transform_metadata,
        scan_output=scan_output,
      )
    )
