"""The learned reward, `model:PATH`: the score that a sequence-classification model with one label gives prompt and
completion.

The score is the model's linear layer `score` on the last hidden state of the last token, so nothing is computed over
the vocabulary. Rows are packed where the model can: what sequences share at their beginning, such as the prompt of a
group's completions, is computed once. `redit-fast reward-model` trains such a model on the same tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import jinja2
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from redit_fast.foreign import Foreign
from redit_fast.packing import plan
from redit_fast.packing.attention import UnpackableError, attending, refusal
from redit_fast.packing.plan import Budget, MicroBatch
from redit_fast.packing.rows import scored_hidden
from redit_fast.training import data, policy
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_values import Device, DType, Packing
from redit_fast.training.data import Prompt

WEIGHT = "score.weight"
ONE_LABEL: dict[str, Any] = {
    "num_labels": 1,
    "id2label": {0: "LABEL_0"},
    "label2id": {"LABEL_0": 0},
}  # in a config.json
SHARED, OWN = 16, (8, 7)  # tokens of the two sequences of `check`, so alike that padded they are one pass
# Distance of two passes' scores, over 1 + |score|: float32 rounds to 1e-6, and bfloat16 to 0.02.
FLOAT32, ROUNDED = 1e-3, 0.1


class RewardModel:
    """A reward function that is a model.

    It sees the data's prompt without the run's `system_prompt`. A sequence that is longer than the model's context, or
    has a token that its embedding lacks, is unscored.

    Args:
        path: of a folder, or the name of a model on the hub.
        config: of the run: `device`, `dtype`, `packing` and `tokens_per_micro_batch` are the reward model's too.

    Raises:
        ValueError: one sentence that names the model and what is missing or wrong there.
    """

    reward_scale = 1.0  # a learned reward has no full scale

    def __init__(self, path: str, config: TrainConfig):
        self.path = path
        self.model, self.tokenizer = load(path, config.wanted_device, config.dtype)
        self.model.requires_grad_(False)
        self.packed = check(self.model, config.packing) is None
        self.budget = config.tokens_per_micro_batch

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Prompt], **columns: Any) -> list[float | None]:
        pairs = zip(prompts, completions, strict=True)
        sequences = [tokens_of(self.tokenizer, self.model, prompt, completion) for prompt, completion in pairs]
        most, rows = context_of(self.model), self.model.get_input_embeddings().weight.shape[0]
        fit = [i for i, ids in enumerate(sequences) if 0 < len(ids) <= (most or len(ids)) and max(ids) < rows]
        found: list[float | None] = [None] * len(sequences)
        scored = scores(self.model, [sequences[i] for i in fit], self.budget, self.packed)
        for i, value in zip(fit, scored.tolist(), strict=True):
            found[i] = value
        return found

    def check_prompt(self, prompt: Prompt) -> None:
        """Raises a ValueError where no completion of a prompt could be scored."""
        with Foreign(f"reward model {self.path} refuses this prompt", plain=jinja2.TemplateError):
            ids = tokens_of(self.tokenizer, self.model, prompt, data.completion(prompt, ""))
        most = context_of(self.model)
        if most is not None and len(ids) >= most:
            raise ValueError(
                f"the prompt has {len(ids)} tokens, which leaves no room for a completion in the context of {most} "
                f"tokens of reward model {self.path}"
            )
        rows = self.model.get_input_embeddings().weight.shape[0]
        if ids and max(ids) >= rows:
            raise ValueError(
                f"the prompt has token {max(ids)} ({self.tokenizer.decode([max(ids)])!r}), the embedding of reward "
                f"model {self.path} only has {rows} rows"
            )


def load(
    source: str, device: Device = "auto", dtype: DType = "auto", *, seed: int | None = None
) -> tuple[PreTrainedModel, Tokenizer]:
    """A reward model, in eval mode, and its tokenizer, as `policy.load` takes a policy.

    Args:
        seed: of the score layer that a causal LM gets in the place of its head; None: one without such a layer is
            refused.

    Raises:
        ValueError: one sentence that names the source and what is missing or wrong there.
    """
    folder, tokenizer = policy.tokenizer_of(source)
    place, what = policy.device_of(device), f"model {source}"
    model, report = policy.read_weights(AutoModelForSequenceClassification, source, folder, place, dtype, **ONE_LABEL)
    if not isinstance(getattr(model, "score", None), nn.Linear):
        raise ValueError(
            f"{what}: a {type(model).__name__} has no linear layer `score` on its last token, which is what "
            "redit-fast scores by"
        )
    for name, found, _ in report["mismatched_keys"]:
        if name == WEIGHT and found[0] != 1:
            raise ValueError(f"{what} has {found[0]} labels, a reward model needs one")
    most = context_of(model)
    if most is not None and most < 2:
        raise ValueError(f"{what}: its config.json has max_position_embeddings {most}, a reward model needs 2 or more")
    if WEIGHT in report["missing_keys"]:
        if seed is None:
            raise ValueError(
                f"{what} has no score layer, it is a language model: `redit-fast reward-model` makes a reward model "
                "of one"
            )
        initialise(model.score, seed)
        inside = f"{model.base_model_prefix}."  # what else is unused is the head
        report = report | {
            "missing_keys": [name for name in report["missing_keys"] if name != WEIGHT],
            "unexpected_keys": [name for name in report["unexpected_keys"] if name.startswith(inside)],
        }
    policy.check_weights(report, what)
    policy.check_tokenizer(tokenizer, model.get_input_embeddings().weight.shape[0], what)
    return model.to(place).eval(), tokenizer


@torch.no_grad()
def initialise(score: nn.Linear, seed: int) -> None:
    """Normal numbers of variance 1 / (D + 1): Stiennon et al. 2020, arXiv 2009.01325."""
    generator = torch.Generator("cpu").manual_seed(seed % 2**63)
    drawn = torch.randn(score.weight.shape, generator=generator, dtype=torch.float32, device="cpu")
    score.weight.copy_(drawn / (score.weight.shape[1] + 1) ** 0.5)


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens that it can attend to; None for no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def tokens_of(tokenizer: Tokenizer, model: PreTrainedModel, prompt: Prompt, completion: Prompt) -> list[int]:
    """What is scored, in training and in a run: text and text, or the messages of both in the chat template.

    A tokenizer without a chat template gets the messages' texts with blank lines between them. An assistant message
    that the prompt ends with is one with the completion. No end token is added, and padding tokens at the end are left
    out, as transformers does when it looks for the last token.

    Raises:
        whatever a chat template may, jinja2.TemplateError where it refuses the messages.
    """
    if isinstance(prompt, str):
        ids = tokenizer(prompt + data.text_of(completion))["input_ids"]
    else:
        messages = _joined(copy.deepcopy(prompt), completion)  # a template may change them
        if tokenizer.chat_template is None:
            ids = tokenizer(data.text_of(messages))["input_ids"]
        else:
            ids = tokenizer.apply_chat_template(messages, return_dict=False)
    end = len(ids)
    while end and ids[end - 1] == model.config.get_text_config().pad_token_id:
        end -= 1
    return list(ids[:end])


def _joined(prompt: list[dict[str, str]], completion: Any) -> list[dict[str, str]]:
    if prompt[-1]["role"] != "assistant" or completion[0]["role"] != "assistant":
        return [*prompt, *completion]
    whole = {**prompt[-1], "content": prompt[-1]["content"] + completion[0]["content"]}
    return [*prompt[:-1], whole, *completion[1:]]


@torch.no_grad()
def scores(model: PreTrainedModel, sequences: Sequence[Sequence[int]], budget: int, packed: bool) -> Tensor:
    """(N,) float32 on the CPU, in eval mode.

    Args:
        sequences: tokens of each, at least one.
        budget: most tokens in a pass, unless one sequence has more.
    """
    training = model.training
    model.eval()
    (micro_batches,) = (plan.packed if packed else plan.padded)(sequences, [1] * len(sequences), Budget(tokens=budget))
    tensors = [torch.tensor(ids, device="cpu") for ids in sequences]
    found = torch.empty(len(sequences), dtype=torch.float32, device="cpu")
    with attending(model) if packed else nullcontext():
        for micro in micro_batches:
            found[list(micro.samples)] = scores_of(model, tensors, micro).cpu()
    model.train(training)
    return found


def scores_of(model: PreTrainedModel, sequences: Sequence[Tensor], micro: MicroBatch) -> Tensor:
    """(n,) float32: of the samples of a micro-batch, in their order; inside `attending` where its rows are packed.

    Args:
        sequences: of all samples, each a prompt of the plan's, with a completion of one token, which it leaves out.
    """
    if micro.segments:
        hidden = scored_hidden(model.get_decoder(), sequences, [1] * len(sequences), micro, model.device)
    else:
        # Padding is on the right, where causal attention keeps it from all that is scored: no mask is needed. It is not
        # the padding token, of which transformers warns then: no sequence ends with that.
        own = [sequences[i] for i in micro.samples]
        rows = pad_sequence(own, batch_first=True, padding_value=own[0][-1].item())
        states = model.get_decoder()(rows.to(model.device), use_cache=False)
        ends = torch.tensor([len(ids) - 1 for ids in own], device="cpu").to(model.device)
        hidden = states.last_hidden_state[torch.arange(len(own), device=model.device), ends]
    return model.score(hidden)[:, 0].float()


@torch.no_grad()
def check(model: PreTrainedModel, packing: Packing) -> str | None:
    """Two sequences that share a beginning, scored by the model's own forward pass and in both kinds of rows.

    Returns:
        Why rows are padded; None: they are packed, with the scores of padded ones.

    Raises:
        ValueError: the model's own scores are others; one sentence that names it.
    """
    what = f"model {model.name_or_path} ({model.config.model_type})"
    pad, most = model.config.get_text_config().pad_token_id, context_of(model)
    tokens = [token for token in range(model.get_input_embeddings().weight.shape[0]) if token != pad]
    ids = [tokens[7 * i % len(tokens)] for i in range(SHARED + sum(OWN))]
    first = ids[: SHARED + OWN[0]]
    second = ids[:SHARED] + ids[SHARED + OWN[0] :]
    sequences = [each[:most] for each in (first, second)]
    limit = FLOAT32 if model.dtype == torch.float32 else ROUNDED
    with Foreign(f"{what} cannot score"):
        rows = [torch.tensor([each], device="cpu").to(model.device) for each in sequences]
        own = torch.cat([model(row, use_cache=False).logits[:, 0] for row in rows]).float().cpu()
        padded = scores(model, sequences, len(ids) * 2, packed=False)
        why_padded = "packing is off" if packing == "off" else _why_padded(model, sequences, padded, limit)
    if not (off := _distance(own, padded)) < limit:
        raise ValueError(
            f"{what}: its own scores of two texts are {off:.2g} off those of its layer `score` on the last token's "
            "hidden state, which is what redit-fast computes"
        )
    return why_padded


def _why_padded(model: PreTrainedModel, sequences: list[list[int]], padded: Tensor, limit: float) -> str | None:
    if (why := refusal(model)) is not None:
        return why
    try:
        packed = scores(model, sequences, sum(map(len, sequences)), packed=True)
    except UnpackableError as error:
        return str(error)
    if not (off := _distance(packed, padded)) < limit:
        return f"the scores of packed rows are {off:.2g} off those of padded ones"
    return None


def _distance(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).abs() / (1 + expected.abs())).max().item()
