"""Old keys and values are read where they were stored, and refused with their new names on a command line."""

import pytest
from helpers.common import ROOT, composed

from mtcl.config.compose import compose_config
from mtcl.config.renamed import (
    RENAMED_IN,
    RENAMED_KEYS,
    RENAMED_VALUES,
    upgrade_config,
    upgrade_flat_config,
    upgrade_override,
)
from mtcl.config.schema import RULES
from mtcl.errors import UserError


def test_every_new_key_has_a_rule_and_no_old_one():
    assert set(RENAMED_KEYS.values()) <= set(RULES)
    assert not set(RENAMED_KEYS) & set(RULES)
    groups = {"loss", "recipe", "evaluation"}
    assert set(RENAMED_VALUES) <= set(RULES) | groups
    for group in groups:
        assert (ROOT / "configs" / group / "standard.yaml").is_file()


def test_nested_configs_are_upgraded_and_the_rest_stays():
    old = {
        "seed": 1,
        "regularizer": {"balance": "gradient", "until": 0.5, "options": {"pixels": 32, "window": None}},
        "balancing": {"contrast": "outside"},
        "evaluation": {"quick": [9, 4], "options": {"depth": {"protocol": "field", "max_depth": None}}},
        "data": {"labels": "full", "normals_valid": "field", "options": {}},
        "trainer": {"panels": 4, "max_steps": 7},
    }
    new = {
        "seed": 1,
        "regularizer": {
            "weighting": "gradient_norm",
            "stop_fraction": 0.5,
            "options": {"num_pixels": 32, "window": None},
        },
        "balancing": {"regularizer_as_objective": False},
        "evaluation": {"fast_boundaries": [9, 4], "options": {"depth": {"protocol": "standard", "max_depth": None}}},
        "data": {"label_assignment": "full", "normals_valid": "standard", "options": {}},
        "trainer": {"num_panels": 4, "max_steps": 7},
    }
    assert upgrade_config(old) == new
    assert upgrade_config(new) == new


@pytest.mark.parametrize(("old", "new"), [(True, "random"), ("true", "random"), (False, True)])
def test_a_value_that_is_renamed_with_its_key(old, new):
    key = "regularizer.options.source_labels"
    assert upgrade_flat_config({"regularizer.options.shuffle": old}) == {key: new}
    upgraded = upgrade_config({"regularizer": {"options": {"shuffle": old}}})
    assert upgraded == {"regularizer": {"options": {"source_labels": new}}}
    assert upgrade_config(upgraded) == upgraded
    with pytest.raises(UserError, match=r"use that key \(true is random, false is true\)"):
        compose_config(["regularizer.options.shuffle=true"], ROOT / "configs")


def test_of_an_old_and_a_new_key_today_s_counts():
    both = {"trainer": {"num_panels": 1, "panels": 4}}
    assert upgrade_config(both) == upgrade_config({"trainer": dict(reversed(both["trainer"].items()))})
    assert upgrade_config(both) == {"trainer": {"num_panels": 1}}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("trainer.val_first=false", "trainer.validate_first=false"),
        ("+regularizer.options.pixels=32", "+regularizer.options.num_pixels=32"),
        ("~regularizer.options.tap", "~regularizer.options.feature"),
        ("regularizer.options.shuffle=true", "regularizer.options.source_labels=random"),
        ("regularizer.options.shuffle=false", "regularizer.options.source_labels=true"),
        ("regularizer.options.source_labels=true", "regularizer.options.source_labels=true"),
        ("balancing.contrast=objective", "balancing.regularizer_as_objective=true"),
        ("loss=field", "loss=standard"),
        ("evaluation.options.sal.protocol=field", "evaluation.options.sal.protocol=standard"),
        ("data.root=/a=field", "data.root=/a=field"),
        ("regularizer=none", "regularizer=none"),
    ],
)
def test_recorded_overrides_are_upgraded(old, new):
    assert upgrade_override(old) == new


@pytest.mark.parametrize("old", RENAMED_KEYS)
@pytest.mark.parametrize("sign", ["", "+"])
def test_an_old_key_on_the_command_line_is_answered_with_the_new_one(old, sign):
    with pytest.raises(UserError) as refused:
        compose_config([f"{sign}{old}=1"], ROOT / "configs")
    assert RENAMED_KEYS[old] in str(refused.value)
    assert f"since version {RENAMED_IN.get(old, '0.2')};" in str(refused.value)


@pytest.mark.parametrize("group", ["loss", "evaluation"])
def test_an_old_choice_is_answered_with_the_new_one(group):
    with pytest.raises(UserError, match=f"{group}=field is called {group}=standard"):
        compose_config([f"{group}=field"], ROOT / "configs")


def test_today_s_config_needs_no_upgrade():
    plain = {key: value for key, value in composed().items() if key not in ("hydra", "name")}
    assert upgrade_config(plain).keys() == plain.keys()
