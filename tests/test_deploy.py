"""deploy/: images and the manifest name what exists: extras, options, paths, the user of the image."""

from __future__ import annotations

import json
import re
import shlex
import sys
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

import pytest
import yaml
from documents import ROOT

from offramp.runtime.serving.cli import main

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEPLOY = ROOT / "deploy"
IMAGES = sorted(DEPLOY.glob("Dockerfile*"))
OPTIONS = {option for parameter in main.params for option in parameter.opts if option.startswith("--")}


def words_of(image: Path, instruction: str) -> list[str]:
    """The words of ENTRYPOINT or CMD."""
    text = image.read_text(encoding="utf-8")
    (line,) = re.findall(rf"^{instruction} (\[.*\])$", text, re.MULTILINE)
    words: list[str] = json.loads(line)
    return words


def check_options(words: list[str]) -> None:
    """Parse the words as ee-serve does, without running it."""
    main.make_context(
        "ee-serve", [word for word in words if "/run/secrets" not in word and word != "--api-keys"]
    )
    assert {word for word in words if word.startswith("--")} <= OPTIONS


def container() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
    assert [document["kind"] for document in documents] == [
        "Deployment",
        "Service",
        "HorizontalPodAutoscaler",
    ]
    (only,) = documents[0]["spec"]["template"]["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("image", IMAGES, ids=lambda file: file.name)
def test_an_image_starts_the_server_with_options_that_it_has(image: Path) -> None:
    program, *words = [*words_of(image, "ENTRYPOINT"), *words_of(image, "CMD")]
    assert program == "ee-serve"
    check_options(words)


@pytest.mark.parametrize("image", IMAGES, ids=lambda file: file.name)
def test_an_image_installs_extras_that_exist(image: Path) -> None:
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (extras,) = re.findall(r"/source\[([\w,]+)\]", image.read_text(encoding="utf-8"))
    assert all(re.search(rf"^{extra} = \[", settings, re.MULTILINE) for extra in extras.split(","))


@pytest.mark.parametrize("image", IMAGES, ids=lambda file: file.name)
def test_an_image_can_require_signatures(image: Path) -> None:
    (extras,) = re.findall(r"/source\[([\w,]+)\]", image.read_text(encoding="utf-8"))
    assert "sign" in extras.split(",")


def is_sent(path: str) -> bool:
    """Whether a build gets a file of the checkout, by the last pattern of .dockerignore that fits."""
    whole, sent = PurePosixPath(path), True
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if pattern.startswith("**/"):
            fits = any(fnmatch(part, pattern.removeprefix("**/")) for part in whole.parts)
        else:
            folders = (str(folder) for folder in (whole, *whole.parents))
            fits = any(fnmatch(f, pattern) and f.count("/") == pattern.count("/") for f in folders)
        if line and not line.startswith("#") and fits:
            sent = line.startswith("!")
    return sent


@pytest.mark.parametrize(
    "path",
    [
        ".git/HEAD",
        ".venv/bin/python",
        "build/types/offramp",
        "demo/bundle/manifest.json",
        "ckpt/weights.safetensors",
        "bundle/segment_00.onnx",
        "keys",
        "ours.pem",
        "web/node_modules/x/index.js",
        "runtime/__pycache__/cli.pyc",
    ],
)
def test_a_build_does_not_get_what_is_no_part_of_the_package(path: str) -> None:
    assert not is_sent(path)


def test_a_build_gets_every_file_of_the_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    setuptools, project = settings["tool"]["setuptools"], settings["project"]
    rooms = setuptools["package-dir"]
    needed = ["pyproject.toml", project["readme"], *project["license-files"]]
    for package in setuptools["packages"]:
        room, *rest = package.removeprefix("offramp.").split(".")
        folder = ROOT.joinpath(rooms[f"offramp.{room}"], *rest)
        files = [
            file for kind in ("*.py", "*.typed", "*.html", "*.js", "*.css") for file in folder.glob(kind)
        ]
        assert files
        needed += [file.relative_to(ROOT).as_posix() for file in files]
    assert [path for path in needed if not is_sent(path)] == []


@pytest.mark.parametrize("image", IMAGES, ids=lambda file: file.name)
def test_an_image_names_no_host_of_a_registry(image: Path) -> None:
    bases = re.findall(r"^FROM (\S+)", image.read_text(encoding="utf-8"), re.MULTILINE)
    assert bases and not [base for base in bases if "." in base.split("/")[0].split(":")[0]]


def test_the_manifest_starts_the_server_with_options_that_it_has() -> None:
    check_options(shlex.split(" ".join(container()["args"])))


def test_the_manifest_asks_the_probes_that_the_server_has() -> None:
    probes = {
        name: container()[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")
    }
    assert probes == {"startup": "/readyz", "readiness": "/readyz", "liveness": "/healthz"}
