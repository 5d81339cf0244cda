"""Engine ort on a GPU, with ONNX Runtime's CUDA kernels or with TensorRT as its provider.

The walk is that of offramp.runtime.engines.device: states stay on the device, runs are enqueued on one stream
without a wait, and the host waits only for the signals of a segment.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Sequence
from contextlib import redirect_stdout
from itertools import count
from types import ModuleType

import numpy as np

from offramp.runtime.bundle.files import Bundle
from offramp.runtime.bundle.manifest import Variant
from offramp.runtime.engines.base import EngineOptions
from offramp.runtime.engines.buffers import Run, make_run
from offramp.runtime.engines.cuda import Cuda, driver_problem, import_cuda_runtime
from offramp.runtime.engines.device import STEM, DeviceEngine, Layout, Places, Step
from offramp.runtime.engines.graphs import BundleGraphs, OpenGraph, Providers, import_onnxruntime
from offramp.runtime.engines.tensors import updated_tensors
from offramp.runtime.engines.threads import Pool, claim_pool
from offramp.runtime.engines.trt_cache import EngineCache, default_cache_folder
from offramp.runtime.errors import BadBundle, BadSetting, EngineUnavailable

NAMES = {"cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
PLACE = "cuda"  # ONNX Runtime's name of the memory that is bound


class OrtOpener:
    """Opens graphs with ONNX Runtime and binds them to device memory; see device.GraphOpener.

    numbered: each run gets its own number, under which ONNX Runtime captures it as a CUDA graph.
    """

    captures = False  # ONNX Runtime captures runs itself

    def __init__(
        self,
        ort: ModuleType,
        graphs: BundleGraphs,
        bundle: Bundle,
        numbered: bool,
    ) -> None:
        self._ort, self._graphs, self._bundle = ort, graphs, bundle
        self._open: dict[Variant, OpenGraph] = {}
        self._numbers = count(1) if numbered else None

    def open(self, graphs: Sequence[Variant]) -> None:
        """Open those of these graphs that are not open yet."""
        for graph in graphs:
            if graph not in self._open:
                self._open[graph] = self._graphs.open(*self._graphs.read(graph))

    def bind(self, graph: Variant, use: Hashable, places: Places, rows: int, length: int) -> Run:
        """Make a function that enqueues one run of an open graph at these places; see GraphOpener.bind."""
        session = self._open[graph].session
        binding = self._ort.IOBinding(session)
        for bind, tensors in ((binding.bind_input, graph.inputs), (binding.bind_output, graph.outputs)):
            for tensor in tensors:
                address, shape = places[tensor.name]
                bind(tensor.name, PLACE, 0, np.dtype(tensor.dtype).type, shape, address)
        # No wait for the device after a run: later work is enqueued on the same stream.
        entries = {"disable_synchronize_execution_providers": "1"}
        if self._numbers is not None:
            entries["gpu_graph_id"] = str(next(self._numbers))
        enqueue, path = make_run(self._ort, session, binding, entries), self._bundle.folder / graph.file

        def run() -> None:
            try:
                enqueue()
            except Exception as problem:  # ORT's error types share no base of their own
                raise BadBundle(f"{path}: ONNX Runtime cannot run {rows} x {length}: {problem}") from problem

        return run

    def close(self) -> None:
        """Free the sessions of all graphs."""
        self._open.clear()


class OrtCudaEngine(DeviceEngine):
    """Runs segments with ONNX Runtime on a GPU; see engines.base.Engine."""

    name = "ort"
    max_rows = 1 << 20  # no limit but memory

    def __init__(
        self,
        ort: ModuleType,
        cuda: Cuda,
        bundle: Bundle,
        variant: str,
        pool: Pool,
        providers: Providers,
        cuda_graphs: bool,
    ) -> None:
        manifest = bundle.manifest
        stem = manifest.stem.variants[manifest.variants[0]]

        def graph(step: Step) -> Variant:
            if step == STEM:
                return stem
            name = manifest.variants[step[1]]
            if name != variant and len(providers) > 1:
                raise BadSetting(
                    f"the rule goes on in {name}: provider tensorrt is set up for {variant} alone; use cuda"
                )
            return manifest.segments[step[0]].variants[name]

        # Sessions run on this engine's stream: they cannot be shared with another engine.
        sessions = BundleGraphs(ort, bundle, self.device, pool, {}, False, providers)
        layout = Layout.from_manifest(manifest, updated_tensors(manifest), stem.inputs)
        super().__init__(cuda, OrtOpener(ort, sessions, bundle, cuda_graphs), layout, graph, manifest)
        self._facts = {
            "onnxruntime": ort.__version__,
            "provider": providers[0][0],
            "gpu": f"{cuda.gpu}, {cuda.capability}",
            "driver": cuda.driver,
            "cuda graphs": "on" if cuda_graphs else "off",
        }

    @property
    def facts(self) -> dict[str, str]:
        """Version of onnxruntime, the provider that is really used, GPU, driver, and use of CUDA graphs."""
        return dict(self._facts)


def open_cuda(bundle: Bundle, variant: str, options: EngineOptions) -> OrtCudaEngine:
    """Create engine ort on a GPU; no file is opened yet.

    Raises EngineUnavailable, which names the first missing piece; the CPU is never used instead.
    """
    ort, provider = import_onnxruntime("gpu"), options.provider or "cuda"
    name = NAMES[provider]
    if name not in ort.get_available_providers():
        raise EngineUnavailable(
            f"engine ort: this onnxruntime {ort.__version__} has no {name}; pip uninstall onnxruntime, then "
            "pip install 'offramp[gpu]' (both packages own the same module), or use --device cpu"
        )
    driver = driver_problem()
    if driver is not None:
        raise EngineUnavailable(f"engine ort: {driver}: install the GPU's driver, or use --device cpu")
    try:
        cuda = Cuda(import_cuda_runtime())
    except EngineUnavailable as problem:
        raise EngineUnavailable(f"engine ort: {problem}, or use --device cpu") from problem
    if hasattr(ort, "preload_dlls"):
        # Loads CUDA's libraries from the Python packages of the extra if the system has none. It prints the
        # names of missing ones, and stdout is for answers.
        with redirect_stdout(sys.stderr):
            ort.preload_dlls()
    pool = claim_pool(ort, options.threads, options.global_pool)
    providers = _providers(provider, cuda, options.cuda_graphs, variant == "fp16")
    return OrtCudaEngine(ort, cuda, bundle, variant, pool, providers, options.cuda_graphs)


def _providers(provider: str, cuda: Cuda, graphs: bool, half: bool) -> list[tuple[str, dict[str, str]]]:
    """The provider with its options; after TensorRT, CUDA's kernels for operators that it cannot run."""
    providers = [(NAMES["cuda"], _cuda_options(cuda, graphs and provider == "cuda"))]
    if provider == "tensorrt":
        providers.insert(0, (NAMES["tensorrt"], _tensorrt_options(cuda, graphs, half)))
    return providers


def _cuda_options(cuda: Cuda, graphs: bool) -> dict[str, str]:
    return {
        "device_id": "0",
        "user_compute_stream": str(cuda.stream),
        # Each session has its own arena: growth in powers of two would double the memory of a bundle.
        "arena_extend_strategy": "kSameAsRequested",
        "use_tf32": "0",  # full float32, with which a bundle's points were measured
        "enable_cuda_graph": "1" if graphs else "0",
    }


def _tensorrt_options(cuda: Cuda, graphs: bool, half: bool) -> dict[str, str]:
    """Options with which ONNX Runtime builds TensorRT engines for each shape and keeps them in the cache.

    half: the graphs hold float16. The provider's networks are weakly typed, so exits may be rounded to
    float16, too.
    """
    folder = EngineCache(default_cache_folder() / "ort").folder
    return {
        "device_id": "0",
        "user_compute_stream": str(cuda.stream),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
        "trt_fp16_enable": "1" if half else "0",
        "trt_cuda_graph_enable": "1" if graphs else "0",
    }
