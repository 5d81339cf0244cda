"""Worker of benchmarks/decoders.py full and rivals: a round of turns in a fresh process.

It reads a line of JSON: scratch, variant, prompts (ids), tokens, seed, order (names, as they are to be
opened) and, for rivals, model; and writes one: answers by name, and what the rivals said of themselves.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

from offramp.benchmarks.decoder_contest import cuts, field
from offramp.benchmarks.decoder_turns import Round, turns, woven


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """A round."""
    scratch, variant, facts = Path(asked["scratch"]), asked["variant"], dict[str, Any]()
    given, draw = (asked["prompts"], asked["tokens"]), random.Random(asked["seed"])
    found: Round
    if "model" in asked:
        with field(Path(asked["model"]), scratch, variant, facts, asked["order"]) as rivals:
            found = turns(rivals, *given, draw)
    else:
        with cuts(scratch, variant, asked["order"]) as contenders:
            found = woven(contenders, *given, draw)
    return {"answers": found, "facts": facts}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.stdin.readline()))))
