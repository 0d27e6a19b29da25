"""Quaternion attention: values that turn on their way, what this reads exactly, and what it protects when iterated."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from demos.demo import Demo
from demos.figures import BLUE, GREEN, ORANGE, styled
from mgr_jax.algebra import hypercomplex as hc
from mgr_jax.algebra.hypercomplex_claims import CLAIMS, generator, products, units
from mgr_jax.attention.quaternion_transport import turn

CHANNELS, SEEDS, PAIRS, STEPS = 8, 5, 1024, 512
NOISE = (0.0, 0.05, 0.3)
ARMS = ("dense", "polar of dense", "rotor gate")
COLOURS = (ORANGE, GREEN, BLUE)

_turn = jax.jit(turn, static_argnums=(2, 3))


def basis_table() -> str:
  """The 16 products, computed."""
  unit = np.eye(4, dtype=np.float32)
  table = np.asarray(products(unit[:, None], unit[None]))
  name = lambda a: ("-" if a.sum() < 0 else "") + "1ijk"[int(np.argmax(np.abs(a)))]
  rows = [[f"{name(a):>4}" for a in row] for row in table]
  return "\n".join(f"    {unit:>4} |" + "".join(row) for unit, row in zip("1ijk", rows, strict=True))


def frames(rng, count: int, degrees: float) -> np.ndarray:
  """Rotors about uniform axes; uniform on SO(3), or by angles uniform up to `degrees` when that is below 180."""
  if degrees >= 180:
    return units(rng, count)
  axis = rng.standard_normal((count, 3))
  half = np.radians(rng.uniform(0, degrees, count)) / 2
  axis *= (np.sin(half) / np.linalg.norm(axis, axis=-1))[:, None]
  return np.concatenate([np.cos(half)[:, None], axis], -1)


def rotation(u: np.ndarray) -> np.ndarray:
  """The matrix of x ↦ u x ū on imaginary parts, [..., 3, 3], from the axis and the angle (Rodrigues)."""
  w, v = u[:, 0, None, None], u[:, 1:]
  cross = np.cross(np.eye(3), v[:, None])
  return np.eye(3) + 2 * w * cross + 2 * cross @ cross


def transport_pairs(rng, count: int, degrees: float) -> dict[str, np.ndarray]:
  """What stands at a key (frame, vector in that frame) and at a query (frame), and that vector in the query's frame."""
  key, query, local = frames(rng, count, degrees), frames(rng, count, degrees), rng.standard_normal((count, 3))
  target = np.einsum("nji,njk,nk->ni", rotation(query), rotation(key), local)
  return {"key": key, "query": query, "local": local, "target": target}


def cosine_error(a, b) -> float:
  """Mean of 1 - cos over rows, as half the squared distance of the directions."""
  direction = lambda x: x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
  return float(np.mean(np.sum((direction(a) - direction(b)) ** 2, -1) / 2))


def transport_errors(rng) -> dict[str, list[float]]:
  """Cosine errors with frames within 60 degrees, which the readouts are fitted to, and with all frames.

  The attention weight is on the right item in every arm: what differs is what can be done with what it returns.
  """
  with jax.enable_x64(True):
    train, near, far = (transport_pairs(rng, n, d) for n, d in ((8000, 60), (2000, 60), (2000, 180)))
    conjugate = lambda u: u * [1, -1, -1, -1]
    # The layer with q̂ = conj(g_i) and k̂ = conj(g_j): transport by conj(k̂), then turn by q̂.
    sent = lambda p: _turn(conjugate(p["key"]), np.pad(p["local"], ((0, 0), (1, 0))), "sandwich", True)
    layer = lambda p: np.asarray(_turn(conjugate(p["query"]), sent(p), "sandwich", False))[:, 1:]
    exact = [cosine_error(layer(p), p["target"]) for p in (near, far)]
  seen = lambda p: np.concatenate([p["key"], p["local"], p["query"], np.ones((len(p["key"]), 1))], -1)
  hidden = rng.standard_normal((12, 1024)) / np.sqrt(12)
  readouts = {"linear readout": seen, "1,024 random ReLUs": lambda p: np.maximum(seen(p) @ hidden, 0)}
  errors = {"two-sided rotors": exact}
  for name, features in readouts.items():
    x = features(train)
    weights = np.linalg.solve(x.T @ x + 1e-3 * np.eye(x.shape[1]), x.T @ train["target"])
    errors[f"copy, then {name}"] = [cosine_error(features(p) @ weights, p["target"]) for p in (near, far)]
  return errors


def two_sided(u, v) -> jax.Array:
  """x ↦ u x v as a matrix."""
  return hc.left_matrix(u) @ hc.right_matrix(v)


_two_sided = jax.jit(two_sided)


def gate_matrix(omegas) -> jax.Array:
  """x ↦ exp(ω) x exp(ω') as a matrix; `omegas` [2, ..., 3]."""
  return two_sided(*hc.quat_exp(omegas))


@functools.partial(jax.jit, static_argnums=2)
def _train_gate(moments, start, steps):
  """Adam on the six angles of each gate. A gate is orthogonal, so its squared error is constant - 2 <Y Xᵀ, gate>."""
  optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
  loss = lambda omegas: -jnp.sum(moments * gate_matrix(omegas))

  def step(carry, _):
    omegas, state = carry
    updates, state = optimizer.update(jax.grad(loss)(omegas), state)
    return (optax.apply_updates(omegas, updates), state), None

  (omegas, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), None, steps)
  return gate_matrix(omegas)


def fit_gates(rng, sigma: float, count: int = CHANNELS * SEEDS) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Targets x ↦ u x v [count, 4, 4] and each arm's estimate from noisy pairs; float64."""
  with jax.enable_x64(True):
    target = np.asarray(_two_sided(units(rng, count), units(rng, count)))
    x = rng.standard_normal((count, PAIRS, 4))
    y = x @ target.swapaxes(1, 2) + sigma * rng.standard_normal(x.shape)
    moments = y.swapaxes(1, 2) @ x / PAIRS
    dense = moments @ np.linalg.inv(x.swapaxes(1, 2) @ x / PAIRS)
    left, _, right = np.linalg.svd(dense)
    return target, {
      "dense": dense,
      "polar of dense": left @ right,
      "rotor gate": np.asarray(_train_gate(moments, 0.1 * rng.standard_normal((2, count, 3)), 1500)),
    }


def iterate(gates: np.ndarray, x: np.ndarray, steps: int) -> np.ndarray:
  """x, Gx, ..., G^n x: [n + 1, count, 4]."""
  path = [x]
  for _ in range(steps):
    path.append(np.einsum("cij,cj->ci", gates, path[-1]))
  return np.stack(path)


def composition(rng) -> dict[float, dict[str, tuple[float, float]]]:
  """By noise and arm: mean |log length ratio| and mean angle to the target's iterate, radians, after 512 steps."""
  result = {}
  for sigma in NOISE:
    target, gates = fit_gates(rng, sigma)
    x = units(rng, len(target))
    truth = iterate(target, x, STEPS)[-1]
    ends = {arm: iterate(gate, x, STEPS)[-1] for arm, gate in gates.items()}
    length = {arm: np.linalg.norm(y, axis=-1) for arm, y in ends.items()}
    # 2 arcsin of half the distance: the arccosine would lose half the digits of small angles.
    gap = {arm: np.linalg.norm(ends[arm] / length[arm][:, None] - truth, axis=-1) / 2 for arm in gates}
    result[sigma] = {
      arm: (float(np.mean(np.abs(np.log(length[arm])))), float(np.mean(2 * np.arcsin(np.minimum(gap[arm], 1)))))
      for arm in gates
    }
  return result


def story(key: jax.Array) -> str:
  rng = generator(key)
  transport = transport_errors(rng)
  rows = "\n".join(f"    {name:<32}{near:>19.2g}{far:>16.2g}" for name, (near, far) in transport.items())
  results = composition(rng)
  lines = "\n".join(
    f"    {arm:<18}" + "".join(f"{results[s][arm][0]:>11.1e}{results[s][arm][1]:>10.1e}" for s in NOISE) for arm in ARMS
  )
  polar, rotor = (results[NOISE[1]][arm][1] for arm in ARMS[1:])
  return f"""\
What it is. A head of 4N numbers is N quaternions. A value travels from key j to query i through the
unit quaternion u = q k*, block by block: as u v (an isometry of R^4), or as u v u* (a rotation of
the three imaginary parts). Re(q k*) = <q, k>, so the score is the real part of what also turns the
value. Because (q k*) v = q (k* v), keys turn their values once, attention runs as usual, queries
turn the sum, and no array grows with T^2.

    row times column
         |   1   i   j   k
{basis_table()}

Frame transport. Each token carries a frame and a vector in it; a query asks for the vector in its
own frame. 1 - cos of the answer, frames within 60 degrees (fitted)  all rotations
{rows}
    The rotors are set by hand here: this says what the layer can express, not what training finds.

A long composition. Learn x -> u x v from {PAIRS:,} noisy pairs, then apply it {STEPS} times.
    mean |log length| and mean angle to the truth in radians, {CHANNELS} channels x {SEEDS} draws
                      {"".join(f"{f'noise {s:g}':>21}" for s in NOISE)}
{lines}
    Without noise all arms are exact. With noise a gate keeps lengths and the dense matrix does not,
    but the angle is nearly as lost ({rotor:.2g}): the constraint protects magnitude, not phase. Projecting
    the dense fit on the nearest orthogonal matrix does the same ({polar:.2g}), without quaternions.

What it is not. A weighted sum of turned vectors is shorter than the vectors, as it is for softmax:
the layer preserves no lengths. One layer multiplies two factors: a product of n tokens needs depth.
"""


def iterated_gates(key: jax.Array):
  """Length against the number of steps; one orbit of Im x under x ↦ u x ū and under a dense fit to 64 noisy pairs."""
  from matplotlib.figure import Figure

  rng = generator(key)
  figure = Figure(figsize=(7.6, 3.9), layout="constrained")
  left, right = figure.subplots(1, 2, width_ratios=(1.1, 1))
  target, gates = fit_gates(rng, 0.05)
  x = units(rng, len(target))
  for arm, colour, style in zip(ARMS, COLOURS, ("-", "-", "--"), strict=True):
    lengths = np.linalg.norm(iterate(gates[arm], x, STEPS), axis=-1)
    shown = lengths[:, :12] if arm == "dense" else lengths[:, :1]
    lines = left.semilogy(shown, style, color=colour, lw=1 if arm == "dense" else 2.2, alpha=0.8)
    lines[0].set_label(arm)
  left.set(yticks=(0.5, 1, 2, 4), xticks=(0, 256, 512))
  left.yaxis.set_major_formatter("{x:g}")
  left.minorticks_off()
  styled(left, "lengths, 12 channels, noise 0.05", "steps", "|y| / |x|", "upper left")
  _orbit(right, rng)
  return figure


def _orbit(ax, rng, steps: int = 250):
  """Draws a sphere from outside with one orbit on it and one that leaves it; the far side is paler."""
  angle = 0.11
  true = rotation(np.array([[np.cos(angle / 2), 0, 0, np.sin(angle / 2)]]))[0]
  x = rng.standard_normal((64, 3))
  dense = np.linalg.lstsq(x, x @ true.T + 0.05 * rng.standard_normal(x.shape), rcond=None)[0].T
  u, _, v = np.linalg.svd(dense)
  # Seen from 30 degrees above the equator.
  tilt = np.radians(30)
  across, up, near = np.eye(3)[0], np.array([0, np.sin(tilt), np.cos(tilt)]), np.array([0, -np.cos(tilt), np.sin(tilt)])
  circle = np.linspace(0, 2 * np.pi, 200)
  ax.plot(np.cos(circle), np.sin(circle), color="0.6", lw=1)
  for height in (-0.5, 0, 0.5):
    ring = np.stack([np.cos(circle), np.sin(circle), 0 * circle], 1) * (1 - height**2) ** 0.5 + [0, 0, height]
    ring[ring @ near < 0] = np.nan
    ax.plot(ring @ across, ring @ up, color="0.8", lw=0.8)
  start = np.array([[np.cos(0.5), 0, np.sin(0.5)]])
  for gate, colour, label in ((dense, ORANGE, "dense"), (u @ v, BLUE, "rotor")):
    points = iterate(gate[None], start, steps)[:, 0]
    # An orbit that grows is cut at twice the size of the sphere.
    points = points[np.linalg.norm(points, axis=1) < 2]
    front = points @ near > 0
    for side, alpha in ((front, 1), (~front, 0.3)):
      ax.plot(points[side] @ across, points[side] @ up, ".", ms=4, color=colour, alpha=alpha, mec="none")
    ax.plot([], [], ".", ms=9, color=colour, label=label)
  ax.plot(start @ across, start @ up, "o", ms=8, mfc="none", color="black", label="start")
  ax.set(aspect="equal")
  ax.axis("off")
  ax.set_title(f"Im x on the sphere, {steps} steps", fontsize=13)
  ax.legend(frameon=False, fontsize=11, loc="lower center", bbox_to_anchor=(0.5, -0.16), ncols=3, handletextpad=0.1)


DEMO = Demo(
  name="quaternion",
  summary="values that turn on their way from key to query, and what this reads and protects",
  story=story,
  claims=CLAIMS,
  plots=(iterated_gates,),
  refs=("Hamilton 1844", "Su et al. 2021, arXiv 2104.09864", "Miyato et al. 2023, arXiv 2310.10375"),
  not_shown=(
    ("whether training finds such frames", "20 minutes: python -m train.experiment quaternion_frames"),
    ("speed of a whole layer", "needs a quiet machine: python -m train.bench speed --attention=quaternion"),
    ("pieces of 1, 3 and 8 tokens, bfloat16, zero inputs, memory", "checked by tests/test_quaternion.py"),
    ("other options than the default", "tests/test_conformance.py runs the claims on variants"),
  ),
)
