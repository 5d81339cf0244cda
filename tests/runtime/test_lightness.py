"""Importing the runtime is light: checked in fresh processes, against a list of what may be loaded."""

import subprocess
import sys
from pathlib import Path

TINY = Path(__file__).parents[1] / "data" / "tiny_bundle"
LIGHT = {"numpy", "click", "offramp"}
HEAVY = {"torch", "transformers", "onnx", "datasets", "scipy", "safetensors", "huggingface_hub"}


def loaded(code: str) -> set[str]:
    """Top-level packages from outside the standard library that are loaded after code has run."""
    show = "\nimport sys; print('LOADED', *sorted({n.partition('.')[0] for n in sys.modules}))"
    # Without what site itself loads (.pth files of editable installs).
    before = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    done = subprocess.run([sys.executable, "-c", code + show], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = [set(out.stdout.split("LOADED", 1)[1].split()) for out in (before, done)]
    own = {name for name in names[1] - names[0] - sys.stdlib_module_names if not name.startswith("_")}
    return own - {"cython_runtime"}


def test_importing_the_runtime() -> None:
    assert loaded("import offramp.runtime") <= LIGHT - {"click"}


def test_importing_the_command() -> None:
    assert loaded("import offramp.runtime.cli") <= LIGHT


def test_importing_the_rules() -> None:
    assert loaded("import offramp.runtime.rules") <= LIGHT - {"click"}


def test_importing_every_module_of_the_room() -> None:
    code = """
import importlib, pkgutil, offramp.runtime
names = ('app', 'demo', 'metrics', 'openai', 'row_requests')
of_extras = {'offramp.runtime.serving.' + name for name in names}
for module in pkgutil.walk_packages(offramp.runtime.__path__, 'offramp.runtime.'):
    if module.name not in of_extras:
        importlib.import_module(module.name)
"""
    assert loaded(code) <= LIGHT


def test_opening_and_answering_loads_no_training_software() -> None:
    packages = loaded(f"from offramp.runtime import load; load({str(TINY)!r})('good film')")
    assert {"onnxruntime", "tokenizers"} <= packages
    assert not packages & HEAVY


def test_a_classifier_loads_nothing_of_other_tasks_or_gpus() -> None:
    code = f"""
import sys
from offramp.runtime import load
load({str(TINY)!r})('good film')
parts = ["generator", "decoding", "sequence", "decoder", "trt", "cuda", "device"]
parts += ["multi_label", "token_classifier", "values"]
names = [name for name in sys.modules if name.startswith("offramp.") and any(part in name for part in parts)]
assert not names, names
"""
    assert "onnxruntime" in loaded(code)


def test_every_public_name_can_be_imported() -> None:
    loaded("import offramp.runtime as r; names = [getattr(r, name) for name in r.__all__]")
