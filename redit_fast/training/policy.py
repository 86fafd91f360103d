"""The policy: loading it safely, and the forward and backward passes of a step."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

import redit_fast as rf
from redit_fast.checks import given
from redit_fast.foreign import Foreign
from redit_fast.losses.config import denominator_of
from redit_fast.training.config import TrainConfig
from redit_fast.training.rollout.local import Rollout

HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # neither Python code nor pickled weights
HUB_EXTRAS = ["*/*", "consolidated*"]  # other formats of the same weights


def load(source: str | Path) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal LM and its tokenizer, from a folder or, for the name of one on the hub, from there or its cache.

    Safetensors only, and no code of the model's own is run. float32 on the CPU, the checkpoint's dtype on a GPU. Warns
    of weights that the model has no place for.

    Raises:
        ValueError: one sentence that names the source and what is missing or wrong there.
    """
    folder = _folder(str(source))
    _check_files(folder, f"model {source}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    with _one_sentence(f"the tokenizer of model {source}"):
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    with _one_sentence(f"model {source}"):
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            ignore_mismatched_sizes=True,  # for the report, which names them
            output_loading_info=True,
        )
    _check_weights(report, f"model {source}")
    _check_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0], f"model {source}")
    return model.to(device), tokenizer


def _folder(source: str) -> Path:
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


def _check_weights(report: dict, model: str) -> None:
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


def _check_tokenizer(tokenizer: Tokenizer, rows: int, model: str) -> None:
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
def _one_sentence(what: str) -> Iterator[None]:
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


@dataclass
class Pass:
    """What a pass leaves beside the gradients."""

    loss: float
    logp: Tensor  # (R,), the scored tokens of all samples one after the other
    entropy: Tensor  # (R,)
    metrics: dict[str, float]
    outputs: list[rf.LossOutput]  # of the micro-batches, without graph


@dataclass
class Batch:
    """The samples of a step, ready for a forward and backward pass as often as wanted."""

    sequences: list[Tensor]  # prompt + completion, one a sample
    lengths: list[int]  # of the completions
    advantages: Tensor  # (N,)
    settings: rf.LossConfig
    micro: int
    step: int
    seed: int
    ref_logp: Tensor | None = None  # (R,), with a KL term

    @classmethod
    def of(
        cls, prompts, rollout: Rollout, advantages: Tensor, settings: rf.LossConfig, config: TrainConfig, step: int
    ) -> Batch:
        prompts = [prompt for prompt in prompts for _ in range(config.group_size)]
        sequences = [torch.tensor(p + c, device="cpu") for p, c in zip(prompts, rollout.completions, strict=True)]
        lengths = [len(completion) for completion in rollout.completions]
        micro = config.micro_batch_size or len(sequences)
        return cls(sequences, lengths, advantages, settings, micro, step, config.seed)

    @property
    def normalizer(self) -> float:
        """The whole step's denominator, so that micro-batches add up."""
        return denominator_of(self.settings, len(self.sequences), float(sum(self.lengths)))

    def micro_batches(self) -> Iterator[tuple[list[int], bool]]:
        """The samples of each micro-batch, and whether it needs a graph: samples that have no gradient come last."""
        silent = (self.advantages == 0) & self.settings.silent_at_zero
        if silent.all():  # the optimizer wants gradients, if only zeros
            silent = torch.zeros_like(silent)
        for part, graph in ((~silent, True), (silent, False)):
            for samples in torch.nonzero(part).flatten().split(self.micro):
                if len(samples):
                    yield samples.tolist(), graph

    def score_reference(self, reference: PreTrainedModel) -> None:
        """Sets ref_logp to the log-probs under `reference`, for every pass of the step."""
        head = head_of(reference)
        logps: dict[int, Tensor] = {}
        reference.eval()
        with torch.no_grad():
            for samples, _ in self.micro_batches():
                hidden, targets, lengths = self.hidden(reference, samples)
                transform = self.settings.transform._asdict()
                logp: Any = rf.linear_logp(hidden, head.weight, targets, bias=head.bias, **transform)
                logps |= zip(samples, logp.split(lengths), strict=True)
        self.ref_logp = self._joined(logps)

    def backward(self, model: PreTrainedModel, old_logp: Tensor | None = None, masks_of: Pass | None = None) -> Pass:
        """Adds the gradient of the whole step's loss to .grad, one micro-batch after the other.

        Both passes draw the same dropout and the same lots for clip_cov. The tokens that clip_cov and kl_cov choose are
        by definition those of a call, of a micro-batch; with `masks_of` they are those of that pass.
        """
        torch.manual_seed((self.seed + self.step) % 2**63)
        model.train()
        head, loss, skipped = head_of(model), 0.0, 0.0
        logps: dict[int, Tensor] = {}
        entropies: dict[int, Tensor] = {}
        outputs: list[rf.LossOutput] = []
        for place, (samples, graph) in enumerate(self.micro_batches()):
            with torch.set_grad_enabled(graph):
                hidden, targets, lengths = self.hidden(model, samples)
                out = rf.linear_grpo_loss(
                    hidden,
                    head.weight,
                    targets,
                    self.advantages[samples].to(model.device),
                    bias=head.bias,
                    old_logp=None if old_logp is None else self._part(samples, old_logp),
                    ref_logp=None if self.ref_logp is None else self._part(samples, self.ref_logp),
                    masks_of=None if masks_of is None else masks_of.outputs[place],
                    cu_seqlens=torch.tensor([0, *lengths], device=model.device).cumsum(0),
                    normalizer=self.normalizer,
                    config=self.settings,
                    step=self.step,
                    seed=self.seed,
                )
            if graph:
                out.loss.backward()
            loss += out.loss.item()
            outputs.append(out._replace(loss=out.loss.detach()))
            skipped += float(out.metrics.get("head/frac_rows_skipped", 0)) * len(hidden)
            logps |= zip(samples, out.logp.split(lengths), strict=True)
            entropies |= zip(samples, given(out.entropy).split(lengths), strict=True)
        logp, entropy = self._joined(logps), self._joined(entropies)
        whole = rf.policy_loss(
            logp,
            self.advantages.to(logp.device),
            old_logp=old_logp,
            ref_logp=self.ref_logp,
            entropy=entropy,
            cu_seqlens=torch.tensor([0, *self.lengths], device=logp.device).cumsum(0),
            config=self.settings,
        )
        metrics = {name: value.item() for name, value in whole.metrics.items()}
        if self.settings.route == "fused":
            metrics["head/frac_rows_skipped"] = skipped / max(1, len(logp))
        return Pass(loss, logp, entropy, metrics, outputs)

    def hidden(self, model: PreTrainedModel, samples: list[int]) -> tuple[Tensor, Tensor, list[int]]:
        """The last hidden states (R', D) that predict the samples' completions, those tokens (R',) and their counts."""
        sequences, lengths = [self.sequences[i] for i in samples], [self.lengths[i] for i in samples]
        # Padding is on the right, where causal attention keeps it from everything that is scored: no mask is needed.
        ids = pad_sequence(sequences, batch_first=True).to(model.device)
        ends = torch.tensor([len(s) for s in sequences], device=model.device)[:, None]
        position = torch.arange(ids.shape[1], device=model.device)
        scored = (position >= ends - torch.tensor(lengths, device=model.device)[:, None]) & (position < ends)
        hidden = model.get_decoder()(ids[:, :-1], use_cache=False).last_hidden_state[scored[:, 1:]]
        return hidden, ids[scored], lengths

    def _part(self, samples: list[int], values: Any) -> Tensor:
        """Of (R,) what belongs to the samples."""
        parts = values.split(self.lengths)
        return torch.cat([parts[i] for i in samples])

    def _joined(self, parts: dict[int, Tensor]) -> Tensor:
        """(R,) from each sample's."""
        return torch.cat([parts[i] for i in range(len(self.sequences))])
