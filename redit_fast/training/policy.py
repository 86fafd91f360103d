"""The policy: loading it safely, its head and its end tokens."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

import redit_fast as rf
from redit_fast.foreign import Foreign
from redit_fast.training.config_values import Device, DType

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # neither Python code nor pickled weights
HUB_EXTRAS = ["*/*", "consolidated*"]  # other formats of the same weights


def load(source: str | Path, device: Device = "auto", dtype: DType = "auto") -> tuple[PreTrainedModel, Tokenizer]:
    """A causal LM and its tokenizer, from a folder or, for the name of one on the hub, from there or its cache.

    Safetensors only, and no code of the model's own is run. On a GPU where there is one; float32 on the CPU, the
    checkpoint's dtype on a GPU, unless told. Warns of weights that the model has no place for.

    Raises:
        ValueError: one sentence that names the source and what is missing or wrong there.
    """
    folder, tokenizer = tokenizer_of(source)
    place = device_of(device)
    model, report = read_weights(AutoModelForCausalLM, source, folder, place, dtype)
    if "score.weight" in report["unexpected_keys"]:
        raise ValueError(f"model {source} is a reward model, no language model; as a reward it is model:{source}")
    check_weights(report, f"model {source}")
    check_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0], f"model {source}")
    return model.to(place), tokenizer


def read_weights(
    kind: Any, source: str | Path, folder: Path, place: str, dtype: DType, **changes: Any
) -> tuple[PreTrainedModel, dict]:
    """A model on the CPU of a folder that `tokenizer_of` has checked, in the dtype that it has at `place`, and what of
    the weights fits it: `check_weights`.

    Args:
        kind: transformers' class, such as AutoModelForCausalLM.
        changes: of its config.json.
    """
    if dtype == "auto" and place == "cpu":
        dtype = "float32"
    with one_sentence(f"model {source}"):
        return kind.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # for the report, which names them
            output_loading_info=True,
            **changes,
        )


def tokenizer_of(source: str | Path) -> tuple[Path, Tokenizer]:
    """The folder of a causal LM, its files checked, and its tokenizer.

    Raises:
        ValueError: as `load`.
    """
    folder = folder_of(str(source))
    _check_files(folder, f"model {source}")
    with one_sentence(f"the tokenizer of model {source}"):
        return folder, AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)


def skeleton(source: str | Path, folder: Path, tokenizer: Tokenizer) -> PreTrainedModel:
    """The model of a folder that `tokenizer_of` has checked, on torch's device meta: its layers without their weights.

    Raises:
        ValueError: as `load`, but for what only the weights tell.
    """
    with one_sentence(f"model {source}"), torch.device("meta"):
        described = AutoConfig.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
        model = AutoModelForCausalLM.from_config(described, trust_remote_code=False)
    check_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0], f"model {source}")
    return model


def device_of(device: Device) -> str:
    """A GPU where there is one, unless told. Raises a ValueError where it is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, and torch finds no GPU that it can use: `redit-fast info` tells more")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def folder_of(source: str) -> Path:
    """Of a model by its path, or by its name on the hub."""
    folder = Path(source).expanduser() if source.startswith("~/") else Path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise ValueError(f"model {source} is a file, needs a folder with config.json, safetensors and a tokenizer")
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ValueError(f"model {source}: no such folder")
    with Foreign(f"model {source}: no such folder, nor can it be had from the hub", plain=(OSError, ValueError)):
        # In one go, so that no network is one attempt: from_pretrained makes six for every file, 23 s each.
        return Path(snapshot_download(source, allow_patterns=HUB_FILES, ignore_patterns=HUB_EXTRAS))


def _check_files(folder: Path, model: str) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{model} is an adapter, not a model; `redit-fast merge` makes one of a checkpoint with LoRA")
    if not list(folder.glob("*.safetensors")) and (folder / "checkpoints").is_dir():
        raise ValueError(f"{model} is a run's folder: give one of {folder / 'checkpoints'}/step-...")
    if not list(folder.glob("*.safetensors")):
        raise ValueError(f"{model} holds no .safetensors weights; pickled weights (.bin, .pt) are refused")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{model} holds no config.json")
    described = {file.name: _read(file) for file in sorted(folder.glob("*.json"))}["config.json"]
    if not isinstance(described, dict):
        raise ValueError(f"{folder / 'config.json'}: needs a JSON object, got {type(described).__name__}")
    kind = described.get("model_type")
    if kind not in list(CONFIG_MAPPING) or CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        code = ", and Python code that a model brings is not run" if "auto_map" in described else ""
        raise ValueError(
            f"{model}: model_type is {kind!r} in its config.json, which is no causal language model of transformers "
            f"{transformers.__version__}{code}"
        )
    for part in (described, *filter(lambda value: isinstance(value, dict), described.values())):
        if quantised := part.get("quantization_config") or part.get("compression_config"):
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else "unknown"
            raise ValueError(
                f"{model} is quantised (quant_method {method} in its config.json) and quantised weights cannot be "
                "trained: needs the checkpoint that it was made from"
            )


def _read(file: Path) -> object:
    try:
        return json.loads(file.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: malformed JSON: {error}") from None


def check_weights(report: dict, model: str) -> None:
    """Against config.json: what it lacks would start at random."""
    for name, found, needed in sorted(report["mismatched_keys"], key=str):
        raise ValueError(
            f"{model}: config.json does not fit the weights: {name} has the shape {tuple(found)}, needs {tuple(needed)}"
        )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(
            f"{model}: config.json does not fit the weights: {len(missing)} tensors are missing, such as {missing[0]}"
        )
    if extra := sorted(report["unexpected_keys"]):
        warnings.warn(f"{model}: {len(extra)} of its tensors are not used, such as {extra[0]}", stacklevel=3)


def check_tokenizer(tokenizer: Tokenizer, rows: int, model: str) -> None:
    """Special tokens may lie beyond the embedding, as Gemma 3's image token does: the prompts' own are checked."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    tokens = {number: token for token, number in tokenizer.get_vocab().items() if number not in special}
    if not tokens:
        raise ValueError(f"{model} has no tokenizer, or one without tokens: needs a tokenizer.json or its like")
    if max(tokens) >= rows:
        raise ValueError(
            f"{model}: its tokenizer has token {max(tokens)} ({tokens[max(tokens)]!r}), beyond the {rows} rows of the "
            "embedding; it is another model's, or the model needs resize_token_embeddings"
        )


@contextmanager
def one_sentence(what: str) -> Iterator[None]:
    """What transformers raises about damaged files as one sentence, without the lines that it logs beside it."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with Foreign(f"{what} cannot be loaded"):
            yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def head_of(model: PreTrainedModel) -> torch.nn.Linear:
    """The output head, whose weight and bias are all that a loss from hidden states sees.

    Raises:
        ValueError: it is more than that, for instance a LoRA adapter, whose matrices would get no gradient.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, torch.nn.Linear):
        raise ValueError(
            f"model {model.name_or_path}: its output head is a {type(head).__name__}, not a torch.nn.Linear, so that "
            "its weight is not the whole head; merge an adapter (model.merge_and_unload()) or leave lm_head out of its "
            "target_modules and modules_to_save"
        )
    return head


@torch.no_grad()
def check_head(model: PreTrainedModel, tokenizer: Tokenizer, settings: rf.LossConfig) -> None:
    """The loss works from hidden states: it must see the log-probs that the model's own logits give."""
    tokens = torch.arange(min(16, len(tokenizer)), device=model.device)[None]
    training = model.training
    model.eval()
    head = head_of(model)
    with Foreign(f"model {model.name_or_path} ({model.config.model_type}) cannot be trained"):
        logits = model(tokens).logits
        hidden = model.get_decoder()(tokens).last_hidden_state[:, :-1]
    expected = torch.log_softmax(logits.float() / settings.temperature, -1)
    expected = expected[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    logp: Any = rf.linear_logp(hidden, head.weight, tokens[:, 1:], bias=head.bias, **settings.transform._asdict())
    model.train(training)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.3  # bfloat16 logits are off by up to 0.17
    if (logp - expected).abs().max() > tolerance:
        raise ValueError(
            f"model {model.name_or_path}: log-probs from its hidden states differ from those of its logits by "
            f"{(logp - expected).abs().max():.2g}; it transforms them in a way that redit-fast does not know"
        )


def freeze_unused(model: PreTrainedModel) -> None:
    """What is neither decoder nor head, such as a vision tower, gets no gradient here: DDP would wait for it."""
    used = {*model.get_decoder().parameters(), *head_of(model).parameters()}
    for p in model.parameters():
        if p not in used:
            p.requires_grad_(False)


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Its layers keep their inputs only, and are computed again in the backward pass.

    Raises:
        ValueError: one sentence that names the model, which does not support it.
    """
    renamed_in_5_24 = "activation_checkpointing_enable"
    enable = getattr(model, renamed_in_5_24, None) or model.gradient_checkpointing_enable
    with Foreign(f"model {model.name_or_path} ({model.config.model_type}) cannot be trained", plain=ValueError):
        enable({"use_reentrant": False})


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a completion: the model's own and the tokenizer's, whose end of turn base models lack.

    The model's are those of its generation_config.json or, where that has none, of its config.json.

    Raises:
        ValueError: there are none, or one of them is no token of the model.
    """
    rows = model.get_input_embeddings().weight.shape[0]
    found = {
        "generation_config.json": getattr(model.generation_config, "eos_token_id", None),
        "config.json": getattr(model.config.get_text_config(), "eos_token_id", None),
        "tokenizer": tokenizer.eos_token_id,
    }
    found = {place: [] if end is None else list(end) if isinstance(end, list | tuple) else [end]
             for place, end in found.items()}  # fmt: skip
    if found["generation_config.json"]:
        del found["config.json"]
    for place, ends in found.items():
        if not all(type(end) is int and 0 <= end < rows for end in ends):
            raise ValueError(
                f"model {model.name_or_path}: its {place} says that eos_token_id is {ends!r}, needs token numbers "
                f"below {rows}, the rows of its embedding"
            )
    ends = sorted({end for numbers in found.values() for end in numbers})
    if not ends:
        raise ValueError(f"model {model.name_or_path} has no end-of-sequence token, so no completion would ever end")
    return ends
