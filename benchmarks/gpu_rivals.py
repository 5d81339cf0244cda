"""Rivals of benchmarks/gpu.py on the same device: one graph on ONNX Runtime, and torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from offramp.runtime.engines import ort_cuda, threads
from offramp.runtime.engines.cuda import Cuda, cuda_python
from offramp.runtime.engines.graphs import CPU

Run = Callable[[], object]


def one_graph(work: Path, variant: str, device: str, given: dict[str, Any]) -> Run:
    """The network without exits as one graph: inputs from the host, logits back to it, and waited for.

    On a GPU it is bound to device memory and enqueued on one stream, as the walk is, so that they differ in
    the graphs alone.
    """
    import onnxruntime

    file = work / ("one.onnx" if variant == "fp32" else f"one_{variant}.onnx")
    options = onnxruntime.SessionOptions()
    threads.fit(options)
    if device == "cpu":
        session = onnxruntime.InferenceSession(file, options, providers=[CPU])
        feed = {node.name: given[node.name] for node in session.get_inputs()}
        return lambda: session.run(None, feed)
    cuda = Cuda(cuda_python())
    name = ort_cuda.NAMES["cuda"]
    session = onnxruntime.InferenceSession(
        file, options, providers=[(name, ort_cuda._cuda_options(cuda, False))], enable_fallback=0
    )
    if session.get_providers()[0] != name:
        raise RuntimeError(f"{name} was asked for, {session.get_providers()[0]} came")
    return _bound(onnxruntime, session, cuda, given)


def _bound(ort: Any, session: Any, cuda: Cuda, given: dict[str, Any]) -> Run:
    binding, uploads, held = ort.IOBinding(session), [], []
    for node in session.get_inputs():
        array = given[node.name]
        host, place = cuda.pinned(array.nbytes), cuda.memory(array.nbytes)
        held += [host, place]
        uploads.append((host.array.view(array.dtype).reshape(array.shape), array, place, host))
        binding.bind_input(node.name, ort_cuda.PLACE, 0, array.dtype.type, array.shape, place.pointer)
    (node,) = session.get_outputs()
    shape = (len(next(iter(given.values()))), node.shape[1])
    size = int(np.prod(shape)) * 4
    said, place = cuda.pinned(size), cuda.memory(size)
    binding.bind_output(node.name, ort_cuda.PLACE, 0, np.float32, shape, place.pointer)
    enqueue = ort_cuda.runner(ort, session, binding, {"disable_synchronize_execution_providers": "1"})

    def run() -> None:
        for pinned, array, there, host in uploads:
            pinned[...] = array
            cuda.upload(there.pointer, host.pointer, array.nbytes)
        enqueue()
        cuda.download(said.pointer, place.pointer, size)
        cuda.wait()

    run.memory = (held, said, place, session, cuda)  # type: ignore[attr-defined]  # what the binding points to
    return run


def torch_network(work: Path, variant: str, device: str, given: dict[str, Any]) -> Run:
    """transformers' BERT of that shape with a classifier, eager, with torch's own fused attention."""
    import torch
    from transformers import AutoModelForSequenceClassification, BertConfig

    facts = json.loads((work / "ckpt" / "network.json").read_text(encoding="utf-8"))
    config = BertConfig(**_config(facts) | {"num_labels": 2})
    dtype = torch.float16 if variant == "fp16" else torch.float32
    model = AutoModelForSequenceClassification.from_config(config).to(device, dtype).eval()

    @torch.inference_mode()
    def run() -> object:
        feed = {name: torch.from_numpy(array).to(device) for name, array in given.items()}
        return model(**feed).logits.float().cpu().numpy()  # brings it to the host, and waits

    return run


def _config(facts: Any) -> dict[str, Any]:
    """The backbone's configuration, wherever in the file it stands."""
    if isinstance(facts, dict):
        if "num_hidden_layers" in facts:
            names = (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "vocab_size",
            )
            return {name: facts[name] for name in names}
        for value in facts.values():
            if found := _config(value):
                return found
    return {}
