"""Write tests/data/tiny_generator: the bundle of a random decoder, so that runtime tests need no torch.

    python tests/data/make_tiny_generator.py             (needs the extra export; the bundle is checked in)
    python tests/data/make_tiny_generator.py --native    tiny_generator_native: its cache grows in place

A Llama of three blocks, width 16, a segment each, with exits and policies, cache fills, a draft head of 20
ids and a chat template; fp32 and int8. Tests may use no number of it, only relations.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from offramp.export.bundle import write_bundle
from offramp.export.chat import ChatFacts
from offramp.export.decoder import ExportableDecoder
from offramp.export.options import ExportOptions
from offramp.models.decoder import DecoderNetwork

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tiny  # noqa: E402

TEMPLATE = "{% for message in messages %}{{ message['content'] + ' ' }}{% endfor %}the"


def network(head_size: int) -> DecoderNetwork:
    """Random everywhere; no bias is zero."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=60, num_key_value_heads=2, max_position_embeddings=64, head_dim=head_size, **sizes
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    decoder = DecoderNetwork(model)
    decoder.add_exits((1, 2), policies=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
        for part in (*decoder.exits.values(), *decoder.policies.values()):
            assert isinstance(part, nn.Linear)
            part.weight.normal_(std=0.3)
            part.bias.normal_(std=0.3)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return decoder


def main() -> None:
    """Write the bundle again, or the other one."""
    native = "--native" in sys.argv[1:]
    target = HERE / ("tiny_generator_native" if native else "tiny_generator")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny.tokenizer().save(str(folder / "tokenizer.json"))
        chat = ChatFacts({"default": TEMPLATE})
        decoder, training = network(16 if native else 4), {"recipe": "consistentee_lm"}
        source = ExportableDecoder(decoder, folder, training, draft_ids=20, chat=chat, portable=not native)
        write_bundle(source, source.split("each"), folder / "bundle", ExportOptions(("fp32", "int8")))
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder / "bundle", target)


if __name__ == "__main__":
    main()
