"""Mode `word`: every token is a distribution over braid letters that acts on n strands holding values.

S_t = (1 - g_t p_t) ∘ (G_t S_{t-1}) + g_t p_t v_tᵀ,   y_t = ρ_tᵀ S_t,   G_t = π_0 I + Σ_i π_i B_i(t_h)

B_i is the Burau matrix [[1-t, t], [1, 0]] on strands i, i+1, so for 0 < t <= 1 every step is a convex mixture of
strands: S stays bounded, equal positive words act equally, and t = 1 permutes. Hard letters track the symmetric group
exactly; fixed-depth softmax attention cannot, unless TC0 = NC1 (Merrill et al., 2024, arXiv 2404.08819).
"""

import jax
import jax.numpy as jnp

from mgr_jax.attention.braid_options import Options
from mgr_jax.attention.braid_strands import Letters, chunk_length, strand_scan, token_scan
from mgr_jax.attention.mechanism import group_heads, project_heads, ungroup_heads
from mgr_jax.flops import Cost
from mgr_jax.params import ParamSpec

INITIAL_T_LOGIT = 4.59512  # sigmoid gives t = 0.99.


def specs(cfg, opts: Options) -> dict[str, ParamSpec]:
  """Letter, write and read projections [C, H, n], write gate [C, H], raw t [H], initial strands [H, n, D]."""
  C, H, D, n = cfg.n_embd, cfg.n_head, cfg.head_dim, opts.strands
  to_strands = ParamSpec((C, H, n), ("embed", "heads", None), role="router")
  found = {
    "w_letter": to_strands,
    "w_write": to_strands,
    "w_read": to_strands,
    "w_gate": ParamSpec((C, H), ("embed", "heads"), role="router"),
    # Distinct strands at the start, so that permuting them can be seen.
    "strands": ParamSpec((H, n, D), ("heads", None, "head_dim"), role="scalar", std=1.0),
  }
  if opts.word_law == "burau":
    found["t"] = ParamSpec((H,), ("heads",), role="scalar", init="constant", std=INITIAL_T_LOGIT)
  return found


def mix(params, x_BTC, v_BTKD, ctx, cfg, opts: Options):
  """What the strands of a whole sequence read [B, T, H, D], and diagnostics."""
  del cfg
  restart = jnp.zeros((1, x_BTC.shape[1])).at[:, 0].set(1.0)
  segments = ctx.segment_ids_BT
  if segments is not None:
    restart = jnp.maximum(restart, jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0))))
  letters, probabilities = _letters(params, x_BTC, restart, v_BTKD.shape[2], opts)
  initial = _by_group(params["strands"], v_BTKD.shape[2])
  state = jnp.broadcast_to(initial, (x_BTC.shape[0], *initial.shape))
  out, state = _run(letters, v_BTKD, initial, state, opts.impl == "reference")
  return ungroup_heads(out), _diagnostics(params, probabilities, state) if ctx.probe else {}


def _run(letters, v_BTKD, initial, state, one_by_one: bool):
  v = v_BTKD.swapaxes(1, 2).astype(jnp.float32)
  return (token_scan if one_by_one else strand_scan)(letters, v, initial, state)


def _by_group(x_H, n_kv_head):
  return x_H.reshape(n_kv_head, -1, *x_H.shape[1:])


def _letters(params, x, restart, n_kv_head, opts, valid_BT=None):
  """The strand vectors of every token, and the letter probabilities [B, T, H, n]."""
  logits = lambda name: project_heads(x, params[name]).astype(jnp.float32)
  letter = jax.nn.softmax(logits("w_letter"))
  chosen = hard_choice(letter) if opts.word_gate == "hard" else letter
  gate = jax.nn.sigmoid((x @ params["w_gate"].astype(x.dtype)).astype(jnp.float32))
  write = gate[..., None] * jax.nn.softmax(logits("w_write"))
  t = jax.nn.sigmoid(params["t"])[:, None] if opts.word_law == "burau" else 1.0
  bands = letter_bands(chosen, t)
  lower, diag, upper = ((1 - write) * band for band in bands)
  if valid_BT is not None:
    real = valid_BT[:, :, None, None]
    lower, upper, write = (jnp.where(real, x, 0.0) for x in (lower, upper, write))
    diag, restart = jnp.where(real, diag, 1.0), jnp.where(valid_BT, restart, 0.0)
  vectors = (lower, diag, upper, write, jax.nn.softmax(logits("w_read")))
  vectors = (group_heads(x, n_kv_head) for x in vectors)
  return Letters(*vectors, restart.astype(jnp.float32)[:, None, None, :]), letter


def hard_choice(probabilities: jax.Array) -> jax.Array:
  """One-hot argmax, with the gradient of the probabilities (straight through)."""
  one_hot = jax.nn.one_hot(jnp.argmax(probabilities, -1), probabilities.shape[-1], dtype=probabilities.dtype)
  return one_hot + (probabilities - jax.lax.stop_gradient(probabilities))


def letter_bands(letter: jax.Array, t) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Bands of G = π_0 I + Σ_i π_i B_i(t), each [..., n]; letter i crosses strands i-1 and i, counted from 0."""
  from_left = letter.at[..., 0].set(0.0)
  with_right = jnp.roll(from_left, -1, -1)
  return from_left, 1 - from_left - t * with_right, t * with_right


def _diagnostics(params, letter, state):
  """Letter entropy in nats, share of idle, spread of the strands (0 = all forgotten), and t per head."""
  entropy = -jnp.sum(letter * jnp.log(jnp.maximum(letter, 1e-30)), -1)
  aux = {
    "letter_entropy": jnp.mean(entropy),
    "idle": jnp.mean(letter[..., 0]),
    "strand_spread": jnp.mean(jnp.std(state, axis=-2)),
  }
  return aux | ({"t": jax.nn.sigmoid(params["t"])} if "t" in params else {})


def init_state(cfg, opts: Options, batch: int, max_len: int) -> jax.Array:
  """Strands [B, H, n, D] float32; the first token (position 0) replaces them by the learned ones."""
  del max_len
  return jnp.zeros((batch, cfg.n_head, opts.strands, cfg.head_dim), jnp.float32)


def step(params, x_BtC, v_BtKD, state_BHnD, ctx, cfg, opts: Options):
  """What t new tokens read, and the new strands."""
  del cfg
  B, t, K = v_BtKD.shape[:3]
  letters, _ = _letters(params, x_BtC, ctx.positions_BT == 0, K, opts, ctx.valid_BT)
  state = state_BHnD.reshape(B, K, -1, *state_BHnD.shape[2:])
  one_by_one = t == 1 or opts.impl == "reference"
  out, state = _run(letters, v_BtKD, _by_group(params["strands"], K), state, one_by_one)
  return ungroup_heads(out), state.reshape(state_BHnD.shape)


def cost(cfg, opts: Options, T: int) -> Cost:
  """Per token: 2C(3n + 1)H FLOPs of projections; per head 9·n·(n + c) vector operations inside chunks of c tokens, and
  products of 2·D·(c + 2n) FLOPs with values and states."""
  C, H, D, n = cfg.n_embd, cfg.n_head, cfg.head_dim, opts.strands
  c = chunk_length(T)
  return Cost(
    matmul=H * (2.0 * C * (3 * n + 1) + 2.0 * D * (c + 2 * n)),
    vector=9.0 * H * n * (n + c),
    exp=H * (3.0 * n + 1),
    bytes=4.0 * H * n * D,
  )
