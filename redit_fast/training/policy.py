"""The policy: loading it safely, and the forward and backward passes of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import redit_fast as rf
from redit_fast.training.config import TrainConfig
from redit_fast.training.rollout import Rollout


def load(source: Path) -> tuple[PreTrainedModel, Tokenizer]:
    """A causal LM and its tokenizer, from a folder or, where there is none, from the hub.

    Safetensors only, and no code of the model's own is run. float32 on the CPU, the checkpoint's dtype on a GPU.

    Raises:
        ValueError: nothing to load there, naming the folder.
    """
    if source.is_dir() and not list(source.glob("*.safetensors")):
        raise ValueError(f"model {source} holds no .safetensors weights; pickled weights (.bin, .pt) are refused")
    options = {"trust_remote_code": False, "local_files_only": source.is_dir()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "auto" if device == "cuda" else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(source), **options)
        model = AutoModelForCausalLM.from_pretrained(str(source), dtype=dtype, use_safetensors=True, **options)
    except OSError as error:
        raise ValueError(f"model {source}: {error}") from None
    return model.to(device), tokenizer


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
    expected = torch.log_softmax(model(tokens).logits.float() / settings.temperature, -1)
    expected = expected[:, :-1].gather(-1, tokens[:, 1:, None]).squeeze(-1)
    head = head_of(model)
    hidden = model.get_decoder()(tokens).last_hidden_state[:, :-1]
    logp = rf.linear_logp(hidden, head.weight, tokens[:, 1:], bias=head.bias, **settings.transform._asdict())
    model.train(training)
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.3  # bfloat16 logits are off by up to 0.17
    if (logp - expected).abs().max() > tolerance:
        raise ValueError(
            f"model {model.name_or_path}: log-probs from its hidden states differ from those of its logits by "
            f"{(logp - expected).abs().max():.2g}; it transforms them in a way that redit-fast does not know"
        )


def end_tokens(model: PreTrainedModel, tokenizer: Tokenizer) -> list[int]:
    """The tokens that end a completion: the model's own, else the tokenizer's."""
    ends = model.generation_config.eos_token_id
    ends = tokenizer.eos_token_id if ends is None else ends
    if ends is None:
        raise ValueError(f"model {model.name_or_path} has no end-of-sequence token, so no completion would ever end")
    return [ends] if isinstance(ends, int) else list(ends)


@dataclass
class Pass:
    """What a pass leaves beside the gradients."""

    loss: float
    logp: Tensor  # (R,), the scored tokens of all samples one after the other
    metrics: dict[str, float]


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

    @classmethod
    def of(
        cls, prompts, rollout: Rollout, advantages: Tensor, settings: rf.LossConfig, config: TrainConfig, step: int
    ) -> Batch:
        prompts = [prompt for prompt in prompts for _ in range(config.group_size)]
        sequences = [torch.tensor(p + c) for p, c in zip(prompts, rollout.completions, strict=True)]
        lengths = [len(completion) for completion in rollout.completions]
        micro = config.micro_batch_size or len(sequences)
        return cls(sequences, lengths, advantages, settings, micro, step, config.seed)

    @property
    def normalizer(self) -> float:
        """The whole step's denominator, so that micro-batches add up."""
        if self.settings.denominator == "tokens":
            return float(sum(self.lengths))
        if self.settings.denominator == "length":
            return float(len(self.sequences) * self.settings.max_completion_length)
        return float(len(self.sequences))

    def micro_batches(self) -> Iterator[tuple[list[int], bool]]:
        """The samples of each micro-batch, and whether it needs a graph: samples that have no gradient come last."""
        silent = (self.advantages == 0) & self.settings.silent_at_zero
        if silent.all():  # the optimizer wants gradients, if only zeros
            silent = torch.zeros_like(silent)
        for part, graph in ((~silent, True), (silent, False)):
            for samples in torch.nonzero(part).flatten().split(self.micro):
                if len(samples):
                    yield samples.tolist(), graph

    def backward(self, model: PreTrainedModel, old_logp: Tensor | None = None) -> Pass:
        """Adds the gradient of the whole step's loss to .grad, one micro-batch after the other.

        Both passes draw the same dropout and the same lots for clip_cov. The tokens that clip_cov and kl_cov choose are
        by definition those of a call: of a micro-batch, and in the second pass of its own log-probs.
        """
        torch.manual_seed((self.seed + self.step) % 2**63)
        model.train()
        head, loss, skipped = head_of(model), 0.0, 0.0
        old = None if old_logp is None else old_logp.split(self.lengths)
        logps, entropies = {}, {}
        for samples, graph in self.micro_batches():
            sequences, lengths = [self.sequences[i] for i in samples], [self.lengths[i] for i in samples]
            # Padding is on the right, where causal attention keeps it from everything that is scored: no mask is
            # needed.
            ids = pad_sequence(sequences, batch_first=True).to(model.device)
            ends = torch.tensor([len(s) for s in sequences], device=model.device)[:, None]
            position = torch.arange(ids.shape[1], device=model.device)
            scored = (position >= ends - torch.tensor(lengths, device=model.device)[:, None]) & (position < ends)
            with torch.set_grad_enabled(graph):
                hidden = model.get_decoder()(ids[:, :-1], use_cache=False).last_hidden_state[scored[:, 1:]]
                out = rf.linear_grpo_loss(
                    hidden,
                    head.weight,
                    ids[scored],
                    self.advantages[samples].to(model.device),
                    bias=head.bias,
                    old_logp=None if old is None else torch.cat([old[i] for i in samples]),
                    cu_seqlens=torch.tensor([0, *lengths], device=model.device).cumsum(0),
                    normalizer=self.normalizer,
                    config=self.settings,
                    step=self.step,
                    seed=self.seed,
                )
            if graph:
                out.loss.backward()
            loss += out.loss.item()
            skipped += float(out.metrics.get("head/frac_rows_skipped", 0)) * len(hidden)
            logps |= zip(samples, out.logp.split(lengths), strict=True)
            entropies |= zip(samples, out.entropy.split(lengths), strict=True)
        logp, entropy = (torch.cat([parts[i] for i in range(len(self.sequences))]) for parts in (logps, entropies))
        whole = rf.policy_loss(
            logp,
            self.advantages.to(logp.device),
            old_logp=old_logp,
            entropy=entropy,
            cu_seqlens=torch.tensor([0, *self.lengths], device=logp.device).cumsum(0),
            config=self.settings,
        )
        metrics = {name: value.item() for name, value in whole.metrics.items()}
        if self.settings.route == "fused":
            metrics["head/frac_rows_skipped"] = skipped / max(1, len(logp))
        return Pass(loss, logp, metrics)
