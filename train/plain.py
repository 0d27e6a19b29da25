"""The yardstick of the speed benchmark: the same GPT as one would first write it in JAX.

A loop over layers, library attention (`jax.nn.dot_product_attention`), whole logits, cross-entropy and every gradient
by autodiff. It takes the parameters of `attention="standard"` and computes the same loss.
"""

import jax
import jax.numpy as jnp
import optax

from mgr_jax.config import GPTConfig


def rms_norm(x):
  return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)


def rotary(x_BTHD, base):
  half = x_BTHD.shape[-1] // 2
  angle = jnp.arange(x_BTHD.shape[1])[:, None] * base ** (-jnp.arange(half) / half)
  cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
  a, b = x_BTHD[..., :half], x_BTHD[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


def loss(params, batch, cfg: GPTConfig) -> jax.Array:
  """Mean cross-entropy in nats per token, equal to `gpt.loss` for one run of `standard` layers."""

  def block(x, layer):
    attention, mlp = layer["attention"], layer["mlp"]
    h = rms_norm(x)
    q, k, v = (jnp.einsum("btc,chd->bthd", h, attention[w]) for w in ("wq", "wk", "wv"))
    q, k = (rotary(rms_norm(a), cfg.rope_base) for a in (q, k))
    mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True)
    x = x + jnp.einsum("bthd,hdc->btc", mixed, attention["wo"])
    return x + jnp.square(jax.nn.relu(rms_norm(x) @ mlp["w_in"])) @ mlp["w_out"]

  x = rms_norm(params["embed"][batch["tokens"]])
  for i in range(cfg.n_layer):
    x = block(x, jax.tree.map(lambda stacked, i=i: stacked[i], params["runs"][0]))
  logits = rms_norm(x) @ params["head"]
  logits = cfg.logit_softcap * jnp.tanh(logits / cfg.logit_softcap)
  return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits[..., : cfg.vocab_size], batch["targets"]))
