"""The reference backend: every primitive in plain PyTorch, the oracle of the others and the fallback on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from redit_fast.dither import exact_sqrt, noise, rounding_halves
from redit_fast.losses import LogitTransform, LossConfig, token_coefficients


def why_not(op: str, device: torch.device) -> str | None:
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Advantages: everything in float64, sums in a fixed order, one rounding to float32 at the end.

DEAD_SPREAD = 1e-6
BATCH_BLOCK = 1024  # groups per partial sum of a batch-wide sum


class _Groups:
    """Sums over the members of each group, one member of every group at a time: in batch order whatever the layout."""

    def __init__(self, index: Tensor):
        self.index = index  # (N,) dense, in order of first appearance
        sizes = torch.bincount(index)
        self.count = len(sizes)
        order = torch.argsort(index, stable=True)
        place = torch.arange(len(index), device=index.device) - (torch.cumsum(sizes, 0) - sizes)[index[order]]
        self.rounds = order[torch.argsort(place, stable=True)].split(torch.bincount(place).tolist())

    def sum(self, x: Tensor) -> Tensor:
        total = x.new_zeros(self.count)
        for rows in self.rounds:
            total[self.index[rows]] += x[rows]
        return total

    def moments(self, x: Tensor, scored: Tensor, ddof: int) -> tuple[Tensor, Tensor, Tensor]:
        """Number, mean and two-pass standard deviation of the scored members; 0 where they are undefined."""
        n = self.sum(scored.double())
        mean = self.sum(torch.where(scored, x, 0.0)) / n.clamp(min=1)
        squares = self.sum(torch.where(scored, (x - mean[self.index]) ** 2, 0.0))
        return n, mean, torch.where(n > ddof, exact_sqrt(squares / (n - ddof).clamp(min=1)), 0.0)

    def batch_moments(self, x: Tensor, scored: Tensor, ddof: int) -> tuple[Tensor, Tensor]:
        n = scored.sum().double()
        mean = _blocked_sum(self.sum(torch.where(scored, x, 0.0))) / n.clamp(min=1)
        squares = _blocked_sum(self.sum(torch.where(scored, (x - mean) ** 2, 0.0)))
        return mean, torch.where(n > ddof, exact_sqrt(squares / (n - ddof).clamp(min=1)), 0.0)

    def dead(self, x: Tensor, scored: Tensor, n: Tensor, mean: Tensor) -> Tensor:
        extreme = x.new_full((self.count,), torch.inf)
        low = extreme.scatter_reduce(0, self.index, torch.where(scored, x, torch.inf), "amin")
        high = (-extreme).scatter_reduce(0, self.index, torch.where(scored, x, -torch.inf), "amax")
        return (n < 2) | (high - low <= DEAD_SPREAD * mean.abs().clamp(min=1))


def _blocked_sum(group_sums: Tensor) -> Tensor:
    blocks = torch.nn.functional.pad(group_sums, (0, -len(group_sums) % BATCH_BLOCK)).view(-1, BATCH_BLOCK)
    partial, total = group_sums.new_zeros(len(blocks)), group_sums.new_zeros(())
    for column in blocks.unbind(1)[: len(group_sums)]:
        partial = partial + column
    for block in partial:
        total = total + block
    return total


def _weighted_sum(rewards: Tensor, scored: Tensor, weights: Tensor) -> Tensor:
    total = rewards.new_zeros(len(rewards))
    for k, weight in enumerate(weights):
        total = total + torch.where(scored[:, k], weight * rewards[:, k], 0.0)
    return total


def _quotient(x: Tensor, divisor: Tensor) -> Tensor:
    return torch.where(divisor > 0, x / divisor, 0.0)


def group_advantages(
    values: Tensor,
    group_mean: Tensor,
    group_std: Tensor,
    dead: Tensor,
    dithered_mean: Tensor,
    dithered_std: Tensor,
    rewards: Tensor,
    groups: Tensor,
    sample_ids: Tensor,
    weights: Tensor,
    half_range: Tensor | None,
    distribution: str,
    seed: int,
    step: int,
    dead_groups: str,
    baseline: str,
    scale: str,
    combine: str,
    eps: float,
    ddof: int,
) -> None:
    """Spec section 1. Outputs (N,) float32, `dead` bool; rewards (N, K) float64 with NaN or inf for unscored; groups
    (N,) int64 dense in order of first appearance; weights (K,), half_range (K,) or None (no dither) float64."""
    batch, reward_count = _Groups(groups), rewards.shape[1]
    scored = torch.isfinite(rewards)
    any_scored = scored.any(1)

    def dithered_column(k: int, where: Tensor) -> Tensor:
        if half_range is None:
            return rewards[:, k]
        xi = noise(distribution, half_range[k].item(), seed, sample_ids, k, step)
        return torch.where(where[groups], rewards[:, k] + xi, rewards[:, k])

    def gets_noise(is_dead: Tensor) -> Tensor:
        if half_range is None:
            return torch.zeros_like(is_dead)
        return {"skip": ~is_dead, "only": is_dead}.get(dead_groups, torch.ones_like(is_dead))

    def divisor(std: Tensor, is_dead: Tensor) -> Tensor:
        return torch.where(is_dead, 1.0, std + eps) if dead_groups == "center_only" else std + eps

    clean = _weighted_sum(rewards, scored, weights)
    n, mean, std = batch.moments(clean, any_scored, ddof)
    if combine == "sum_then_normalize":
        is_dead = batch.dead(clean, any_scored, n, mean)
        noisy = gets_noise(is_dead)
        columns = torch.stack([dithered_column(k, noisy) for k in range(reward_count)], 1)
        dithered = _weighted_sum(columns, scored, weights)
        _, noisy_mean, noisy_std = batch.moments(dithered, any_scored, ddof)
        silent = (n < 2) | (is_dead & ~noisy)
        advantage = dithered - noisy_mean[groups]
        if baseline == "leave_one_out":
            advantage = advantage * n[groups] / (n - 1).clamp(min=1)[groups]
        if scale == "group":
            advantage = _quotient(advantage, divisor(noisy_std, is_dead)[groups])
        elif scale == "batch":
            _, batch_std = batch.batch_moments(dithered, any_scored, ddof)
            advantage = _quotient(advantage, divisor(batch_std.expand(batch.count), is_dead)[groups])
    else:  # GDPO: normalise every reward within its group, sum, normalise over the batch
        columns, normalised, dead_columns, silent_columns = [], [], [], []
        for k in range(reward_count):
            n_k, mean_k, _ = batch.moments(rewards[:, k], scored[:, k], ddof)
            dead_k = batch.dead(rewards[:, k], scored[:, k], n_k, mean_k)
            noisy_k = gets_noise(dead_k)
            column = dithered_column(k, noisy_k)
            _, mean_k, std_k = batch.moments(column, scored[:, k], ddof)
            silent_k = (n_k < 2) | (dead_k & ~noisy_k)
            z = _quotient(column - mean_k[groups], divisor(std_k, dead_k)[groups])
            columns.append(column)
            normalised.append(torch.where(silent_k[groups], 0.0, z))
            dead_columns.append(dead_k)
            silent_columns.append(silent_k)
        is_dead = torch.stack(dead_columns).all(0)
        silent = torch.stack(silent_columns).all(0)
        _, noisy_mean, noisy_std = batch.moments(
            _weighted_sum(torch.stack(columns, 1), scored, weights), any_scored, ddof
        )
        total = _weighted_sum(torch.stack(normalised, 1), scored, weights)
        batch_mean, batch_std = batch.batch_moments(total, any_scored, ddof)
        advantage = _quotient(total - batch_mean, batch_std + eps)

    values.copy_(torch.where(any_scored & ~silent[groups], advantage, 0.0))
    for out, statistic in (
        (group_mean, mean),
        (group_std, std),
        (dead, is_dead),
        (dithered_mean, noisy_mean),
        (dithered_std, noisy_std),
    ):
        out.copy_(statistic[groups])


# ---------------------------------------------------------------------------------------------------------------------
# Log-probs, target-anchored: e_j = exp(z_j - z_t), logp = -log1p(sum of e_j over j != t). A row whose sum exceeds e^40
# or is not finite is redone with its largest logit as anchor. `sums` (3, R) float32 keeps per row what a backward pass
# needs: the anchor's raw logit, sum_{j != t} e_j, and s = sum_j e_j.

IGNORE = -100
REPAIR = 2.353852668370200e17  # e^40
BLOCK_ELEMENTS = 1 << 22  # logits per block of rows: bounds the float32 temporaries at 16 MB each
TILE_V = 4096  # vocabulary columns per product tile of the head


def _gap(x: Tensor, anchor: Tensor, transform: LogitTransform) -> Tensor:
    """z(x) - z(anchor); without softcap the subtraction comes first, so that a common shift of the logits cancels."""
    temperature, scale, softcap = transform
    if softcap is None:
        return (x - anchor) * (scale / temperature)
    return (torch.tanh(x * (scale / softcap)) - torch.tanh(anchor * (scale / softcap))) * (softcap / temperature)


def _slope(x: Tensor, transform: LogitTransform) -> Tensor | float:
    """dz/dx."""
    temperature, scale, softcap = transform
    if softcap is None:
        return scale / temperature
    return (1 - torch.tanh(x * (scale / softcap)) ** 2) * (scale / temperature)


def _times_or_zero(e: Tensor, y: Tensor) -> Tensor:
    """e y, and 0 where e is 0 (y is -inf there)."""
    return torch.where(e == 0, 0.0, e * y)


def _needs_repair(anchor: Tensor, others: Tensor) -> Tensor:
    return ~(others <= REPAIR) | ~torch.isfinite(anchor)


def _finish(
    anchor: Tensor, target: Tensor, others: Tensor, weighted: Tensor, transform: LogitTransform
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and sums (3, r), from others = sum_{j != t} e_j and weighted = sum_{j != t} e_j y_j, y = z -
    z_anchor."""
    offset = _gap(target, anchor, transform)  # exactly 0 unless repaired
    e_target = torch.exp(offset)
    total = others + e_target
    log_total = torch.where(offset == 0, torch.log1p(others), torch.log(total))
    entropy = log_total - (weighted + _times_or_zero(e_target, offset)) / total
    return offset - log_total, entropy, torch.stack([anchor, others, total])


def _blocks(targets: Tensor, vocabulary: int) -> tuple[Tensor, ...]:
    """Indices of the scored rows, block by block; every row's result depends on that row alone."""
    scored = torch.nonzero(targets != IGNORE).squeeze(1)
    return scored.split(max(16, BLOCK_ELEMENTS // vocabulary))


def _is_target(targets: Tensor, start: int, stop: int) -> Tensor:
    return targets[:, None] == torch.arange(start, stop, device=targets.device)


def _sum(x: Tensor) -> Tensor:
    """(r, V) -> (r,); a lone row is summed beside a twin, since torch would split its sum over the threads."""
    return x.sum(1) if len(x) != 1 else torch.cat([x, x]).sum(1)[:1]


def _row_sums(x: Tensor, targets: Tensor, anchor: Tensor, transform: LogitTransform) -> tuple[Tensor, Tensor]:
    """sum_{j != t} e_j and sum_{j != t} e_j y_j of rows x (r, V)."""
    y = _gap(x, anchor[:, None], transform)
    e = torch.exp(y).masked_fill(_is_target(targets, 0, x.shape[1]), 0.0)
    return _sum(e), _sum(_times_or_zero(e, y))


def token_logp(
    logp: Tensor, entropy: Tensor | None, sums: Tensor, logits: Tensor, targets: Tensor, transform: LogitTransform
) -> None:
    """logp, entropy (R,) and sums (3, R) float32 from logits (R, V) of any strides; a target of -100 gives 0 and is not
    read, any other target outside [0, V) gives NaN in its row."""
    vocabulary = logits.shape[1]
    for out in (logp, entropy, sums):
        if out is not None:
            out.zero_()
    for rows in _blocks(targets, vocabulary):
        x, t = logits[rows].float(), targets[rows]
        inside = (t >= 0) & (t < vocabulary)
        target = torch.where(inside, x.gather(1, torch.where(inside, t, 0)[:, None]).squeeze(1), torch.nan)
        anchor, (others, weighted) = target, _row_sums(x, t, target, transform)
        broken = _needs_repair(anchor, others)
        if broken.any():
            anchor = torch.where(broken, x.amax(1), target)
            others, weighted = _row_sums(x, t, anchor, transform)
        logp[rows], row_entropy, sums[:, rows] = _finish(anchor, target, others, weighted, transform)
        if entropy is not None:
            entropy[rows] = row_entropy


def token_logp_grad(
    grad_logits: Tensor,
    logits: Tensor,
    targets: Tensor,
    sums: Tensor,
    grad_logp: Tensor,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
    transform: LogitTransform,
) -> None:
    """grad_logits (R, V), which may be logits itself: g (1{j = t} - p_j) - h p_j (log p_j + H), times dz/dx_j."""
    vocabulary = logits.shape[1]
    grad_logits[targets == IGNORE] = 0
    for rows in _blocks(targets, vocabulary):
        x, (anchor, others, total), g = logits[rows].float(), sums[:, rows, None], grad_logp[rows, None]
        y = _gap(x, anchor, transform)
        p = torch.exp(y) / total
        # others / total is 1 - p_t without cancellation
        grad = torch.where(_is_target(targets[rows], 0, vocabulary), g * (others / total), -g * p)
        if grad_entropy is not None:
            grad = grad - grad_entropy[rows, None] * _times_or_zero(p, y - total.log() + entropy[rows, None])
        grad_logits[rows] = (grad * _slope(x, transform)).to(grad_logits.dtype)


def token_loss(
    loss: Tensor,
    logp: Tensor,
    entropy: Tensor,
    grad_logits: Tensor | None,
    logits: Tensor,
    targets: Tensor,
    weights: Tensor,
    advantages: Tensor,
    old_logp: Tensor | None,
    ref_logp: Tensor | None,
    config: LossConfig,
    grad_scale: Tensor | None,
) -> None:
    """loss () = sum over rows of weights * l(logp); grad_logits (R, V), which may be logits itself, times grad_scale
    ()."""
    sums = logits.new_empty(3, len(targets), dtype=torch.float32)
    token_logp(logp, entropy, sums, logits, targets, config.transform)
    row_loss, slope = token_coefficients(config, logp, advantages, old_logp, ref_logp)
    scored = targets != IGNORE
    loss.copy_(torch.where(scored, weights * row_loss, 0.0).sum())
    if grad_logits is not None:
        slope = torch.where(scored, weights * slope, 0.0)
        slope = slope if grad_scale is None else slope * grad_scale
        token_logp_grad(grad_logits, logits, targets, sums, slope, None, None, config.transform)


def scale_in_place(x: Tensor, factor: Tensor) -> None:
    """x *= factor (0-d), one rounding."""
    x.copy_(x.float() * factor)


def exp_product(
    e: Tensor | None,
    logp: Tensor,
    entropy: Tensor | None,
    sums: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    transform: LogitTransform,
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
) -> None:
    """One chunk of rows of the head: hidden (r, D) times weight (V, D), in vocabulary tiles, float32 from the product
    on.

    Writes logp, entropy (r,) and sums (3, r) as `token_logp` does, and into e (r, V), where given, the gradient's rows
    up to a
    factor beta: e_j dz/dx_j, and -sum_{j != t} e_j dz/dx_t in the target's column, so that the gradient of c logp with
    respect to the row's raw logits is beta e with beta = -c / s. With g = grad_logp and h = grad_entropy (r,), e holds
    (e_j (g + h (log p_j + H)) - g s 1{j = t}) dz/dx_j, and beta = -1 / s.
    """
    x, vocabulary = hidden.float(), len(weight)
    inside = (targets >= 0) & (targets < vocabulary)
    columns = torch.where(inside, targets, 0)
    target = (x * weight[columns].float()).sum(1)
    if bias is not None:
        target = target + bias[columns].float()
    target = torch.where(inside, target, torch.nan)

    def tiles():
        for start in range(0, vocabulary, TILE_V):
            stop = min(start + TILE_V, vocabulary)
            z = x @ weight[start:stop].float().t()
            yield start, stop, z if bias is None else z + bias[start:stop].float()

    def sums_at(anchor: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        others, weighted, largest = (
            torch.zeros_like(anchor),
            torch.zeros_like(anchor),
            torch.full_like(anchor, -torch.inf),
        )
        for start, stop, z in tiles():
            y = _gap(z, anchor[:, None], transform)
            exponential = torch.exp(y).masked_fill(_is_target(targets, start, stop), 0.0)
            others += exponential.sum(1)
            weighted += _times_or_zero(exponential, y).sum(1)
            largest = torch.maximum(largest, z.amax(1))
            if e is not None:
                e[:, start:stop] = exponential * _slope(z, transform)
        return others, weighted, largest

    anchor = target
    others, weighted, largest = sums_at(anchor)
    broken = _needs_repair(anchor, others)
    if broken.any():
        anchor = torch.where(broken, largest, target)
        others, weighted, _ = sums_at(anchor)
    row_logp, row_entropy, row_sums = _finish(anchor, target, others, weighted, transform)
    logp.copy_(row_logp)
    sums.copy_(row_sums)
    if entropy is not None:
        entropy.copy_(row_entropy)
    if e is None:
        return
    at_target = -others
    if grad_entropy is not None:
        total = row_sums[2]
        for start, stop, z in tiles():
            y = _gap(z, anchor[:, None], transform)
            surprise = y - total.log()[:, None] + row_entropy[:, None]
            e[:, start:stop] = _times_or_zero(
                torch.exp(y), grad_logp[:, None] + grad_entropy[:, None] * surprise
            ) * _slope(z, transform)
        at_target = grad_entropy * torch.exp(row_logp) * total * (row_logp + row_entropy) - grad_logp * others
    e.scatter_(1, columns[:, None], (at_target * _slope(target, transform)).to(e.dtype)[:, None])


# ---------------------------------------------------------------------------------------------------------------------
# Passes over parameters: lists of tensors, scalars stay on the device.


def squared_norm(out: Tensor, tensors: list[Tensor]) -> None:
    """out () float64 = sum of the squares of all elements, in the order of the tensors."""
    out.zero_()
    for tensor in tensors:
        out += tensor.to(torch.promote_types(tensor.dtype, torch.float32)).square().sum(dtype=torch.float64)


def _round_stochastically(x: Tensor, dtype: torch.dtype, halves: Tensor) -> Tensor:
    """x float32 -> dtype, up with the probability of its dropped bits: 16 for bfloat16, 13 for float16."""
    dropped = 16 if dtype == torch.bfloat16 else 13
    keep = -(1 << dropped)
    bits = (x.view(torch.int32).long() + (halves & ~keep).view_as(x)) & keep
    rounded = bits.to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(dtype)


def perturb(
    sums: Tensor,
    params: list[Tensor],
    copies: list[Tensor | None],
    grads: list[Tensor],
    offsets: list[int],
    scale: Tensor,
    rounding: str,
    seed: int,
    step: Tensor,
    compute_dtype: torch.dtype | None,
) -> None:
    """params += scale * grads, rounded once (a scale of 0 moves nothing); the old values into the copies that are not
    None.

    sums (4,) float64 = <applied, intended>, |applied|^2, |intended|^2 and the number of weights moved, `applied` being
    the change that the forward pass sees in compute_dtype (None: the parameter's own). offsets are each tensor's first
    element in the concatenation of all trainable parameters, which places it in the counter of the stochastic rounding.
    """
    sums.zero_()
    for param, copy, grad, offset in zip(params, copies, grads, offsets, strict=True):
        wide = torch.promote_types(param.dtype, torch.float32)
        intended = torch.where(scale == 0, 0.0, scale.to(wide) * grad.to(wide))  # 0 also where g1 holds NaN
        moved = param.to(wide) + intended
        if rounding == "stochastic" and param.dtype in (torch.bfloat16, torch.float16):
            halves = rounding_halves(seed, offset, param.numel(), step, param.device)
            moved = _round_stochastically(moved.contiguous(), param.dtype, halves)
        else:
            moved = moved.to(param.dtype)
        seen = compute_dtype or param.dtype
        applied = moved.to(seen).double() - param.to(seen).double()
        intended = intended.double()
        sums += torch.stack(
            [(applied * intended).sum(), applied.square().sum(), intended.square().sum(), (applied != 0).sum().double()]
        )
        if copy is not None:
            copy.copy_(param)
        param.copy_(moved)


def adamw(
    params: list[Tensor],
    masters: list[Tensor | None],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    factor: Tensor,
    finite: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """One AdamW step (torch.optim.AdamW's order of operations) with gradients factor * grads, on the float32 master
    where there is one; params = nearest(master). Where `finite` () is false nothing changes but params, which become
    the master again."""
    for param, master, grad, m, v, step in zip(params, masters, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        weights = param if master is None else master
        g = grad.to(weights.dtype) * factor.to(weights.dtype)
        new_step = (step + 1).double()
        new_m = torch.lerp(m, g, 1 - beta1)
        new_v = (v * beta2).addcmul(g, g, value=1 - beta2)
        denominator = new_v.sqrt() / (1 - beta2**new_step).sqrt() + eps
        update = new_m * -(lr / (1 - beta1**new_step)) / denominator
        for old, new in (
            (m, new_m),
            (v, new_v),
            (weights, weights * (1 - lr * weight_decay) + update),
            (step, step + 1),
        ):
            old.copy_(torch.where(finite, new, old))
        if master is not None:
            param.copy_(master)
