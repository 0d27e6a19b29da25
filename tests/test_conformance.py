"""Every registered mechanism, in every variant, and hybrids, against the same contract."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import pytest

from mgr_jax.attention import REGISTRY, attention_names, resolve
from mgr_jax.claims import run_claims
from mgr_jax.config import GPTConfig, parse_attention
from mgr_jax.conformance import conformance_claims, noisy_params, tiny, tokens_of
from mgr_jax.flops import matmul_flops
from mgr_jax.model import gpt

HYBRIDS = (
  "surreal,quaternion",
  "reversible(ultrametric),standard",
  "simplicial,fractal",
  "gauge*2,octonion",
  "standard,braid(mode=word)",
  "standard,ultrametric,tropical",
)
SINGLE = [v for record in REGISTRY.values() for v in record.variants]
VARIANTS = [*SINGLE, *HYBRIDS]


def config(attention, **fields):
  n_layer = max(2, len(parse_attention(attention)))
  base = {"vocab_size": 97, "seq_len": 64, "n_layer": n_layer, "n_head": 4, "n_kv_head": 2, "n_embd": 32}
  return GPTConfig(**(base | fields), attention=attention)


def test_every_mechanism_lists_itself_among_its_variants():
  for name, record in REGISTRY.items():
    assert record.name == name
    assert name in record.variants
    assert record.refs, f"{name} cites nothing"


@pytest.mark.parametrize("attention", SINGLE)
def test_conformance_claims_hold(attention, key):
  for result in run_claims(conformance_claims(config(attention)), key):
    assert result.holds, f"{result.message or result}"


@pytest.mark.parametrize("attention", HYBRIDS)
def test_conformance_claims_hold_of_hybrids(attention, key):
  test_conformance_claims_hold(attention, key)


@pytest.mark.parametrize(("attention", "head_dim"), [("gauge(b=3)", 12), ("gauge(b=3),octonion", 24), ("gauge", 8)])
def test_the_tiny_copy_has_heads_that_fit(attention, head_dim):
  assert tiny(config(attention, n_head=1, n_kv_head=1, n_embd=48)).head_dim == head_dim


def test_every_mechanism_is_part_of_a_hybrid():
  assert all(any(name in hybrid for hybrid in HYBRIDS) for name in attention_names())


@pytest.mark.parametrize("attention", [v for v in SINGLE if v.startswith("reversible")])
def test_a_wrapper_changes_the_stack(attention):
  assert all(layer.wrap is not None for layer in resolve(config(attention)))


@pytest.mark.parametrize(
  ("dtype", "attention"), [("bfloat16", name) for name in attention_names()] + [("float32", v) for v in SINGLE]
)
def test_shapes_dtypes_and_finiteness(attention, dtype, key):
  cfg = tiny(config(attention))
  cfg = dataclasses.replace(cfg, compute_dtype=dtype)
  layer = resolve(cfg)[0]
  specs = layer.mechanism.param_specs(cfg, layer.options)
  params = jax.tree.map(lambda s: s.draw(key) + 0.1, specs, is_leaf=gpt.is_spec)
  params = {name: p if specs[name].role == "scalar" else p.astype(dtype) for name, p in params.items()}

  @jax.jit
  def run(x):
    ctx = gpt.context(jnp.arange(x.shape[1])[None, :], cfg, probe=True)
    y, pull, aux = jax.vjp(lambda x: layer.mechanism.apply(params, x, ctx, cfg, layer.options), x, has_aux=True)
    return y, pull(jnp.ones_like(y))[0], aux

  inputs = [scale * jax.random.normal(key, (2, 17, cfg.n_embd)) for scale in (1e-4, 1.0, 1e4)]
  inputs += [jnp.zeros((2, 17, cfg.n_embd)), jnp.ones((2, 17, cfg.n_embd))]
  inputs += [jnp.ones((2, 1, cfg.n_embd))] if dtype == "float32" and attention in attention_names() else []
  for x in inputs:
    y, dx, aux = run(x.astype(dtype))
    chex.assert_shape((y, dx), x.shape)
    chex.assert_type((y, dx), dtype)
    chex.assert_tree_all_finite((y, dx, aux))
    chex.assert_type(jax.tree.leaves(aux), jnp.float32)


@pytest.mark.parametrize("attention", attention_names())
def test_one_compilation_per_shape(attention, key):
  cfg = tiny(config(attention))
  params = noisy_params(key, cfg)
  traces = []

  @jax.jit
  def forward(params, tokens):
    traces.append("forward")
    return gpt.forward(params, tokens, cfg)[0]

  @jax.jit
  def step(params, tokens, state):
    traces.append("step")
    return gpt.decode(params, tokens, state, cfg)

  state = gpt.init_state(cfg, 2, cfg.seq_len)
  for i in range(3):
    tokens = tokens_of(jax.random.fold_in(key, i), 2, cfg.seq_len)
    forward(params, tokens)
    _, state = step(params, tokens[:, :1], state)
  assert sorted(traces) == ["forward", "step"]
  forward(params, tokens[:, :-1])
  assert traces.count("forward") == 2, "another shape compiles again, so the count above counts"


def temp_bytes(cfg, batch):
  """Compiled temporary memory of the gradient of one mechanism layer."""
  layer = resolve(cfg)[0]
  specs = layer.mechanism.param_specs(cfg, layer.options)
  params = {k: jax.ShapeDtypeStruct(s.shape, jnp.float32) for k, s in specs.items()}
  x = jax.ShapeDtypeStruct((batch, cfg.seq_len, cfg.n_embd), jnp.float32)

  def objective(params, x):
    ctx = gpt.context(jnp.arange(cfg.seq_len)[None, :], cfg)
    return jnp.sum(jnp.sin(layer.mechanism.apply(params, x, ctx, cfg, layer.options)[0]))

  compiled = jax.jit(jax.grad(objective, (0, 1))).lower(params, x).compile()
  return compiled.memory_analysis().temp_size_in_bytes


# Temporary float32 values per B·T·C of the gradient of one layer, at T=1024 and head size 16 (a dense T×T score matrix
# of 4 heads alone is 64 of them, and a dense layer needs several). A tile of scores, 64·T of 1024·T per head, is 4 of
# these. Octonions sum features 29/8 as wide as their values; gauge keeps frames, logarithms and torques of every token.
MEMORY_MULTIPLE = {"octonion": 75, "gauge": 65}


@pytest.mark.parametrize("attention", attention_names())
def test_training_memory_is_a_small_multiple_of_the_activations(attention):
  cfg = config(attention, seq_len=1024, n_embd=64, n_kv_head=4)
  limit = MEMORY_MULTIPLE.get(attention, 40) * 4 * 2 * cfg.seq_len * cfg.n_embd
  assert temp_bytes(cfg, 2) < limit
  if attention == "standard":
    assert temp_bytes(dataclasses.replace(cfg, attention="standard(impl=reference)"), 2) > 2 * limit


# A sweep stops early; prefix sums run as triangular products; a window is far smaller than a tile.
COST_IS_A_MODEL = ("impl=reference", "mode=monodromy", "impl=sorted", "window=")


@pytest.mark.parametrize("attention", [v for v in VARIANTS if not any(part in v for part in COST_IS_A_MODEL)])
def test_cost_is_what_the_program_multiplies(attention):
  """At T=256; tiles round up to whole ones, hence the tolerance."""
  cfg = config(attention, seq_len=256, n_embd=64)
  for layer in resolve(cfg):
    specs = layer.mechanism.param_specs(cfg, layer.options)
    params = {k: jax.ShapeDtypeStruct(s.shape, jnp.float32) for k, s in specs.items()}
    x = jax.ShapeDtypeStruct((1, cfg.seq_len, cfg.n_embd), jnp.float32)

    def forward(params, x, layer=layer):
      ctx = gpt.context(jnp.arange(cfg.seq_len)[None, :], cfg)
      return layer.mechanism.apply(params, x, ctx, cfg, layer.options)[0]

    counted = matmul_flops(forward, params, x) / cfg.seq_len
    assert layer.mechanism.cost(cfg, layer.options, cfg.seq_len).matmul == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize("attention", VARIANTS)
def test_cost_counts_at_least_the_projections_it_declares(attention):
  cfg = config(attention)
  for layer in resolve(cfg):
    specs = layer.mechanism.param_specs(cfg, layer.options)
    matrices = sum(s.size for s in specs.values() if s.role == "matrix")
    cost = layer.mechanism.cost(cfg, layer.options, cfg.seq_len)
    assert cost.matmul >= 2 * matrices
    assert cost.vector > 0
