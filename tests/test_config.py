"""Configuration and the attention grammar: everything is refused before tracing, all problems together."""

import dataclasses
from types import SimpleNamespace

import pytest

from mgr_jax.attention import model_problems, resolve
from mgr_jax.config import GPTConfig, Item, build_options, layer_items, parse_attention
from mgr_jax.problems import UserError


def fields(**changed):
  return SimpleNamespace(**({f.name: f.default for f in dataclasses.fields(GPTConfig)} | changed))


def test_grammar_parses_counts_options_and_wrappers():
  assert parse_attention("standard") == (Item("standard"),)
  assert parse_attention("a*2, b(x=1, y=two)") == (Item("a"), Item("a"), Item("b", (("x", "1"), ("y", "two"))))
  nested = parse_attention("reversible(ultrametric(K=6), mode=symplectic)*2")
  assert nested == (Item("reversible", (("mode", "symplectic"),), Item("ultrametric", (("K", "6"),))),) * 2
  assert parse_attention("a(b=linear:1:2)") == (Item("a", (("b", "linear:1:2"),)),)


@pytest.mark.parametrize("text", ["standard*2,braid(mode=word)", "reversible(x(K=6),mode=s)", "a(x=1,y=2)"])
def test_items_print_as_the_grammar_that_parses_to_them(text):
  items = parse_attention(text)
  assert parse_attention(",".join(map(str, items))) == items


@pytest.mark.parametrize(
  ("text", "part"),
  [
    ("standard(", "unbalanced"),
    ("standard)", "unbalanced"),
    ("standard,,standard", "empty item"),
    ("", "empty item"),
    ("standard*0", "positive integer"),
    ("standard*x", "positive integer"),
    ("standard(window)x", "is not name"),
    ("standard(window=1,window=2)", "given twice"),
    ("standard(=3)", "not option=value"),
    ("2nd", "is not name"),
  ],
)
def test_bad_grammar_is_refused_with_a_fix(text, part):
  with pytest.raises(UserError, match=part) as e:
    parse_attention(text)
  assert "fix:" in str(e.value)


def test_pattern_is_tiled_and_may_not_exceed_the_stack():
  assert [i.name for i in layer_items("a,b*2", 7)] == ["a", "b", "b", "a", "b", "b", "a"]
  with pytest.raises(UserError, match="names 3 layers but --n_layer=2"):
    layer_items("a,b*2", 2)


@dataclasses.dataclass(frozen=True)
class Sample:
  count: int = 1
  rate: float = 0.5
  on: bool = False
  kind: str = "x"


def test_options_take_the_types_of_their_defaults():
  pairs = [("count", "3"), ("rate", "1e-2"), ("on", "true"), ("kind", "linear:1:2")]
  assert build_options(Sample, pairs, "sample") == Sample(3, 0.01, True, "linear:1:2")


@pytest.mark.parametrize(
  ("pair", "part"),
  [
    (("cuont", "3"), "did you mean count"),
    (("count", "3.5"), "not an integer"),
    (("rate", "fast"), "not a number"),
    (("on", "yes"), "not true or false"),
  ],
)
def test_bad_options_name_option_and_value(pair, part):
  with pytest.raises(ValueError, match=part):
    build_options(Sample, [pair], "sample")


@pytest.mark.parametrize(
  ("changed", "error", "fix"),
  [
    ({"n_embd": 130, "n_head": 4, "n_kv_head": 4}, "not divisible by --n_head=4", "128 or 136, or --n_head=5"),
    ({"n_embd": 12, "n_head": 4, "n_kv_head": 4}, "head size 3", "--n_embd=16"),
    ({"n_kv_head": 4}, "--n_kv_head=4 does not divide --n_head=6", "1, 2, 3, 6"),
    ({"n_layer": 0}, "--n_layer=0 is not positive", "1 or more"),
    ({"mlp": "swish"}, "--mlp=swish", "relu2"),
    ({"compute_dtype": "float8"}, "--compute_dtype=float8", "bfloat16"),
    ({"logit_softcap": -1.0}, "--logit_softcap=-1.0", "0 for no softcap"),
    ({"attention": "standart"}, "unknown attention 'standart'", "did you mean standard"),
    ({"attention": "standard(windw=3)"}, "no option 'windw'", "demos info standard"),
    ({"attention": "standard(window=-3)"}, "window=-3", "demos info standard"),
    ({"attention": "standard(standard)"}, "not a wrapper", "standard(option=value)"),
  ],
)
def test_each_problem_names_the_value_and_a_way_out(changed, error, fix):
  (problem,) = model_problems(fields(**changed))
  assert error in problem.error
  assert fix in problem.fix


def test_all_problems_come_together():
  bad = fields(n_embd=130, n_head=4, n_kv_head=3, attention="standart,standard(windw=1)", mlp="swish")
  text = "\n".join(p.error for p in model_problems(bad))
  for part in ("130", "n_kv_head=3", "standart", "windw", "swish"):
    assert part in text
  assert model_problems(fields()) == []


def test_config_is_hashable_and_refuses_at_construction():
  assert hash(GPTConfig()) == hash(GPTConfig())
  assert GPTConfig(vocab_size=50257).padded_vocab == 50304
  with pytest.raises(UserError, match="not divisible"):
    GPTConfig(n_embd=130)


def test_resolve_gives_one_layer_each():
  layers = resolve(GPTConfig(n_layer=3, attention="standard(window=4),standard"))
  assert [layer.options.window for layer in layers] == [4, 0, 4]


def test_the_package_offers_what_a_notebook_needs():
  import mgr_jax

  assert mgr_jax.GPTConfig is GPTConfig
  assert "standard" in mgr_jax.attention_names()
  assert {"init", "forward", "loss", "fit", "windows", "generate", "claims_of", "run_claims"} <= set(mgr_jax.__all__)
  assert all(callable(getattr(mgr_jax, name)) for name in mgr_jax.__all__)
  with pytest.raises(AttributeError, match="nothing"):
    _ = mgr_jax.nothing
