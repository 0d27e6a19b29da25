"""What gauge attention costs beside softmax attention: the generator, one exponential and one product per token."""

import math

import jax.numpy as jnp

from mgr_jax.algebra.lie import dimension
from mgr_jax.attention.gauge_options import Options
from mgr_jax.attention.mechanism import projection_cost
from mgr_jax.attention.tiles import MAX_SPANS, TILE
from mgr_jax.flops import Cost

PRODUCT = {2: 1.0, 3: 28.0, 4: 56.0}  # vector operations to multiply two rotations
SANDWICH = {2: 6.0, 3: 56.0, 4: 56.0}  # and to turn the channels of a block


def cost(cfg, opts: Options, T: int) -> Cost:
  """Per token, for a fast implementation.

  Generator: 2·C·r + 2·r·K·D/b·p matrix FLOPs, p = b(b-1)/2. Rotations: for b <= 4 vector work; above, 10 products of
  b×b matrices for the exponential at theta_max = 4, one or two for the running product, two to make it orthogonal, and
  2·b·D FLOPs for every vector turned. Softmax: (T + max(64, T/8))/2 keys per query, what whole tiles multiply. Poisson:
  vector work, terms·(hops + 1) multiply-adds per channel of every head.
  """
  C, H, K, D, b = cfg.n_embd, cfg.n_head, cfg.n_kv_head, cfg.head_dim, opts.b
  heads = K if opts.share == "kv" else 1
  rotations, turned = heads * (D // b), (2 * H + 2 * K) if opts.values == "transport" else H + K
  C_in, out = C * (2 if opts.context == "edge" else 1), rotations * dimension(b)
  rank = min(opts.rank, C)
  total = projection_cost(cfg)
  total += Cost(matmul=2.0 * C_in * rank + 2.0 * rank * out if rank else 2.0 * C_in * out, vector=4.0 * out)
  item = jnp.dtype(cfg.compute_dtype).itemsize
  if b <= 4:
    frame = rotations * {2: 1, 3: 4, 4: 8}[b]
    rotate = Cost(vector=rotations * (PRODUCT[b] + 20.0) + turned * D / b * SANDWICH[b], exp=rotations * (b - 1))
  else:
    frame = rotations * b * b
    squarings = max(0, math.ceil(math.log2(opts.theta_max / 0.5)))
    products = 7 + squarings + (1 if opts.scan in ("auto", "serial") else 2) + (opts.rope == "base")
    products += 2 * (opts.reorth == "auto")
    rotate = Cost(matmul=products * rotations * 2.0 * b**3 + turned * 2.0 * b * D, vector=8.0 * frame)
  total += rotate + Cost(bytes=4.0 * frame)
  if opts.mixer == "poisson":
    hops, terms = opts.hops(cfg), opts.n_terms
    mix = Cost(vector=H * D * (2.0 * hops + 2.0 * terms * (hops + 2)), exp=H * (hops + 1.0))
    return total + mix + Cost(bytes=item * D * hops * (2.0 * K + H * (terms - 1)))
  keys = (T + max(TILE, T / MAX_SPANS)) / 2
  softmax = H * keys * Cost(matmul=4.0 * D, vector=3.0, exp=1.0)
  return total + softmax + Cost(bytes=2.0 * K * D * item * T / 2)
