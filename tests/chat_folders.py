"""Folders of tokenizers with chat templates as transformers saves them, and templates of known forms.

The templates are written for these tests; they have the logic of the published ones, not their text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXTS = (
    "the film was good and the plot was bad",
    "what is the weather in Paris today",
    "a user asks a model",
)
TOKENS = [
    *("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "[INST]", "[/INST]"),
    *("<|begin|>", "<|head|>", "<|headend|>", "<|eot|>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<think>", "</think>", "<tools>", "</tools>"),
]

CHATML = """{% for m in messages %}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """{{ bos_token }}{% for m in messages -%}
{{ '<|head|>' ~ m['role'] ~ '<|headend|>\\n\\n' ~ (m['content'] | trim) ~ '<|eot|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|head|>assistant<|headend|>\\n\\n' }}{% endif %}"""
MISTRAL = """{%- set first = messages[0] %}
{%- set rest = messages[1:] if first.role == 'system' else messages %}
{{- bos_token }}
{%- for m in rest %}
  {%- set is_user = loop.index0 % 2 == 0 %}
  {%- if (m.role == 'user') != is_user %}{{ raise_exception('roles must alternate') }}{% endif %}
  {%- if m.role == 'user' %}
    {%- set lead = first.content ~ '\\n\\n' if loop.first and first.role == 'system' else '' %}
    {{- '[INST] ' ~ lead ~ m.content ~ ' [/INST]' }}
  {%- else %}{{ ' ' ~ m.content | trim ~ eos_token }}
  {%- endif %}
{%- endfor %}"""
GEMMA = """{{ bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system role here') }}{% endif %}
{%- for m in messages %}
{{- '<start_of_turn>' ~ ('model' if m.role == 'assistant' else m.role) ~ '\\n' }}
{%- if m.content is string %}{{ m.content | trim }}{% else %}
{%- for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }}{% endif %}{% endfor %}
{%- endif %}{{ '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
QWEN3 = """{%- if tools %}
{{- '<|im_start|>system\\nTools:\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' ~ tool | tojson }}{% endfor %}{{ '\\n</tools><|im_end|>\\n' }}
{%- endif %}
{%- set last = namespace(place=-1) %}
{%- for m in messages[::-1] %}
  {%- if m.role == 'user' %}{% set last.place = messages|length - 1 - loop.index0 %}{% break %}{% endif %}
{%- endfor %}
{%- for m in messages %}
  {%- set think = '' %}
  {%- if m.role == 'assistant' and m.reasoning_content is string and loop.index0 > last.place %}
    {%- set think = '<think>\\n' ~ m.reasoning_content.strip('\\n') ~ '\\n</think>\\n\\n' %}
  {%- endif %}
  {{- '<|im_start|>' ~ m.role ~ '\\n' ~ think ~ m.content ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
  {{- '<|im_start|>assistant\\n' }}
  {%- if enable_thinking is defined and enable_thinking is false %}
    {{- '<think>\\n\\n</think>\\n\\n' }}
  {%- endif %}
{%- endif %}"""
TOOLS = """{{ bos_token }}{{ 'Year ' ~ strftime_now('%Y') ~ '\\n' }}
{%- if tools is not none %}{{ '<tools>' ~ tools | tojson(indent=2) ~ '</tools>\\n' }}{% endif %}
{%- for doc in documents or [] %}{{ '[' ~ doc.title ~ '] ' ~ doc.text ~ '\\n' }}{% endfor %}
{%- for m in messages %}
  {%- if m.tool_calls %}
    {%- for call in m.tool_calls %}
      {{- '<|assistant|>call ' ~ dict(name=call.function.name, arguments=call.function.arguments) | tojson }}
    {%- endfor %}{{ '<|end|>' }}
    {%- continue %}
  {%- endif %}
  {{- '<|' ~ m.role ~ '|>' ~ m.content ~ '<|end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
BARE = "{% for m in messages %}{{ m.content ~ '\\n' }}{% endfor %}"
GENERATION = """{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|im_end|>
{% endgeneration %}{% else %}<|im_start|>{{ m.content }}<|im_end|>
{% endif %}{% endfor %}"""

# By name: the template, and the tokens that its model's tokenizer names.
FORMS: dict[str, tuple[str, dict[str, str]]] = {
    "chatml": (CHATML, {"eos_token": "<|im_end|>"}),
    "llama3": (LLAMA3, {"bos_token": "<|begin|>", "eos_token": "<|eot|>"}),
    "mistral": (MISTRAL, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "gemma": (GEMMA, {"bos_token": "<bos>", "eos_token": "</s>"}),
    "phi3": (PHI3, {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}),
    "qwen3": (QWEN3, {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}),
    "tools": (TOOLS, {"bos_token": "<s>", "eos_token": "<|end|>"}),
    "bare": (BARE, {}),
    "generation": (GENERATION, {"eos_token": "<|im_end|>"}),
}


def text_tokenizer(bos: str | None = None) -> Tokenizer:
    """A small tokenizer of bytes and pairs with the TOKENS of chats; bos: put before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(TOKENS) + 300,
        special_tokens=TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    if bos is not None:
        number = tokenizer.token_to_id(bos)
        tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, number)])
    return tokenizer


def chat_folder(folder: Path, template: Any, tokens: dict[str, str] | None = None) -> Path:
    """A folder with a tokenizer and a chat template (a text, or texts by name) as transformers saves both."""
    tokens = tokens or {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text_tokenizer(tokens.get("bos_token")), **tokens)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder


def edit_json(file: Path, **values: Any) -> None:
    """Set fields of a JSON file, which is made if it is missing."""
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(known | values), encoding="utf-8")
