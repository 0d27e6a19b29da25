"""Functions of a p-adic integer: Mahler's series, and Hensel's lift of roots. Exact host integers."""

import itertools
import math


def mahler_coeffs(values: list[int]) -> list[int]:
  """a_n = (Δ^n f)(0) from f(0) .. f(N): f(x) = Σ_n a_n·C(x, n) on 0 .. N, in the limit on all of ℤ_p (Mahler, 1958).

  4^x = (1 + 3)^x:

  >>> mahler_coeffs([1, 4, 16, 64])
  [1, 3, 9, 27]
  """
  row, found = list(values), []
  while row:
    found.append(row[0])
    row = [b - a for a, b in itertools.pairwise(row)]
  return found


def mahler_eval(coeffs: list[int], x: int) -> int:
  """Σ_n a_n·C(x, n) at a natural number x."""
  return sum(a * math.comb(x, n) for n, a in enumerate(coeffs))


def mahler_certificate(coeffs: list[int], kept: int, p: int) -> int | float:
  """v = min v_p(a_n) over the dropped n >= kept: the first `kept` terms err by exactly p^-v in the sup norm.

  >>> mahler_certificate([1, 3, 9, 27], 2, 3)
  2
  """
  return min((valuation(a, p) for a in coeffs[kept:]), default=math.inf)


def valuation(n: int, p: int) -> int | float:
  """v_p of an integer; infinite for 0."""
  if n == 0:
    return math.inf
  power = 0
  while n % p == 0:
    n, power = n // p, power + 1
  return power


def hensel_lift(coeffs: list[int], root: int, p: int, K: int) -> list[int]:
  """Roots r_1 .. r_K of Σ_i coeffs[i]·x^i mod p, p², ..., p^K that extend a simple root mod p digit by digit.

  Raises:
    ValueError: `root` is no simple root mod p.

  A square root of 2 modulo 7, 49 and 343:

  >>> hensel_lift([-2, 0, 1], 3, 7, 3)
  [3, 10, 108]
  """
  f = lambda x: sum(a * x**i for i, a in enumerate(coeffs))
  slope = sum(i * a * root ** (i - 1) for i, a in enumerate(coeffs) if i)
  if f(root) % p or slope % p == 0:
    raise ValueError(f"root={root} is not a simple root mod {p}: f = {f(root) % p}, f' = {slope % p}")
  inverse, found = pow(slope, -1, p), [root % p]
  for k in range(1, K):
    r, modulus = found[-1], p**k
    found.append(r + (-(f(r) // modulus) * inverse % p) * modulus)
  return found
