"""Every policy loss a second time, in Python floats, one sequence and one token after the other."""

import math
from types import SimpleNamespace

import torch

from redit_fast.noise import counter_uniform


def exp(x):
    return math.exp(min(max(x, -20.0), 20.0))


def loss_by_hand(config, logp, frozen, batch, step=0, seed=0):
    """The loss at `logp` (B, T) float64 with everything behind a stop-gradient taken at `frozen`, so that finite
    differences in `logp` are the gradient; and the numbers that metrics are made of."""
    b_count, t_count = logp.shape
    tokens = [(b, t) for b in range(b_count) for t in range(t_count) if batch.mask[b, t]]
    of = {b: [token for token in tokens if token[0] == b] for b in range(b_count)}
    x = {token: logp[token].item() for token in tokens}
    x0 = {token: frozen[token].item() for token in tokens}
    A = {token: batch.advantages[token[0]].item() for token in tokens}
    old = x0 if batch.old is None else {token: batch.old[token].item() for token in tokens}
    d, d0 = ({token: y[token] - old[token] for token in tokens} for y in (x, x0))
    low, high = 1 - config.epsilon_low, 1 + (config.epsilon_low if config.epsilon_high is None else config.epsilon_high)
    kind = config.loss_type

    def clip(r):
        return min(max(r, low), high)

    def mean(values):
        values = list(values)
        return sum(values) / max(len(values), 1)

    # Which tokens take part.
    kept = set(tokens)
    if config.top_entropy_quantile < 1:
        entropies = torch.stack([batch.entropy[token] for token in tokens])
        threshold = torch.quantile(entropies, 1 - config.top_entropy_quantile)
        kept = {token for token, h in zip(tokens, entropies) if h >= threshold}
    on_policy = set(tokens)
    if config.off_policy_mask_threshold is not None:
        reference = batch.old if batch.sampling is None else batch.sampling
        drift = {i: reference[i].item() - x0[i] for i in tokens}
        drift = {b: mean(0.0 if math.isnan(drift[i]) else drift[i] for i in of[b]) for b in of}
        on_policy = {i for i in tokens if A[i] >= 0 or drift[i[0]] <= config.off_policy_mask_threshold}

    # The sampler's correction.
    q = dict.fromkeys(tokens, 1.0)
    if config.correction != "none":
        gap = {i: old[i] - batch.sampling[i].item() for i in tokens}
        gap = {i: 0.0 if math.isnan(gap[i]) else gap[i] for i in tokens}
        for i in tokens:
            w = exp(sum(gap[j] for j in of[i[0]]) if "sequence" in config.correction else gap[i])
            floor, cap = config.correction_floor or 0.0, config.correction_cap
            q[i] = min(max(w, floor), cap) if "truncate" in config.correction else (w if floor <= w <= cap else 0.0)

    covariance = {i: (A[i] - mean(A.values())) * (x0[i] - mean(x0.values())) for i in tokens}
    below, above, phi, chosen, policy, exponents = set(), set(), {}, set(), {}, {}
    if kind == "kl_cov":
        count = max(int(config.kl_cov_ratio * len(tokens)), 1)
        chosen = set(sorted(tokens, key=lambda i: -covariance[i])[:count])

    for i in tokens:
        mine = of[i[0]]
        r = exp(d[i])
        if config.importance == "sequence" or kind == "gspo":
            r = exp(mean(d[j] for j in mine))
        elif kind == "gspo_token":
            r = exp(mean(d0[j] for j in mine)) * math.exp(x[i] - x0[i])
        elif kind == "rloo":
            r = exp(sum(d[j] for j in mine))
        elif kind == "gmpo":
            limits = (-config.epsilon_low, high - 1)
            limited = {j: min(max(d[j], limits[0]), limits[1]) for j in mine}
            r = exp(mean((min if A[j] > 0 else max)(d[j], limited[j]) for j in mine if j in kept))
        r0 = exp(d0[i]) if kind != "cispo" or config.importance == "token" else exp(mean(d0[j] for j in mine))
        exponents[i] = math.log(r)
        if kind in ("gpg", "reinforce"):
            policy[i] = -A[i] * x[i]
        elif kind == "dro":
            policy[i] = -(A[i] * x[i] - config.dro_beta / 2 * d[i] ** 2)
        elif kind == "cispo":
            weight = min(r0, high - 1) if config.cispo_bound == "absolute" else clip(r0)
            policy[i] = -weight * A[i] * x[i]
            above |= {i} if r0 > (high - 1 if config.cispo_bound == "absolute" else high) and A[i] > 0 else set()
        elif kind == "vespo":
            k, scale = (
                (config.vespo_k_pos, config.vespo_lambda_pos)
                if A[i] >= 0
                else (config.vespo_k_neg, config.vespo_lambda_neg)
            )
            total = sum(min(max(d0[j], -20), 20) for j in mine)
            total += sum(max(math.log(q[j]), -20) if q[j] else -20 for j in mine)
            w = exp(total)
            phi[i] = math.exp(scale) * w**k * math.exp(-scale * w)
            policy[i] = -phi[i] * A[i] * x[i]
            exponents[i] = total
        elif kind in ("dppo_tv", "dppo_kl"):
            p, p_old = math.exp(x0[i]), math.exp(old[i])
            if kind == "dppo_tv":
                drop = p - p_old > high - 1 if A[i] > 0 else p - p_old < -config.epsilon_low
            else:
                kl = p_old * (old[i] - x0[i]) + (1 - p_old) * math.log((1 - p_old + 1e-8) / (1 - p + 1e-8))
                drop = kl > high - 1 and p > p_old if A[i] > 0 else kl > config.epsilon_low and p < p_old
            policy[i] = 0.0 if drop else -A[i] * min(r0, 20.0) * x[i]
            (above if A[i] > 0 else below).update({i} if drop and A[i] else ())
        elif kind == "sapo":
            tau = config.sapo_temperature_pos if A[i] > 0 else config.sapo_temperature_neg
            policy[i] = -4 / tau / (1 + math.exp(-tau * (r - 1))) * A[i]
        elif kind == "kl_cov":
            policy[i] = -r * A[i] + (config.kl_cov_coef * abs(d[i]) if i in chosen else 0.0)
        elif kind == "gmpo":
            policy[i] = -r * A[i]
            below |= {i} if d[i] < -config.epsilon_low and A[i] < 0 else set()
            above |= {i} if d[i] > high - 1 and A[i] > 0 else set()
        else:
            unclipped = min(r, config.delta or math.inf)
            policy[i] = max(-unclipped * A[i], -clip(r) * A[i])
            if config.dual_clip and A[i] < 0:
                policy[i] = min(policy[i], -config.dual_clip * A[i])
            below |= {i} if unclipped < low and A[i] < 0 else set()
            above |= {i} if unclipped > high and A[i] > 0 else set()

    if kind == "clip_cov":
        lots = counter_uniform(seed, torch.arange(len(tokens)), 0x10002, step).tolist()
        candidates = [
            n for n, i in enumerate(tokens)
            if config.clip_cov_lb < covariance[i] < config.clip_cov_ub and i not in below | above
        ]  # fmt: skip
        count = max(int(config.clip_cov_ratio * len(tokens)), 1)
        chosen = {tokens[n] for n in sorted(candidates, key=lambda n: lots[n])[:count]}
        policy = {i: 0.0 if i in chosen else policy[i] for i in tokens}

    total, kls = dict.fromkeys(of, 0.0), {}
    for i in tokens:
        value = policy[i] * (1.0 if kind == "vespo" else q[i]) * (i in on_policy)
        value *= kind == "gmpo" or i in kept
        if config.beta:
            delta = x[i] - batch.ref[i].item()
            k3 = math.exp(min(-delta, 20)) + max(delta, -20) - 1
            kls[i] = {"k1": delta, "k2": delta**2 / 2, "k3": k3, "abs": abs(delta)}[config.kl]
            if config.kl_ratio_correction:
                sequence = config.importance == "sequence" or kind == "gspo"
                kls[i] *= exp(mean(d[j] for j in of[i[0]]) if sequence else d[i])
            value += config.beta * kls[i]
        total[i[0]] += value
    if kind in ("grpo", "sapo", "gspo", "gspo_token", "gmpo", "rloo"):
        loss = sum(total[b] / max(len(of[b]), 1) for b in of) / b_count
    elif kind == "luspo":
        loss = sum(total.values()) / b_count
    elif kind == "dr_grpo":
        loss = sum(total.values()) / (b_count * config.max_completion_length)
    else:
        loss = sum(total.values()) / len(tokens)
    loss -= config.entropy_coef * mean(batch.entropy[i].item() for i in kept)
    return SimpleNamespace(
        loss=loss, of=of, below=below, above=above, phi=phi, chosen=chosen, kept=kept, on_policy=on_policy, q=q,
        kl=mean(kls.values()), exponents=exponents,
    )  # fmt: skip
