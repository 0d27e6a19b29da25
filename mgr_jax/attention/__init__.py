"""The registry of mechanisms. A new one is its own file, whose `MECHANISM` is the record, and one line in `_FILES`."""

import dataclasses
import itertools
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import jax

from mgr_jax.attention import reversible
from mgr_jax.attention.mechanism import Context, Mechanism
from mgr_jax.config import GPTConfig, Item, build_options, config_problems, layer_items, nearest
from mgr_jax.problems import Problem, UserError, raise_if_any

_FILES = (
  "standard",
  "tropical",
  "ultrametric",
  "simplicial",
  "quaternion",
  "octonion",
  "braid",
  "fractal",
  "surreal",
  "reversible",
  "gauge",
)

REGISTRY: dict[str, Mechanism] = {file: import_module(f"{__name__}.{file}").MECHANISM for file in _FILES}


class Layer(NamedTuple):
  """One layer's mechanism and its options, and those of the reversible stack around it, if any."""

  mechanism: Mechanism
  options: Any
  wrap: reversible.Options | None = None


def register(mechanism: Mechanism) -> None:
  """Makes a mechanism known in this process, or replaces the one of its name.

  A mechanism that stays is a file and a line in `_FILES`. Compiled programs know mechanisms by name: they are dropped.
  """
  REGISTRY[mechanism.name] = mechanism
  jax.clear_caches()


def attention_names() -> tuple[str, ...]:
  """Names of all registered mechanisms."""
  return tuple(REGISTRY)


def resolve(cfg: GPTConfig) -> tuple[Layer, ...]:
  """The mechanism and options of each of `cfg.n_layer` layers.

  Raises:
    UserError: unknown names (with the nearest match), bad options, options that do not fit the configuration.
  """
  problems, layers = {}, []
  for item in layer_items(cfg.attention, cfg.n_layer):
    try:
      layers.append(_look_up(item, cfg.attention))
      _check_fit(cfg, layers[-1])
    except ValueError as e:
      problems |= dict.fromkeys(_problems_of(e, item))
  raise_if_any(problems)
  return tuple(layers)


def _check_fit(cfg: GPTConfig, layer: Layer) -> None:
  if layer.wrap is not None:
    reversible.check(cfg, layer.wrap, layer.mechanism.name, layer.options)
    cfg = reversible.inner_config(cfg, layer.wrap)
  layer.mechanism.param_specs(cfg, layer.options)


def with_options(cfg: GPTConfig, layers: Sequence[Any]) -> GPTConfig:
  """`cfg` with other options, one per layer; the grammar names every option that is not at its default."""
  items = []
  for layer, options in zip(resolve(cfg), layers, strict=True):
    item = Item(layer.mechanism.name, _changed(options, layer.mechanism.options))
    if layer.wrap is not None:
      item = Item("reversible", _changed(layer.wrap, reversible.Options), item)
    items.append(str(item))
  grouped = [(item, len(list(group))) for item, group in itertools.groupby(items)]
  attention = ",".join(item if n == 1 or len(grouped) == 1 else f"{item}*{n}" for item, n in grouped)
  return dataclasses.replace(cfg, attention=attention)


def _changed(options, options_class: type) -> tuple[tuple[str, str], ...]:
  """Grammar pairs of the options that are not at their default."""
  values = [(f.name, getattr(options, f.name)) for f in dataclasses.fields(options)]
  values = [(name, value) for name, value in values if value != getattr(options_class, name)]
  return tuple((name, str(value).lower() if isinstance(value, bool) else str(value)) for name, value in values)


def _look_up(item: Item, attention: str) -> Layer:
  record = REGISTRY.get(item.name)
  if record is None:
    hint = f"{nearest(item.name, attention_names())}known names: {', '.join(attention_names())}"
    raise UserError(Problem(f"unknown attention {item.name!r} in --attention={attention!r}", hint))
  options = build_options(record.options, item.options, item.name)
  if record.wrapper:
    inner = _look_up(item.inner or Item("standard"), attention)
    if inner.wrap is not None:
      raise UserError(Problem(f"{item} wraps a wrapper", f"write {item.inner}, whose layers are reversible already"))
    return Layer(inner.mechanism, inner.options, options)
  if item.inner is not None:
    raise UserError(
      Problem(f"{item.name} is not a wrapper, but {item} gives it {item.inner}", f"write {item.name}(option=value)")
    )
  return Layer(record, options)


def _problems_of(e: ValueError, item: Item) -> tuple[Problem, ...]:
  if isinstance(e, UserError):
    return e.problems
  return (Problem(f"--attention item {item}: {e}", f"python -m demos info {item.name} lists options and ranges"),)


def model_problems(cfg) -> list[Problem]:
  """Every problem of a `GPTConfig`, or of any object with its fields, found without building anything.

  Whether options fit the head sizes can only be asked once the sizes themselves are sound.
  """
  found = dict.fromkeys(config_problems(cfg))
  try:
    items = layer_items(cfg.attention, max(1, cfg.n_layer))
  except UserError:
    return list(found)
  for item in items:
    try:
      _look_up(item, cfg.attention)
    except ValueError as e:
      found |= dict.fromkeys(_problems_of(e, item))
  if not found:
    fields = {f.name: getattr(cfg, f.name) for f in dataclasses.fields(GPTConfig)}
    try:
      resolve(GPTConfig(**fields))
    except UserError as e:
      found |= dict.fromkeys(e.problems)
  return list(found)


__all__ = ["REGISTRY", "Context", "Layer", "Mechanism", "attention_names", "model_problems", "resolve", "with_options"]
