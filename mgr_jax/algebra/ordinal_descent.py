"""How long a descent through the ordinals can take: fundamental sequences, Hardy functions, controlled descents."""

from collections.abc import Callable

from mgr_jax.algebra.ordinal import Ord, omega

MAX_LENGTH = 20_000
MAX_BITS = 1 << 20


def fundamental(alpha: Ord, n: int) -> Ord:
  """The n-th member of the standard sequence that increases strictly to the limit ordinal α = γ + ω^e.

  γ + ω^{e'}·n for e = e' + 1, and γ + ω^{e[n]} for a limit e.

  Raises:
    ValueError: α is no limit, or n < 0.

  >>> [str(fundamental(omega(2), n)) for n in (1, 2, 3)]
  ['w', 'w*2', 'w*3']
  """
  if not alpha.is_limit:
    raise ValueError(f"alpha={alpha} is no limit ordinal, so no sequence below it leads to it")
  if n < 0:
    raise ValueError(f"n={n} is negative; members are counted from 0")
  *kept, (exponent, coefficient) = alpha.terms
  rest = Ord((*kept, (exponent, coefficient - 1)) if coefficient > 1 else tuple(kept))
  if exponent.is_limit:
    return rest + omega(fundamental(exponent, n))
  below = exponent.limit_part + (exponent.finite_part - 1)
  return rest + omega(below) * n


def hardy(alpha: Ord | int, n: int) -> int:
  """H_α(n): H_0(n) = n, H_{β+1}(n) = H_β(n + 1), H_λ(n) = H_{λ[n]}(n) for limits λ. H_ω(n) = 2n, H_{ω²}(n) = n·2^n.

  (Hardy, 1904; Wainer, 1972.) Runs of successors and of ω are taken in one step each.

  Raises:
    ValueError: a value on the way has more than `MAX_BITS` bits.

  >>> hardy(omega(2), 3), 3 * 2**3
  (24, 24)
  """
  alpha = Ord.of(alpha)
  while not alpha.is_zero:
    exponent, coefficient = alpha.terms[-1]
    if exponent <= 1:
      # The test comes first: a shift by a number of this size would be the excess itself.
      if exponent == 1 and n.bit_length() + coefficient > MAX_BITS:
        raise ValueError(f"a value of more than {MAX_BITS} bits: {n.bit_length()} bits times 2^{coefficient}")
      n = n + coefficient if exponent.is_zero else n << coefficient
      alpha = Ord(alpha.terms[:-1])
    else:
      alpha = fundamental(alpha, n)
  return n


def largest_below(alpha: Ord, bound: int) -> Ord:
  """The largest β < α with all coefficients <= bound; O(degree).

  Raises:
    ValueError: α = 0, or α >= ω^ω, below which no β is the largest.

  >>> largest_below(omega(2), 4)
  Ord.parse('w*4 + 4')
  """
  if alpha.is_zero or not alpha.degree.is_finite:
    raise ValueError(f"alpha={alpha} is not below w^w" if alpha.terms else "alpha=0: nothing is smaller")
  k = int(alpha.degree) + 1
  rank = [0] * k
  for exponent, coefficient in alpha.terms:
    rank[k - 1 - int(exponent)] = coefficient
  too_large = [i for i, c in enumerate(rank) if c > bound]
  if too_large:
    at, digit = too_large[0], bound
  else:
    at = max(i for i, c in enumerate(rank) if c)
    digit = rank[at] - 1
  below = (*rank[:at], digit, *[bound] * (k - at - 1))
  return Ord(tuple((Ord.of(k - 1 - i), c) for i, c in enumerate(below) if c))


def descent_bound(alpha: Ord | int, control: Callable[[int], int]) -> int:
  """Length of the longest α > α_1 > α_2 > ... in which all coefficients of α_t are <= control(t), for α < ω³.

  Attained by the largest allowed ordinal each time: what can follow an ordinal can follow any larger one. Without a
  control no bound exists, since ω may be followed by any integer. O(length).

  Args:
    control: t >= 1 -> integer >= 0.

  Raises:
    ValueError: α >= ω³, or a length above `MAX_LENGTH`.
  """
  alpha = Ord.of(alpha)
  if alpha >= omega(3):
    raise ValueError(f"alpha={alpha} is not below w^3, where lengths can still be counted")
  length = 0
  while not alpha.is_zero:
    if length == MAX_LENGTH:
      raise ValueError(f"alpha: the descent takes more than {MAX_LENGTH} steps")
    length += 1
    alpha = largest_below(alpha, control(length))
  return length
