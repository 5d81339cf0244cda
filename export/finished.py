"""Open a finished bundle as ee-run does, so that nothing is called verified that ee-run would refuse."""

from __future__ import annotations

from pathlib import Path

from offramp.runtime.bundle.files import Bundle, open_bundle
from offramp.runtime.bundle.manifest import GENERATION
from offramp.runtime.engines.graphs import BundleGraphs, free_unused_memory, import_onnxruntime
from offramp.runtime.engines.threads import claim_pool
from offramp.runtime.errors import BadInput, EngineUnavailable
from offramp.runtime.generator import TextGenerator
from offramp.runtime.inputs.chat import DEFAULT, ChatTemplate
from offramp.runtime.loading import load_generator, load_row_session

_ANSWER = "Seven birds."  # text of a sample message, behind which the end of a turn stands


def open_finished(folder: Path) -> tuple[str, ...]:
    """Open a bundle as ee-run does: manifest, tokenizer, rule, chat templates, and every graph, one by one.

    Returns notes for the user about what ee-run would not refuse, but what a user may not expect. Raises
    BadBundle and the other errors of load() for what ee-run would refuse. Graphs are opened one after
    another, since the network itself may be in memory, too.
    """
    bundle = open_bundle(folder)
    _open_graphs(bundle)
    options = {"lazy": True, "share": False}
    if bundle.manifest.kind == GENERATION:
        with load_generator(folder, **options) as session:
            return _notes_on_ends(bundle, session)
    try:
        load_row_session(folder, **options).close()
    except EngineUnavailable as problem:  # what reads its inputs is not installed here, and not needed here
        return (f"the bundle was not opened as ee-run opens it: {problem}",)
    return ()


def _open_graphs(bundle: Bundle) -> None:
    manifest, ort = bundle.manifest, import_onnxruntime("cpu")
    parts = [manifest.stem, *manifest.segments]
    if (decoder := manifest.decoder) is not None:
        parts += [decoder.head, *decoder.cache_fills, *decoder.drafting]
    graphs = BundleGraphs(ort, bundle, "cpu", claim_pool(ort, None, False), {}, share=False)
    every = (graph for part in parts for variant in part.variants.values() for graph in variant.graphs)
    for facts in dict.fromkeys(every):
        graphs.open(*graphs.read(facts))  # freed at once, as nothing refers to it
        free_unused_memory()


def _notes_on_ends(bundle: Bundle, session: TextGenerator) -> tuple[str, ...]:
    """Notes on chat templates and on tokens that should end an answer and do not."""
    notes = []
    if not session.stop_ids:
        notes.append(
            "no token ends an answer, as in transformers: generation_config.json and config.json name no "
            "eos_token_id"
        )
    template = ChatTemplate(bundle)
    try:
        template.compile()
        end = _end_of_turn(template, session) if DEFAULT in template.names else None
    except EngineUnavailable as problem:
        return (*notes, f"chat templates were not compiled: {problem}")
    except BadInput as problem:
        return (*notes, f"a question and an answer make no prompt: {problem}")
    finally:
        template.close()
    if end is not None and end[0] not in session.stop_ids:
        notes.append(
            f"the chat template ends turns with {end[1]!r}, at which answers do not end, as in transformers; "
            f"add its id {end[0]} to eos_token_id in generation_config.json and split again"
        )
    return tuple(notes)


def _end_of_turn(template: ChatTemplate, session: TextGenerator) -> tuple[int, str] | None:
    """Id and text of the special token with which the default template ends an answer, if it writes one."""
    messages = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": _ANSWER}]
    prompt = template(messages, arguments={"add_generation_prompt": False})
    before, _, rest = prompt.rpartition(_ANSWER)
    special = session.added_tokens
    if not before:
        return None
    return next(((id, special[id]) for id in session.encode_continuation(rest) if id in special), None)
