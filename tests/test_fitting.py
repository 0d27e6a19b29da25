import jax
import numpy as np
import pytest

import mgr_jax as mgr
from mgr_jax.problems import UserError

CFG = mgr.GPTConfig(vocab_size=17, seq_len=8, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, attention="standard")
IDS = np.arange(170) % 17


def fit(cfg=CFG, steps=6, **settings):
  return mgr.fit(cfg, mgr.windows(IDS, batch_size=4, seq_len=8), steps, **settings)


@pytest.fixture(scope="module")
def trained():
  return fit()


def test_it_learns_and_depends_on_nothing_else(trained):
  assert trained.losses.shape == (6,) and trained.losses[-1] < trained.losses[0] - 0.1
  np.testing.assert_array_equal(fit().losses, trained.losses)
  assert trained.cfg == CFG
  measured = mgr.loss(trained.params, next(mgr.windows(IDS, 4, 8)), CFG)[0]
  assert float(measured) < trained.losses[0]


def test_it_goes_on_from_parameters_and_leaves_them_alone(trained):
  before = jax.tree.map(np.array, trained.params)
  more = fit(params=trained.params, steps=2, seed=1)
  jax.tree.map(np.testing.assert_array_equal, trained.params, before)
  assert more.losses[0] < trained.losses[0]


def test_curvature_noise_and_ordinals_reach_the_step():
  noise = {"hoss_noise": "krylov", "hoss_temperature": 1e-6}
  got = fit(optimizer="hoss", schedule="ordinal", hoss_rank=2, ord_patience=1, steps=3, matrix_lr=0.1, **noise)
  assert np.isfinite(got.losses).all() and got.losses[-1] < got.losses[0]


def test_annealed_options_end_as_numbers():
  cfg = mgr.GPTConfig(
    vocab_size=17, seq_len=8, n_layer=1, n_head=2, n_kv_head=2, n_embd=16, attention="tropical(beta=linear:1:4)"
  )
  got = fit(cfg, steps=3)
  assert got.cfg.attention == "tropical(beta=4)"
  assert mgr.forward(got.params, IDS[None, :8], got.cfg)[0].shape == (1, 8, 17)


def test_mistakes():
  with pytest.raises(UserError, match="did you mean muon"):
    fit(optimizer="muun")
  with pytest.raises(UserError, match="--ord_patience=3 has no effect with --optimizer=adamw"):
    fit(ord_patience=3)
  with pytest.raises(UserError, match="steps=0 is not positive"):
    fit(steps=0)
  with pytest.raises(ValueError, match="no window"):
    mgr.windows(IDS[:8], 4, 8)
  with pytest.raises(ValueError, match="ended after 0 of 2"):
    mgr.fit(CFG, [], 2)
  broken = jax.tree.map(lambda p: p * np.nan, mgr.init(jax.random.key(0), CFG))
  with pytest.raises(FloatingPointError, match="step 0"):
    fit(params=broken, steps=2)


def test_claims_of_a_pattern():
  names = [c.name for c in mgr.claims_of("reversible(tropical)")]
  assert len(names) == len(set(names))
  assert {"tropical.capacity", "reversible(tropical).causal_values"} <= set(names)
  with pytest.raises(UserError, match="did you mean braid"):
    mgr.claims_of("brade")
