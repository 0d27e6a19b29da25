"""A planted triple: the answer depends on the one pair of earlier tokens that completes the query to 0 mod M.

Match2, where one token completes the query, is the control: pairwise attention is enough for it.
"""

import jax
import jax.numpy as jnp

from train.experiments.recall import same_chance
from train.experiments.records import Arm, Experiment, Generator, Prediction, Task

MODULUS, TOKENS, PAYLOADS = 7, 5, 4
TRIES = 24  # candidates per row; one with a unique answer is kept, and rows without one get weight 0


def match3(modulus: int = MODULUS, tokens: int = TOKENS, payloads: int = PAYLOADS) -> Generator:
  """Tokens (x_s, p_s) and a query x; x + x_i + x_j ≡ 0 mod M for exactly one pair i < j. Target: p_i + p_j mod P."""

  def generate(key, rows, data):
    del data
    draw_x, draw_p, draw_pair = jax.random.split(key, 3)
    x = jax.random.randint(draw_x, (rows, TRIES, tokens), 0, modulus)
    pair = jax.lax.top_k(jax.random.uniform(draw_pair, x.shape), 2)[1]
    query = -jnp.sum(jnp.take_along_axis(x, pair, axis=-1), axis=-1) % modulus
    sums = (x[..., :, None] + x[..., None, :] + query[..., None, None]) % modulus
    matches = jnp.sum(jnp.triu(sums == 0, 1), axis=(-2, -1))
    return _rows(draw_p, x, query, pair, matches, modulus, payloads)

  return generate


def match2(modulus: int = MODULUS, tokens: int = TOKENS, payloads: int = PAYLOADS) -> Generator:
  """Tokens (x_s, p_s) and a query x; x + x_i ≡ 0 mod M for exactly one i. Target: p_i."""

  def generate(key, rows, data):
    del data
    draw_x, draw_p, draw_place = jax.random.split(key, 3)
    x = jax.random.randint(draw_x, (rows, TRIES, tokens), 0, modulus)
    place = jax.random.randint(draw_place, (rows, TRIES, 1), 0, tokens)
    query = -jnp.take_along_axis(x, place, axis=-1)[..., 0] % modulus
    matches = jnp.sum((x + query[..., None]) % modulus == 0, axis=-1)
    return _rows(draw_p, x, query, place, matches, modulus, payloads)

  return generate


def _rows(key, x, query, places, matches, modulus, payloads):
  """The first candidate with one match, and payloads. x [R, tries, n]; query, matches [R, tries]; places [..., m]."""
  chosen = jnp.argmax(matches == 1, axis=1)
  pick = lambda a: jnp.take_along_axis(a, chosen.reshape(-1, *[1] * (a.ndim - 1)), axis=1)[:, 0]
  x, query, places = pick(x), pick(query), pick(places)
  payload = jax.random.randint(key, x.shape, 0, payloads)
  answer = jnp.sum(jnp.take_along_axis(payload, places, axis=1), axis=1) % payloads
  tokens = jnp.concatenate([x * payloads + payload, modulus * payloads + query[:, None]], axis=1)
  last = jnp.zeros_like(tokens).at[:, -1].set(1)
  weights = last * jnp.any(matches == 1, axis=1)[:, None]
  return {
    "tokens": tokens.astype(jnp.int32),
    "targets": (last * answer[:, None]).astype(jnp.int32),
    "weights": weights.astype(jnp.float32),
  }


WINDOW = 17
SHAPE = {"vocab_size": MODULUS * (PAYLOADS + 1), "seq_len": TOKENS + 1}


def _task(name: str, generator: Generator, arms: tuple[str, ...] = ()) -> Task:
  return Task(
    name, **SHAPE, train=generator, tests={name: generator}, chance=same_chance([name], 1 / PAYLOADS), arms=arms
  )


EXPERIMENT = Experiment(
  name="simplicial_triple",
  question="does attention over pairs of tokens find what attention over single tokens cannot?",
  model={"n_layer": 1, "n_head": 2, "n_kv_head": 2, "n_embd": 32},
  tasks=(_task("match3", match3()), _task("match2", match2(), ("softmax", "trilinear"))),
  arms=(
    Arm("softmax", "standard"),
    Arm("trilinear", f"simplicial(w1={WINDOW},w2={WINDOW})"),
    Arm("linear2", "simplicial(mode=linear2)"),
    Arm("two_hop", "simplicial(mode=two_hop)"),
    Arm("resolvent", "simplicial(mode=resolvent)"),
    Arm("softmax, 2 layers", "standard", (("n_layer", 2),), widened=False),
  ),
  predictions=(
    Prediction("trilinear beats one layer of softmax by 20 points", "trilinear", "softmax", "match3", at_least=0.20),
    Prediction("trilinear is no worse than two layers of softmax", "trilinear", "softmax, 2 layers", "match3"),
    Prediction("control: on match2 the two are within 3 points", "trilinear", "softmax", "match2", within=0.03),
  ),
  steps=2000,
  batch_size=64,
  test_rows=2048,
  limits=(
    f"{TOKENS} tokens modulo {MODULUS} with {PAYLOADS} payloads, not 16 modulo 97 with 8; so short a row does not test "
    "the growth with length that separates one layer of pairwise attention from a triple score, and depth may stand in "
    "for it; parameters are equal among one-layer arms, FLOPs are reported, not equal"
  ),
)
