"""What a model's files say of generating: the ids that end an answer, and how to sample it.

From Hugging Face's generation_config.json, or the keys `general.sampling.*` of a GGUF file. Both
are untrusted; fields that are not in the tables here are not read.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from roofline.errors import CheckpointError, RequestError
from roofline.models.checkpoints.json_fields import Fields, read_json
from roofline.request import SamplingParams

GENERATION_CONFIG = "generation_config.json"
_MAX_EOS_IDS = 1024


@dataclass(frozen=True)
class GenerationConfig:
    """Ids that end an answer, and fields of SamplingParams with a model's own values."""

    eos_token_ids: tuple[int, ...] = ()
    sampling: Mapping[str, Any] = field(default_factory=dict[str, Any])


def read_generation_config(path: Path, vocab_size: int) -> GenerationConfig:
    """Read the file; `do_sample` false is temperature 0, whatever the temperature beside it."""
    fields = Fields(read_json(path), str(path))
    sampling = _sampling(fields, _FIELDS)
    if not fields.boolean("do_sample", True):
        sampling["temperature"] = 0.0
    return GenerationConfig(listed_eos_ids(fields, vocab_size), sampling)


def gguf_generation_config(metadata: Mapping[str, Any], source: str) -> GenerationConfig:
    """The sampling of GGUF metadata; its EOS ids are the model's config's."""
    return GenerationConfig(sampling=_sampling(Fields(metadata, source), _GGUF_KEYS))


def generation_config_json(sampling: Mapping[str, Any]) -> str:
    """The file that `read_generation_config` reads so."""
    fields = {name: sampling[own] for name, own in _FIELDS.items() if own in sampling}
    if fields.get("temperature") == 0:
        fields = {name: fields[name] for name in fields if name != "temperature"}
        fields["do_sample"] = False
    return json.dumps(fields, indent=2, allow_nan=False) + "\n"


def listed_eos_ids(fields: Fields, vocab_size: int) -> tuple[int, ...]:
    """The field `eos_token_id`: one id of the vocabulary, a list of them, or none."""
    value = fields.get("eos_token_id")
    ids = [] if value is None else list(value) if isinstance(value, list) else [value]
    good = all(type(token) is int and 0 <= token < vocab_size for token in ids)
    if not good or len(ids) > _MAX_EOS_IDS:
        raise fields.wrong("eos_token_id", f"ids of the vocabulary, 0 to {vocab_size - 1}")
    return tuple(dict.fromkeys(ids))


def _sampling(fields: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    """The fields that are there as those of SamplingParams, each held against its bounds."""
    found: dict[str, Any] = {}
    for name, own in names.items():
        value = fields.get(name)
        if value is not None:
            try:
                SamplingParams(**{own: value})
            except RequestError as error:
                _, _, fault = error.message.partition(" is ")  # of "top_p is 7; it must be ..."
                raise CheckpointError(f"{fields.where}: {name} is {fault}") from None
            found[own] = value
    return found


_FIELDS = {  # of generation_config.json: those that vLLM reads
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_GGUF_KEYS = {
    "general.sampling.temp": "temperature",
    "general.sampling.top_p": "top_p",
    "general.sampling.top_k": "top_k",
    "general.sampling.min_p": "min_p",
    "general.sampling.penalty_repeat": "repetition_penalty",
}
