"""Claims about one causal symplectic layer: what is symplectic in it, and what cannot be. All in double precision."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.algebra import symplectic as maps
from mgr_jax.algebra.reversible_claims import generator
from mgr_jax.attention.mechanism import Context, rope_tables
from mgr_jax.claims import Check, claim, worst_of
from mgr_jax.config import GPTConfig
from mgr_jax.model import symplectic
from mgr_jax.params import is_spec

T = 5
CFG = GPTConfig(vocab_size=128, seq_len=T, n_layer=1, n_head=2, n_kv_head=1, n_embd=4)
LAMBDA_MIN = 0.05
STEP = 0.5


class Case(NamedTuple):
  """Random parameters of one layer, streams [T, C], and what may break it.

  ∇V is multiplied by `untie` [C, C]: the identity, or what an output matrix of its own would amount to. Added to it is
  an MLP with first matrix `generic` [C, C], which unless zero is no gradient.
  """

  params: dict
  q: jax.Array
  p: jax.Array
  untie: jax.Array
  generic: jax.Array


def case(rng: np.random.Generator, attention: float = 1.0, untied: bool = False, generic: float = 0.0) -> Case:
  """Draws a case; call inside double precision."""
  params = jax.tree.map(
    lambda s: np.asarray(rng.normal(size=s.shape) * 0.7), symplectic.kick_specs(CFG), is_leaf=is_spec
  )
  params["attention"]["gate"] *= attention
  q, p = rng.normal(size=(2, T, CFG.n_embd))
  other = rng.normal(size=(4, 4))
  untie = other if untied else np.eye(4)
  return Case(params, q, p, untie, generic * other)


def context(length: int = T) -> Context:
  positions = jnp.arange(length)[None, :]
  return Context(positions, shared={"rope": rope_tables(positions, CFG.head_dim, CFG.rope_base)})


def potential(params, q_TC):
  """V_t [T] of one row."""
  q = q_TC[None]
  return symplectic.potential(params["attention"], q, context(), CFG, lambda_min=LAMBDA_MIN, impl="reference")[0]


def grad_V(c: Case, q_TC):
  options = {"lambda_min": LAMBDA_MIN, "impl": "reference"}
  g = symplectic.grad_V(c.params["attention"], q_TC[None], context(), CFG, **options)[0]
  return g @ c.untie + jax.nn.relu(q_TC @ c.generic) @ (c.generic @ c.generic)


def grad_T(c: Case, p_TC):
  return symplectic.grad_T(c.params["mlp"], p_TC[None], CFG, lambda_min=LAMBDA_MIN)[0]


@functools.partial(jax.jit, static_argnums=1)
def _jacobian(c: Case, step) -> jax.Array:
  """Derivative of one layer, [2, T, C, 2, T, C] with the streams (q, p) first."""

  def layer(state):
    kicks = functools.partial(grad_V, c), functools.partial(grad_T, c)
    return jnp.stack(step(*state, *kicks, STEP))

  return jax.jacfwd(layer)(jnp.stack([c.q, c.p]))


_defect = jax.jit(maps.defect)


def _token_blocks(step, **broken) -> Check:
  """Largest defect of the derivative of a token's (q, p) in its own (q, p), the past frozen."""

  def measure(key, scale):
    rng, worst = generator(key), 0.0
    with jax.enable_x64(True):
      for _ in range(scale):
        J = np.asarray(_jacobian(case(rng, **broken), step))
        own = np.stack([J[:, t, :, :, t].reshape(8, 8) for t in range(T)])
        worst = worst_of(worst, float(np.max(_defect(own))))
    return worst

  return measure


def _joint(attention: float) -> Check:
  """Defect of the derivative of all tokens together."""

  def measure(key, scale):
    del scale
    with jax.enable_x64(True):
      J = _jacobian(case(generator(key), attention), maps.euler)
      return float(_defect(np.asarray(J).reshape(2 * T * 4, 2 * T * 4)))

  return measure


def sum_kick(params, q_TC):
  """∇_q Σ_t V_t: jointly symplectic, and so of necessity not causal."""
  return jax.grad(lambda q: jnp.sum(potential(params, q)))(q_TC)


def causal_kick(params, q_TC):
  """∇_{q_t} V_t with the past frozen."""
  c = Case(params, q_TC, q_TC, np.eye(4), np.zeros((4, 4)))
  return grad_V(c, q_TC)


@functools.partial(jax.jit, static_argnums=0)
def influence(kick, params, q_TC):
  """max |∂kick_t/∂q_s| over channels, [T, T] with rows t."""
  return jnp.max(jnp.abs(jax.jacfwd(functools.partial(kick, params))(q_TC)), axis=(1, 3))


def _future(kick) -> Check:
  def measure(key, scale):
    del scale
    with jax.enable_x64(True):
      c = case(generator(key))
      return float(np.max(np.triu(influence(kick, c.params, c.q), 1)))

  return measure


@jax.jit
def _gradient_errors(c: Case):
  J = jax.jacrev(functools.partial(potential, c.params))(c.q)
  own = J[jnp.arange(T), jnp.arange(T)]
  kinetic = lambda p: jnp.sum(symplectic.kinetic(c.params["mlp"], p[None], CFG, lambda_min=LAMBDA_MIN))
  return jnp.max(jnp.abs(jnp.stack([own - grad_V(c, c.q), jax.grad(kinetic)(c.p) - grad_T(c, c.p)])))


def _gradient(untied: bool) -> Check:
  """Largest difference between the closed forms and derivatives of the energies."""

  def measure(key, scale):
    del scale
    with jax.enable_x64(True):
      return float(_gradient_errors(case(generator(key), untied=untied)))

  return measure


CLAIMS = (
  claim(
    "symplectic.token_euler",
    "given the past, one layer is symplectic in every token's (q, p): J'ΩJ = Ω, norms included",
    _token_blocks(maps.euler),
    1e-11,
    _token_blocks(maps.euler, generic=1.0),
  ),
  claim(
    "symplectic.token_leapfrog",
    "the same for leapfrog; an output matrix that is not the transposed query matrix breaks it",
    _token_blocks(maps.leapfrog),
    1e-11,
    _token_blocks(maps.leapfrog, untied=True),
  ),
  claim(
    "symplectic.no_joint_form",
    "without attention the map of all tokens together is symplectic; with causal attention it is not",
    _joint(0.0),
    1e-11,
    _joint(1.0),
  ),
  claim(
    "symplectic.causal",
    "the kick at t does not depend on later tokens; the kick that is symplectic for all tokens together does",
    _future(causal_kick),
    0.0,
    _future(sum_kick),
  ),
  claim(
    "symplectic.kicks_are_gradients",
    "the closed forms are the derivatives of the energies",
    _gradient(False),
    1e-11,
    _gradient(True),
    refs=("Hoover et al., 2023, arXiv 2302.07253", "Jin et al., 2020, arXiv 2001.03750"),
  ),
)
