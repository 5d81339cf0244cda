"""Shared by tests that need torch: exporting a decoder takes seconds, so one bundle a family serves all."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session")
def decoder_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Any, Path]]:
    """By family: a model of three blocks without an end, and its bundle, a segment a block, whose drafts come
    from the first 20 of 60 ids. Beside it, folder `model` is the model as transformers saves it.
    """

    @cache
    def made(family: str) -> tuple[Any, Path]:
        import tiny  # here, since tests/runtime must do without torch

        from offramp.export.decoder_bundle import write_decoder
        from offramp.models.decoder import DecoderNetwork

        folder, model = tmp_path_factory.mktemp(family), tiny.decoder(family)
        model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
        tiny.tokenizer().save(str(folder / "tokenizer.json"))
        model.save_pretrained(folder / "model")
        network, variants = DecoderNetwork(model), ("fp32", "int8")
        write_decoder(network, folder, folder / "bundle", cuts="each", draft=20, variants=variants)
        return model, folder / "bundle"

    return made
