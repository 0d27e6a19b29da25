"""The claim that masks are submodels, with its broken twin."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mgr_jax.claims import Check, claim, largest_difference
from mgr_jax.config import GPTConfig
from mgr_jax.model import gpt
from train.dominance import ablate
from train.dominance.ablate import Masks
from train.dominance.documents import Documents, nats

CFG = GPTConfig(vocab_size=64, seq_len=12, n_layer=2, n_head=4, n_kv_head=2, n_embd=32)
LAYERS, HEADS = (1,), (0, 2)  # kept: the last layer, and the first query head of each key/value head
UNITS = CFG.mlp_dim // 2


@dataclasses.dataclass(frozen=True)
class _Narrow(GPTConfig):
  """A model with fewer heads and hidden units at the same width."""

  head_size: int = 8

  @property
  def head_dim(self) -> int:
    return self.head_size


SUB = _Narrow(vocab_size=64, seq_len=12, n_layer=1, n_head=2, n_kv_head=2, n_embd=32, mlp_ratio=2.0)


def _sliced(params):
  """The parameters of the submodel, cut out of those of the whole model."""
  (run,) = params["runs"]
  run = jax.tree.map(lambda x: x[np.array(LAYERS)], run)
  attention, mlp = run["attention"], run["mlp"]
  attention |= {"wq": attention["wq"][:, :, np.array(HEADS)], "wo": attention["wo"][:, np.array(HEADS)]}
  return params | {
    "runs": ({"attention": attention, "mlp": {"w_in": mlp["w_in"][..., :UNITS], "w_out": mlp["w_out"][:, :UNITS]}},)
  }


def _indicator(n: int, kept) -> jax.Array:
  return jnp.zeros(n).at[jnp.asarray(kept)].set(1)


@jax.jit
def _losses(key, documents, residual: jax.Array):
  """Nats of the unmasked model and of the submodel, and of both by masks, all in one evaluation.

  With `residual` the masks remove half of the residual stream instead of half of the branches.
  """
  leaves, tree = jax.tree.flatten(gpt.init(key, CFG))
  # Away from the zero initialisation of output matrices, where every mask would do nothing.
  noise = [0.1 * jax.random.normal(jax.random.fold_in(key, i), p.shape) for i, p in enumerate(leaves)]
  params = jax.tree.unflatten(tree, [p + n for p, n in zip(leaves, noise, strict=True)])
  small = Masks(_indicator(2, LAYERS), _indicator(4, HEADS), _indicator(CFG.mlp_dim, range(UNITS)))
  masks = jax.tree.map(lambda a, b: jnp.stack([a, b]), Masks(jnp.ones(2), jnp.ones(4), jnp.ones(CFG.mlp_dim)), small)

  def of(mask: Masks):
    half = jnp.where(jnp.min(mask.layer) > 0, 1.0, _indicator(CFG.n_embd, range(CFG.n_embd // 2)))
    stream = params | {"embed": params["embed"] * half, "head": params["head"] * half[:, None]}
    chosen = jax.tree.map(lambda a, b: jnp.where(residual, a, b), stream, ablate.masked(params, mask, CFG))
    return nats(chosen, {}, documents, CFG, 4)

  built = [nats(params, {}, documents, CFG, 4), nats(_sliced(params), {}, documents, SUB, 4)]
  return jnp.stack(built), jax.vmap(of)(masks)


def _masks_are_submodels(residual: bool) -> Check:
  """Largest relative difference of document losses, masked against built."""

  def measure(key, scale):
    del scale
    ids = np.random.default_rng(0).integers(0, 64, (4, 13)).astype(np.int32)
    documents = Documents(ids[:, :-1], ids[:, 1:], np.ones((4, 12), np.float32))
    built, by_masks = _losses(key, documents, residual)
    return largest_difference(by_masks, built) / float(np.max(built))

  return measure


CLAIMS = (
  claim(
    "surreal.masks_are_submodels",
    "vmapped masks on branch outputs are the unmasked model and a separately built one; on residual channels not",
    _masks_are_submodels(False),
    1e-5,
    _masks_are_submodels(True),
  ),
)
