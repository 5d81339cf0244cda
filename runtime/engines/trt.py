"""The TensorRT engine: every segment compiled on this GPU, its state never leaving it.

TensorRT or TensorRT-RTX, whichever is installed; versions 8.6 to 11. Names, dtypes and shapes come from the
manifest; engines are held to them. What is compiled is kept: see trt_cache.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Manifest, Variant
from offramp.runtime.engines import trt_versions
from offramp.runtime.engines.cuda import Cuda, cuda_python, missing_driver
from offramp.runtime.engines.device import STEM, DeviceEngine
from offramp.runtime.engines.device_buffers import Layout, Step
from offramp.runtime.engines.profiles import MOST_ROWS, profiles
from offramp.runtime.engines.tensors import flows_of
from offramp.runtime.engines.trt_cache import EngineCache, default_folder
from offramp.runtime.engines.trt_open import TrtOpener
from offramp.runtime.errors import BadSetting, EngineUnavailable

VARIANTS = ("fp32", "fp16")  # int8 and int4 graphs hold operators of ONNX Runtime's own
_MODULES = ("tensorrt", "tensorrt_rtx")
_RUNTIMES = ("tensorrt_lean", "tensorrt_dispatch")  # they run engines and cannot build them


class TrtEngine(DeviceEngine):
    """See offramp.runtime.engines.Engine."""

    name, most_rows = "trt", MOST_ROWS

    def __init__(
        self, trt: Any, cuda: Cuda, bundle: Bundle, cache: EngineCache, share: bool, graphs: bool
    ) -> None:
        manifest = bundle.manifest
        opener = TrtOpener(trt, cuda, bundle, cache, profiles(manifest), _graph_of(manifest), share, graphs)
        stem = manifest.stem.variants[manifest.variants[0]]
        inputs = [trt_versions.as_read(trt, tensor) for tensor in stem.inputs]
        layout = Layout.of(manifest, flows_of(manifest), inputs)
        super().__init__(cuda, opener, layout, _graph_of(manifest), manifest)
        self._facts = {trt.__name__: trt.__version__, "gpu": f"{cuda.gpu}, {cuda.capability}"}
        self._facts["driver"] = cuda.driver
        self._made = opener

    @property
    def facts(self) -> dict[str, str]:
        """Version, GPU, driver, and where the engines came from."""
        return self._facts | {
            "engines": self._made.origin,
            "cuda graphs": "on" if self._made.captures else "off",
        }


def open(
    bundle: Bundle,
    *,
    device: str,
    variant: str,
    threads: int | None,
    global_pool: bool,
    share: bool,
    provider: str | None,
    cuda_graphs: bool,
) -> TrtEngine:
    """The engine, no graph opened yet; EngineUnavailable names the first missing piece; never takes ORT."""
    if device != "cuda":
        raise BadSetting(f"engine trt runs on device cuda alone, not {device}: leave the device out")
    for name, wish in (("provider", provider), ("threads", threads)):
        if wish is not None:
            raise BadSetting(f"{name} {wish} is for engine ort; leave it out with engine trt")
    if variant not in VARIANTS:
        raise BadSetting(
            f"variant {variant} is ONNX Runtime's own; engine trt walks {' or '.join(VARIANTS)}: write a "
            "bundle with ee-split --variants fp32,fp16"
        )
    trt = find()
    try:
        cuda = Cuda(cuda_python())
    except EngineUnavailable as problem:
        raise EngineUnavailable(f"engine trt: {problem}, or use --engine ort") from problem
    return TrtEngine(trt, cuda, bundle, EngineCache(default_folder() / "trt"), share, cuda_graphs)


def find() -> ModuleType:
    """The TensorRT module of this machine; EngineUnavailable names the first missing piece and its cure.

    The driver is asked before any tensorrt module is imported: without a driver, TensorRT's own objects crash
    the process.
    """
    installed = [name for name in _MODULES if find_spec(name) is not None]
    module = "" if installed else " (the Python module tensorrt is not installed either)"
    driver = missing_driver()
    if driver is not None:
        raise EngineUnavailable(
            f"engine trt: {driver}{module}; TensorRT needs an NVIDIA GPU: install its driver, or use "
            "--engine ort"
        )
    if not installed:
        half = [name for name in _RUNTIMES if find_spec(name) is not None]
        beside = f" ({half[0]} is installed: it runs engines and cannot build them)" if half else ""
        raise EngineUnavailable(
            f"engine trt: no Python module tensorrt or tensorrt_rtx{beside}; pip install 'offramp[trt]' (on "
            "a Jetson: make the virtual environment with --system-site-packages: JetPack brings it), or use "
            "--engine ort"
        )
    problems = []
    for name in installed:
        try:
            return import_module(name)
        except (ImportError, OSError) as problem:  # e.g. the bindings without their libraries
            problems.append(f"{name} cannot be imported: {problem}")
    cure = "reinstall with: pip install --force-reinstall 'offramp[trt]', or use --engine ort"
    raise EngineUnavailable(f"engine trt: {'; '.join(problems)}; {cure}")


def _graph_of(manifest: Manifest) -> Any:
    """Step -> its graph; BadSetting for a variant that TensorRT does not walk."""

    def graph(step: Step) -> Variant:
        if step == STEM:
            return manifest.stem.variants[manifest.variants[0]]
        segment, number = step
        name = manifest.variants[number]
        if name not in VARIANTS:
            raise BadSetting(
                f"the rule goes on in {name}, which is ONNX Runtime's own: use --engine ort, or a rule that "
                f"stays in {' or '.join(VARIANTS)}"
            )
        return manifest.segments[segment].variants[name]

    return graph
