"""Builder, settings and timings in the double of TensorRT; trt_double.make cuts each to a version's names."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from typing import Any

from doubles.trt_graph import Graph, pack, profile_problem
from doubles.trt_things import Dims, Thing, plain

_CACHE = b"double of timings\n"


class Builder(Thing):
    _plain = plain(
        platform_has_fast_fp16=True,
        platform_has_fast_int8=True,
        platform_has_tf32=True,
        max_threads=1,
        num_DLA_cores=0,
        max_DLA_batch_size=1,
        error_recorder=None,
        gpu_allocator=None,
        logger=None,
    )

    def __init__(self, logger: Any) -> None:
        self._start(logger)
        if not self._trt._cudart.devices:
            self._say("WARNING", "CUDA initialization failure with error: 35")
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.logger = logger

    def create_network(self, flags: int = 0) -> Any:
        known = [int(flag) for flag in self._trt.NetworkDefinitionCreationFlag]
        if flags >> (max(known) + 1):
            return self._refuse(
                3, "condition: flagSet.toU32() < (1U << EnumMax<NetworkDefinitionCreationFlag>())"
            )
        return self._trt.INetworkDefinition(self, flags)

    def create_builder_config(self) -> Any:
        return self._trt.IBuilderConfig(self)

    def create_optimization_profile(self) -> Any:
        return self._trt.IOptimizationProfile(self)

    def is_network_supported(self, network: Any, config: Any) -> bool:
        return network._graph is not None

    def reset(self) -> None: ...

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        graph: Graph | None = network._graph
        if graph is None:
            return self._refuse(4, "Network must have at least one output")
        profiles = [dict(profile._shapes) for profile in config._profiles]
        if problem := self._trt.build_problem or self._against(network, config, profiles):
            return self._refuse(4, problem)
        profiles = profiles or [{}]
        for profile in profiles:
            for io in graph.inputs:
                profile.setdefault(io.name, (io.shape,) * 3)
        facts = {
            "trt": self._trt._version,
            "gpu": list(self._trt._cudart.capability),
            "compatible": config._has("VERSION_COMPATIBLE"),
            "level": getattr(config.hardware_compatibility_level, "name", "NONE"),
            "profiles": profiles,
            "sharing": self._trt._major >= 10 or "PROFILE_SHARING_0806" in config._features,
            "name": network.name,
        }
        if config._cache is not None and not config._has("DISABLE_TIMING_CACHE"):
            config._cache._entries.add(f"{graph.sha256} {json.dumps(profiles, sort_keys=True)}")
        self._trt.builds += 1
        return self._trt.IHostMemory(pack(facts, graph))

    def _against(self, network: Any, config: Any, profiles: Sequence[Any]) -> str:
        """Why the network is not built with these settings; "" where it is."""
        graph, halves = network._graph, config._has("FP16")
        if network._strong and halves:
            return "FP16 cannot be set for a strongly typed network"
        if (
            not network._strong
            and not halves
            and (graph.half or self._trt.DataType.HALF in network._wishes())
        ):
            return "fp16 precision has been set for a layer or layer output, but fp16 is not configured"
        for layer in network._layers:
            if layer._of_ints and (layer._precision or layer._types):
                return f"{layer.name}: precision is set, and its outputs are integers or booleans"
        if any(io.free for io in graph.inputs) and not profiles:
            return "Network has dynamic or shape inputs, but no optimization profile has been defined"
        return next(filter(None, (profile_problem(graph.inputs, graph, one) for one in profiles)), "")


class IOptimizationProfile(Thing):
    _plain = plain(extra_memory_target=1.0, profile_stream=None)

    def __init__(self, builder: Any) -> None:
        self._start(builder._logger)
        self._shapes: dict[str, tuple[Any, Any, Any]] = {}

    def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
        self._shapes[input] = tuple(min), tuple(opt), tuple(max)

    def get_shape(self, input: str) -> list[Dims]:
        if input not in self._shapes:
            self._refuse(4, f"Cannot get dimensions for input: {input}")
        return [Dims(shape) for shape in self._shapes.get(input, ())]

    def _valid(self) -> bool:
        for least, usual, most in self._shapes.values():
            if not len(least) == len(usual) == len(most):
                return False
            if not all(0 <= a <= b <= c for a, b, c in zip(least, usual, most, strict=True)):
                return False
        return True


class ITimingCache(Thing):
    def __init__(self, logger: Any, facts: dict[str, Any]) -> None:
        self._start(logger)
        self._facts = {"trt": facts["trt"], "gpu": facts["gpu"]}
        self._entries = set(facts["entries"])

    def serialize(self) -> Any:
        facts = {**self._facts, "entries": sorted(self._entries)}
        return self._trt.IHostMemory(_CACHE + json.dumps(facts).encode())

    def combine(self, input_cache: Any, ignore_mismatch: bool) -> bool:
        if not self._fits(input_cache, ignore_mismatch):
            return False
        self._entries |= input_cache._entries
        return True

    def reset(self) -> bool:
        self._entries.clear()
        return True

    def _fits(self, other: Any, ignore_mismatch: bool) -> bool:
        if other._facts["gpu"] != self._facts["gpu"] and not ignore_mismatch:
            self._refuse(3, "the timing cache was made on another device")
            return False
        return True


class IBuilderConfig(Thing):
    _plain = plain(
        builder_optimization_level=3,
        avg_timing_iterations=1,
        max_aux_streams=-1,
        DLA_core=-1,
        hardware_compatibility_level=None,
        profiling_verbosity=None,
        default_device_type=None,
        engine_capability=None,
        profile_stream=0,
        progress_monitor=None,
        runtime_platform=None,
        plugins_to_serialize=[],
        tiling_optimization_level=None,
        l2_limit_for_tiling=-1,
        max_num_tactics=-1,
        min_timing_iterations=1,
        max_workspace_size=0,
        build_route=None,
        int8_calibrator=None,
        algorithm_selector=None,
        quantization_flags=0,
    )

    def __init__(self, builder: Any) -> None:
        self._start(builder._logger)
        self._profiles: list[Any] = []
        self._limits: dict[Any, int] = {}
        self._features: set[str] = set()
        self._flags = 1 << int(self._trt.BuilderFlag.TF32)
        self._cache: Any = None

    def add_optimization_profile(self, profile: Any) -> int:
        if not self._of(profile, "IOptimizationProfile")._valid():
            self._refuse(4, "Invalid optimization profiles, please ensure that they satisfy MIN<=OPT<=MAX")
            return -1
        self._profiles.append(profile)
        return len(self._profiles) - 1

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._profiles)

    @property
    def flags(self) -> int:
        return self._flags

    @flags.setter
    def flags(self, flags: int) -> None:
        self._flags = flags

    def set_flag(self, flag: Any) -> None:
        self._flags |= 1 << int(self._of(flag, "BuilderFlag"))

    def clear_flag(self, flag: Any) -> None:
        self._flags &= ~(1 << int(self._of(flag, "BuilderFlag")))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(self._of(flag, "BuilderFlag")) & 1)

    def set_preview_feature(self, feature: Any, enable: bool) -> None:
        (self._features.add if enable else self._features.discard)(self._of(feature, "PreviewFeature").name)

    def get_preview_feature(self, feature: Any) -> bool:
        return self._of(feature, "PreviewFeature").name in self._features

    def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
        self._limits[self._of(pool, "MemoryPoolType")] = int(pool_size)

    def get_memory_pool_limit(self, pool: Any) -> int:
        return self._limits.get(self._of(pool, "MemoryPoolType"), self._trt._cudart._total())

    def create_timing_cache(self, serialized_timing_cache: Any) -> Any:
        if self._trt._rtx:
            warnings.warn("timing caches are deprecated in TensorRT-RTX", DeprecationWarning, stacklevel=2)
        here = {"trt": self._trt._version, "gpu": list(self._trt._cudart.capability), "entries": []}
        data = bytes(memoryview(serialized_timing_cache))
        try:
            facts = json.loads(data.removeprefix(_CACHE)) if data else here
            if data and (not data.startswith(_CACHE) or facts["trt"] != here["trt"]):
                raise ValueError
        except ValueError:
            self._say("ERROR", "1: Serialization assertion stdVersionRead == serializationVersion failed.")
            if not self._trt.empty_cache_for_bad_one:
                return None
            facts = here
        return self._trt.ITimingCache(self._logger, facts)

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        here = self._trt.ITimingCache(
            self._logger, {"trt": "", "gpu": list(self._trt._cudart.capability), "entries": []}
        )
        if not here._fits(self._of(cache, "ITimingCache"), ignore_mismatch):
            return False
        self._cache = cache
        return True

    def get_timing_cache(self) -> Any:
        return self._cache

    def reset(self) -> None:
        self.__init__(self)  # type: ignore[misc]

    def _has(self, name: str) -> bool:
        flag = self._trt.BuilderFlag.__members__.get(name)
        return flag is not None and self.get_flag(flag)
