"""The adaptation table: every parameter covered once, every rule of use."""

import io

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from vlm_jax.config import FULL, Rule
from vlm_jax.errors import ConfigError
from vlm_jax.training import adaptation

FLAT = {
    path: jax.ShapeDtypeStruct((100, 10), jnp.float32)
    for path in ("encoder/a/kernel", "encoder/a/bias", "decoder/b/kernel", "decoder/b/scale")
}


def test_the_first_matching_rule_holds():
    rules = (
        Rule("encoder/.*", mode="frozen"),
        Rule(".*/scale", lr=0.1, weight_decay=0),
        Rule(".*"),
    )
    plan = adaptation.plan(FLAT, rules)
    trainable, frozen = plan.split(FLAT)
    assert set(trainable) == {"decoder/b/kernel", "decoder/b/scale"}
    assert set(frozen) == {"encoder/a/kernel", "encoder/a/bias"}
    assert plan.lr == {"decoder/b/kernel": 1.0, "decoder/b/scale": 0.1}
    assert plan.weight_decay == {"decoder/b/kernel": 1.0, "decoder/b/scale": 0.0}


def test_full_does_not_decay_norms_and_biases():
    plan = adaptation.plan(FLAT, FULL)
    assert [path for path, factor in plan.weight_decay.items() if factor == 0] == [
        "encoder/a/bias",
        "decoder/b/scale",
    ]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((Rule("encoder/.*"),), r"no rule matches 'decoder/b/kernel' \(and 1 others\)"),
        ((Rule("encodr/.*"), Rule(".*")), "rule 'encodr/.*' matches no parameter"),
        ((Rule("encoder"), Rule(".*")), "rule 'encoder' matches no parameter"),
        ((Rule(".*"), Rule("encoder/.*")), r"rule 'encoder/.*' never holds, because '.*'"),
        ((Rule("(", "full"), Rule(".*")), "is no regular expression"),
        ((Rule(".*", "frozen"),), "freezes every parameter"),
    ],
)
def test_tables_that_do_not_mean_what_they_say_are_refused(rules, message):
    with pytest.raises(ConfigError, match=message):
        adaptation.plan(FLAT, rules)


def test_a_catch_all_may_catch_nothing():
    rules = (Rule("encoder/.*"), Rule("decoder/.*"), Rule(".*"))
    assert len(adaptation.plan(FLAT, rules).lr) == len(FLAT)


def test_the_printed_table_counts_parameters_and_state():
    plan = adaptation.plan(FLAT, (Rule("encoder/.*", mode="frozen"), Rule(".*", lr=0.5)))
    out = io.StringIO()
    kept = {"decoder/b/kernel": 8000, "decoder/b/scale": 16_000}
    Console(file=out, width=120).print(adaptation.table(adaptation.groups(plan, 1e-3, kept)))
    lines = {
        line.split("│")[1].strip(): line for line in out.getvalue().splitlines() if "│" in line
    }
    assert "2,000" in lines["encoder/.*"] and "0.0%" in lines["encoder/.*"]
    assert "0 B" in lines["encoder/.*"]
    assert "23.4 KiB" in lines[".*"] and "5.00e-04" in lines[".*"]
    assert "2,000" in lines["all"] and "4,000" in lines["all"] and "50.0%" in lines["all"]
