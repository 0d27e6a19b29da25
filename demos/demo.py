"""What a demo is: a story with numbers computed live, claims that are measured, plots. One file each, or none.

A file `demos/NAME.py` with a `DEMO` joins by existing. A mechanism without such a file still has a demo: its claims.
The claims of a demo are its own, those of the mechanism of the same name, and what every mechanism must satisfy, each
once.
"""

import dataclasses
import importlib
import pkgutil
import sys
from collections.abc import Callable

import jax

import demos
from mgr_jax.attention import REGISTRY
from mgr_jax.claims import Claim
from mgr_jax.config import nearest
from mgr_jax.conformance import claims_of
from mgr_jax.problems import Problem, UserError

# Names under which frameworks are known elsewhere.
ALIASES = {"knot-braid": "braid", "ifs-fractal": "fractal", "matrix-gauge": "gauge"}
# Demos that are told before another one, as its first half.
INSIDE = {"octonion": ("quaternion",)}
_FRONT_END = ("__main__", "braid_tasks", "demo", "figures", "pages", "parallel", "reversible_training")


@dataclasses.dataclass(frozen=True)
class Demo:
  """One framework, shown.

  Args:
    name: what the user types; the mechanism's name where there is one.
    summary: one line, what it is about.
    story: `key -> text` of at most 100 columns; every number in it is computed when it is called.
    claims: measured statements, run after the story.
    plots: functions `key -> matplotlib.figure.Figure`; the function's name becomes the file's. They import matplotlib
      themselves, so that only plotting needs it.
    refs: papers.
    not_shown: what one could expect here and does not find: (what, why) or (what, where else it is checked).
    timed: the story measures seconds, so the claims wait until it is told instead of running beside it.
    options: the mechanism's options class, filled in by `get`.
  """

  name: str
  summary: str
  story: Callable[[jax.Array], str] = lambda key: ""
  claims: tuple[Claim, ...] = ()
  plots: tuple[Callable, ...] = ()
  refs: tuple[str, ...] = ()
  not_shown: tuple[tuple[str, str], ...] = ()
  timed: bool = False
  options: type | None = None


def names() -> tuple[str, ...]:
  """All demos, sorted: the files of this package and the registered mechanisms."""
  return tuple(sorted(_files() | set(REGISTRY)))


def _files() -> set[str]:
  return {m.name for m in pkgutil.iter_modules(demos.__path__)} - set(_FRONT_END)


def get(name: str) -> Demo:
  """The demo of that name, or of that alias, with the claims, papers and options of the mechanism of that name.

  Raises:
    UserError: no such demo; names the nearest.
  """
  name = ALIASES.get(name, name)
  if name not in names():
    raise UserError(
      Problem(f"no demo named {name!r}", f"{nearest(name, (*names(), *ALIASES))}python -m demos list shows all")
    )
  record = REGISTRY.get(name)
  if name in _files():
    demo = importlib.import_module(f"demos.{name}").DEMO
  else:
    doc = sys.modules[record.options.__module__].__doc__ or ""
    demo = Demo(name, doc.strip().partition("\n")[0])
  if record is None:
    return demo
  claims = {c.name: c for c in (*demo.claims, *claims_of(name))}
  refs = dict.fromkeys((*demo.refs, *record.refs))
  return dataclasses.replace(demo, claims=tuple(claims.values()), refs=tuple(refs), options=record.options)
