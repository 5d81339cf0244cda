"""Tests of benchmarks.compare.specs: what a spec trains, where, and from which checkpoint it starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from offramp.benchmarks.compare.specs import (
    PRESETS,
    CommonWords,
    ModelSpec,
    parse_specs,
    safe_name,
    start_of,
)
from offramp.benchmarks.compare.trainings import Trainer
from offramp.runtime.errors import BadSetting

COMMON = CommonWords("m", "d")


def texts(words: str) -> list[str]:
    return [spec.text for spec in parse_specs(words)]


def test_commas_separate_recipes_settings_and_values() -> None:
    assert texts("joint,deebert quee") == ["joint", "deebert", "quee"]
    assert texts("joint:distill=0.5,weights=uniform,deebert") == [
        "joint:distill=0.5,weights=uniform",
        "deebert",
    ]
    (spec,) = parse_specs("quee:variants=fp32,int8,changes=1")
    assert spec.models[0].settings == ("variants=fp32,int8", "changes=1")
    assert texts("joint joint") == ["joint"]


def test_options_of_training_are_kept_apart_from_settings() -> None:
    (spec,) = parse_specs("joint:--pooling=attention,distill=0.5,--head=mlp")
    assert spec.models == (ModelSpec("joint", ("distill=0.5",), ("--pooling=attention", "--head=mlp")),)


def test_several_values_are_one_model_each() -> None:
    (spec,) = parse_specs("consistentee:alpha=0.01|0.05,hardness=false")
    assert [model.label for model in spec.models] == [
        "consistentee:alpha=0.01,hardness=false",
        "consistentee:alpha=0.05,hardness=false",
    ]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("jei-dnn", "'jei-dnn' is not known"),
        ("joint,nosuch", "'nosuch' is not known"),
        ("joint:distill", "'distill' is neither"),
        ("consistentee:alpha=1|2,rounds=1|2", "two settings with several values"),
    ],
)
def test_a_wrong_spec_is_named(words: str, named: str) -> None:
    with pytest.raises(BadSetting, match=named):
        parse_specs(words)


def test_folders_have_plain_names_and_differ() -> None:
    assert safe_name("joint") == "joint"
    assert safe_name("joint:distill=0.5,--pooling=attention") == "joint-distill=0.5-pooling=attention"
    assert safe_name("joint + patience") == "joint+patience"
    strange = [safe_name(f"joint:a=x{mark}y") for mark in "/ *"]
    assert len(set(strange)) == 3 and all("/" not in name and " " not in name for name in strange)


def test_models_of_one_curve_start_from_one_checkpoint_with_their_own_settings_of_it() -> None:
    (spec,) = parse_specs("consistentee:alpha=0.01|0.05")
    starts = {start_of(model, COMMON) for model in spec.models}
    (start,) = starts
    assert start is not None and start.recipe == "joint"
    assert "epochs=2" in start.settings and "--pooling=cls" in start.options
    assert not any(word.startswith("alpha") for word in start.settings)


def test_settings_of_all_recipes_and_of_the_spec_reach_the_start() -> None:
    common = CommonWords("m", "d", more=("--pooling", "mean"), settings=("epochs=7",))
    start = start_of(ModelSpec("pabee", ("weights=uniform",)), common)
    assert start == ModelSpec("joint", ("weights=uniform",)), "epochs=7 is given to every recipe"
    (cls,) = parse_specs("consistentee")
    start = start_of(cls.models[0], common)
    assert start is not None and start.options == (), "the command names the pooling"
    assert start_of(ModelSpec("joint"), common) is None


def test_a_spec_may_name_its_start() -> None:
    (spec,) = parse_specs("consistentee:alpha=0.02,--init=joint:epochs=1")
    assert start_of(spec.models[0], COMMON) == ModelSpec("joint", ("epochs=1",))
    (spec,) = parse_specs("consistentee:--init=none")
    assert start_of(spec.models[0], COMMON) is None


def test_a_setting_that_a_recipe_lacks_is_named_before_anything_is_trained() -> None:
    with pytest.raises(BadSetting, match="nosuch"):
        start_of(ModelSpec("joint", ("nosuch=1",)), COMMON)


def test_recipes_of_language_models_are_refused() -> None:
    with pytest.raises(BadSetting, match="layerskip trains language models"):
        start_of(ModelSpec("layerskip"), COMMON)


def finished(folder: Path, model: ModelSpec, **training: Any) -> None:
    model.folder(folder, 0).mkdir()
    (model.folder(folder, 0) / "training.json").write_text(json.dumps(training))


def test_a_checkpoint_with_other_settings_is_not_used(tmp_path: Path) -> None:
    model = ModelSpec("joint", ("epochs=2",))
    finished(tmp_path, model, settings={"epochs": 2, "lr": 5e-5})
    assert Trainer(tmp_path, COMMON).train_once(model, 0) == model.folder(tmp_path, 0)
    with pytest.raises(BadSetting, match=r"lr=5e-05, not 0\.1"):
        Trainer(tmp_path, CommonWords("m", "d", settings=("lr=0.1",))).train_once(model, 0)


def test_a_setting_that_was_left_out_has_its_default(tmp_path: Path) -> None:
    finished(tmp_path, ModelSpec("joint"), settings={"lr": 1e-3})
    with pytest.raises(BadSetting, match=r"lr=0\.001, not 5e-05"):
        Trainer(tmp_path, COMMON).train_once(ModelSpec("joint"), 0)


@pytest.mark.parametrize(
    ("name", "value"), [("model", "other/e5"), ("data", "trec6"), ("prefix", ""), ("pooling", None)]
)
def test_a_checkpoint_of_another_command_is_not_used(tmp_path: Path, name: str, value: object) -> None:
    model = ModelSpec("joint", options=("--pooling=cls",))
    common = CommonWords("../models/mpnet", "data/sst2", options=("--prefix", "query: "))
    command = {
        "model": "mpnet",
        "data": "/data/sst2",
        "prefix": "query: ",
        "pooling": "cls",
        "out": "elsewhere",
    }
    finished(tmp_path, model, command=command)
    assert Trainer(tmp_path, common).train_once(model, 0) == model.folder(tmp_path, 0)
    training = model.folder(tmp_path, 0) / "training.json"
    training.write_text(json.dumps({"command": command | {name: value}}))
    with pytest.raises(BadSetting, match=f"has {name}="):
        Trainer(tmp_path, common).train_once(model, 0)


@pytest.mark.slow  # two trainings, each of which imports torch
def test_several_trainings_at_once_share_the_one_they_start_from(tmp_path: Path) -> None:
    model, data = tiny.model_folder(tmp_path / "model"), tiny.data_folder(tmp_path / "data")
    common = CommonWords(str(model), str(data), settings=("epochs=1", "batch_size=8"))
    models = [ModelSpec("consistentee_plus", ("policy_epochs=1",)), ModelSpec("joint")]
    Trainer(tmp_path / "out", common, workers=2).train_all([(model, 0) for model in models])
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    first = models[0].folder(tmp_path, 0).name
    assert written == sorted([first, f"{first}.log", "joint_0", "joint_0.log"])
    assert (tmp_path / "out" / "joint_0.log").read_text().startswith("joint: 8 steps in ")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_recipes_and_settings_of_presets_exist(name: str) -> None:
    preset = PRESETS[name]
    common = CommonWords("m", "d", more=preset.more, settings=preset.settings)
    specs = parse_specs(preset.recipes)
    for spec in specs:
        for model in spec.models:
            start_of(model, common)
    assert preset.reference.partition(" + ")[0] in [spec.text for spec in specs]
