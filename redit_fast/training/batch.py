"""The forward and backward passes of a step, over rows that are packed or, for a model that cannot, padded.

Every rank has the whole step's samples, and computes its own part of them."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

import redit_fast as rf
from redit_fast.checks import given
from redit_fast.losses.config import denominator_of
from redit_fast.packing import plan
from redit_fast.packing.attention import attending
from redit_fast.packing.plan import Budget, MicroBatch
from redit_fast.packing.rows import ranges, scored_hidden
from redit_fast.training.config import TrainConfig
from redit_fast.training.distributed import Ranks
from redit_fast.training.fsdp import whole
from redit_fast.training.policy import head_of
from redit_fast.training.rollout import Rollout


@dataclass
class Pass:
    """What a pass leaves beside the gradients."""

    loss: float  # of a first pass the whole step's, of a second one this rank's part
    logp: Tensor  # (R,), the scored tokens of all samples one after the other; NaN where the pass left a sample out
    entropy: Tensor  # (R,)
    metrics: dict[str, float]  # of a first pass
    outputs: list[rf.LossOutput]  # of the micro-batches, without graph
    tokens: int  # that the decoder computed on this rank


@dataclass
class Batch:
    """The samples of a step, ready for a forward and backward pass as often as wanted."""

    prompts: list[list[int]]  # one a sample
    completions: list[list[int]]
    advantages: Tensor  # (N,)
    settings: rf.LossConfig
    budget: Budget
    packed: bool
    step: int
    seed: int
    masked: frozenset[int] = frozenset()  # samples that count as sequences without tokens
    sampling_logp: Tensor | None = None  # (R,), the sampler's; None where it gives none
    ref_logp: Tensor | None = None  # (R,), with a KL term
    ranks: Ranks = field(default_factory=Ranks)

    @classmethod
    def of(
        cls,
        prompts: list[list[int]],
        rollout: Rollout,
        advantages: Tensor,
        settings: rf.LossConfig,
        config: TrainConfig,
        step: int,
        *,
        packed: bool,
        ranks: Ranks | None = None,
    ) -> Batch:
        prompts = [prompt for prompt in prompts for _ in range(config.group_size)]
        samples = config.micro_batch_size
        budget = Budget(samples=samples) if samples else Budget(tokens=config.tokens_per_micro_batch)
        cut_off = frozenset(i for i, finished in enumerate(rollout.finished) if not finished)
        masked = cut_off if config.overlong == "mask" else frozenset()
        sampling_logp = None
        if rollout.logp is not None:
            each = [value for row in rollout.logp for value in row]
            sampling_logp = torch.tensor(each, dtype=torch.float32, device="cpu")
        return cls(
            prompts, rollout.completions, advantages, settings, budget, packed, step, config.seed, masked,
            sampling_logp, ranks=ranks or Ranks(),
        )  # fmt: skip

    def part(self, samples: range) -> Batch:
        """Consecutive samples, as a batch of their own, without a reference's log-probs."""
        own = slice(samples.start, samples.stop)
        each = None if self.sampling_logp is None else torch.cat(self.sampling_logp.split(self.lengths)[own])
        return replace(
            self,
            prompts=self.prompts[own],
            completions=self.completions[own],
            advantages=self.advantages[own],
            masked=frozenset(i - samples.start for i in self.masked if i in samples),
            sampling_logp=each,
            ref_logp=None,
        )

    @cached_property
    def sequences(self) -> list[Tensor]:
        """Prompt and completion of each sample."""
        pairs = zip(self.prompts, self.completions, strict=True)
        return [torch.tensor([*prompt, *completion], device="cpu") for prompt, completion in pairs]

    @cached_property
    def lengths(self) -> list[int]:
        """Of the completions."""
        return [len(completion) for completion in self.completions]

    @cached_property
    def kept(self) -> list[int]:
        """The samples that are not masked."""
        return [i for i in range(len(self.prompts)) if i not in self.masked]

    @property
    def corrected_by(self) -> Tensor | None:
        """What the loss compares the old log-probs with: nothing where it has no correction."""
        return None if self.settings.correction == "none" else self.sampling_logp

    @property
    def useful_tokens(self) -> int:
        return plan.useful_tokens([self.prompts[i] for i in self.kept], [self.lengths[i] for i in self.kept])

    @property
    def normalizer(self) -> float:
        """The whole step's denominator, so that micro-batches add up."""
        return denominator_of(self.settings, len(self.sequences), float(sum(self.lengths[i] for i in self.kept)))

    @cached_property
    def plans(self) -> list[list[tuple[MicroBatch, bool]]]:
        """Of each rank one plan for all passes, and which of it needs a graph: samples that have no gradient come last,
        alone. The ranks have as many micro-batches of either kind."""
        zero = [advantage == 0 and self.settings.silent_at_zero for advantage in self.advantages.tolist()]
        silent, others = ([i for i in self.kept if zero[i] == wanted] for wanted in (True, False))
        if not others:  # the optimizer wants gradients, if only zeros
            silent, others = others, silent
        found: list[list[tuple[MicroBatch, bool]]] = [[] for _ in range(self.ranks.size)]
        for chosen, graph in ((others, True), (silent, False)):
            how = plan.packed if self.packed else plan.padded
            parts = how(self.prompts, self.lengths, self.budget, ranks=self.ranks.size, chosen=chosen)
            most = max(map(len, parts))
            for mine, own in zip(found, parts, strict=True):
                own += [plan.unscored(self.packed)] * (most - len(own))
                mine += [(micro, graph) for micro in own]
        return found

    @property
    def micro_batches(self) -> list[tuple[MicroBatch, bool]]:
        """This rank's."""
        return self.plans[self.ranks.rank]

    def score_reference(self, reference: PreTrainedModel) -> None:
        """Sets ref_logp to the log-probs under `reference`, for every pass of the step."""
        reference.eval()
        self.ref_logp = self.logp(reference)

    @torch.no_grad()
    def logp(self, model: PreTrainedModel) -> Tensor:
        """(R,): of the completions' tokens under `model`, in the mode that it is in."""
        logps: dict[int, Tensor] = {}
        with attending(model) if self.packed else nullcontext():
            for micro, _ in self.micro_batches:

                def part(model: PreTrainedModel, micro: MicroBatch = micro) -> Any:
                    head = head_of(model)
                    hidden, targets, lengths = self.hidden(model, micro)
                    transform: Any = self.settings.transform._asdict()
                    weight, bias = whole(head.weight), whole(head.bias)
                    return rf.linear_logp(hidden, weight, targets, bias=bias, **transform), lengths

                logp, lengths = self.ranks.forward(model, part)
                logps |= zip(micro.samples, logp.split(lengths), strict=True)
        joined = self._joined(logps, model.device)
        return self._of_all_ranks([joined], joined[:0])[0][0]

    def backward(self, model: PreTrainedModel, old_logp: Tensor | None = None, masks_of: Pass | None = None) -> Pass:
        """Adds the gradient of the whole step's loss to .grad, one micro-batch after the other.

        Both passes draw the same dropout and the same lots for clip_cov. The tokens that clip_cov and kl_cov choose are
        by definition those of a call, of a micro-batch; with `masks_of` they are those of that pass, and this is a
        second one: samples without a gradient are left out, and there are no metrics.
        """
        torch.manual_seed((self.seed + self.step + (self.ranks.rank << 32)) % 2**63)
        model.train()
        tokens = 0
        logps: dict[int, Tensor] = {}
        entropies: dict[int, Tensor] = {}
        outputs: list[rf.LossOutput] = []
        skipped: list[Tensor] = []  # rows
        with_graph = sum(graph for _, graph in self.micro_batches)
        with attending(model) if self.packed else nullcontext():
            for place, (micro, graph) in enumerate(self.micro_batches):
                if masks_of is not None and not graph:
                    continue
                tokens += micro.tokens
                masks = None if masks_of is None else masks_of.outputs[place]

                def part(model: PreTrainedModel, micro: MicroBatch = micro, masks: Any = masks) -> Any:
                    return self._loss(model, micro, old_logp, masks)

                with torch.set_grad_enabled(graph):
                    out, lengths = self.ranks.forward(model, part, reduces=place == with_graph - 1)
                if graph:
                    (out.loss * self.ranks.size if self.ranks.size > 1 else out.loss).backward()
                outputs.append(out._replace(loss=out.loss.detach()))
                skipped.append(out.metrics.get("head/frac_rows_skipped", out.loss.new_zeros(())) * len(out.logp))
                logps |= zip(micro.samples, out.logp.split(lengths), strict=True)
                entropies |= zip(micro.samples, given(out.entropy).split(lengths), strict=True)
        if not outputs:  # all are masked
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.requires_grad and p.grad is None else p.grad
        logp, entropy = self._joined(logps, model.device), self._joined(entropies, model.device)
        nothing = logp.new_zeros(1)
        loss = torch.stack([*nothing, *(out.loss for out in outputs)]).double().sum()
        if masks_of is not None:
            return Pass(loss.item(), logp, entropy, {}, outputs, tokens)
        sums = torch.stack([loss, torch.stack([*nothing, *skipped]).double().sum()])
        (logp, entropy), sums = self._of_all_ranks([logp, entropy], sums)
        whole = rf.policy_loss(
            logp,
            self.advantages.to(logp.device),
            old_logp=old_logp,
            ref_logp=self.ref_logp,
            sampling_logp=None if self.corrected_by is None else self.corrected_by.to(logp.device),
            entropy=entropy,
            mask=self._tokens_of(self.kept).to(logp.device) if self.masked else None,
            cu_seqlens=torch.tensor([0, *self.lengths], device="cpu").cumsum(0).to(logp.device),
            config=self.settings,
        )
        metrics = dict(whole.metrics)
        if self.settings.route == "fused":
            metrics["head/frac_rows_skipped"] = sums[1] / max(1, sum(self.lengths[i] for i in self.kept))
        loss, *values = torch.stack([sums[0], *(value.double() for value in metrics.values())]).tolist()
        return Pass(loss, logp, entropy, dict(zip(metrics, values, strict=True)), outputs, tokens)

    def _loss(
        self, model: PreTrainedModel, micro: MicroBatch, old_logp: Tensor | None, masks_of: rf.LossOutput | None
    ) -> tuple[rf.LossOutput, list[int]]:
        """A micro-batch's part of the step's loss, and how many tokens of each sample are scored."""
        head = head_of(model)
        hidden, targets, lengths = self.hidden(model, micro)
        out = rf.linear_grpo_loss(
            hidden,
            whole(head.weight),
            targets,
            self.advantages[list(micro.samples)].to(model.device),
            bias=whole(head.bias),
            old_logp=None if old_logp is None else self._part(micro, old_logp),
            ref_logp=None if self.ref_logp is None else self._part(micro, self.ref_logp),
            sampling_logp=None if self.corrected_by is None else self._part(micro, self.corrected_by).to(model.device),
            masks_of=masks_of,
            cu_seqlens=torch.tensor([0, *lengths], device="cpu").cumsum(0).to(model.device),
            normalizer=self.normalizer,
            config=self.settings,
            step=self.step,
            seed=self.seed,
        )
        return out, lengths

    def hidden(self, model: PreTrainedModel, micro: MicroBatch) -> tuple[Tensor, Tensor, list[int]]:
        """The last hidden states (R', D) that predict the samples' completions, those tokens (R',) and their counts."""
        lengths = [self.lengths[i] for i in micro.samples]
        nothing = torch.empty(0, dtype=torch.int64, device="cpu")
        targets = torch.cat([nothing, *(self.sequences[i][-self.lengths[i] :] for i in micro.samples)]).to(model.device)
        if not micro.segments:
            # Padding is on the right, where causal attention keeps it from all that is scored: no mask is needed.
            known = [self.sequences[i][:-1] for i in micro.samples] or [self.sequences[0][:1]]
            rows = pad_sequence(known, batch_first=True)
            hidden = model.get_decoder()(rows.to(model.device), use_cache=False).last_hidden_state.flatten(0, 1)
            ends = [place * rows.shape[1] + len(self.sequences[i]) - 1 for place, i in enumerate(micro.samples)]
            scored = ranges([end - length for end, length in zip(ends, lengths, strict=True)], lengths)
            return hidden[scored.to(model.device)], targets, lengths
        hidden = scored_hidden(model.get_decoder(), self.sequences, self.lengths, micro, model.device)
        return hidden, targets, lengths

    def _tokens_of(self, samples: Iterable[int]) -> Tensor:
        """(R,): which of the scored tokens are those of `samples`."""
        chosen = torch.zeros(len(self.lengths), dtype=torch.bool, device="cpu")
        chosen[list(samples)] = True
        return chosen.repeat_interleave(torch.tensor(self.lengths, device="cpu"))

    def _part(self, micro: MicroBatch, values: Any) -> Tensor:
        """Of (R,) what belongs to the samples."""
        parts = values.split(self.lengths)
        return torch.cat([values[:0], *(parts[i] for i in micro.samples)])

    def _joined(self, parts: dict[int, Tensor], device: torch.device) -> Tensor:
        """(R,) from each sample's; NaN for those that are not there."""
        missing = torch.full((max(self.lengths),), float("nan"), dtype=torch.float32, device=device)
        return torch.cat([parts[i] if i in parts else missing[:n] for i, n in enumerate(self.lengths)])

    def _of_all_ranks(self, joined: list[Tensor], sums: Tensor) -> tuple[list[Tensor], Tensor]:
        """Vectors (R,) with what other ranks have of the kept samples, and the ranks' sums, by one all-reduce."""
        if self.ranks.size == 1:
            return joined, sums
        own = self._tokens_of(i for micro, _ in self.micro_batches for i in micro.samples).to(sums.device)
        whole = torch.cat([*(torch.where(own, values, 0.0) for values in joined), sums]).double()
        *vectors, sums = self.ranks.summed(whole).split([len(own)] * len(joined) + [len(sums)])
        kept = self._tokens_of(self.kept).to(sums.device)
        return [torch.where(kept, values.float(), float("nan")) for values in vectors], sums
