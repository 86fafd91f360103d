"""The published signatures of the kernels for rows of many lengths, computed by SDPA a segment in plain PyTorch.

flash-attn 2.8.3 (flash_attn), 3 (hopper/flash_attn_interface.py) and 4 (flash_attn/cute/interface.py), torch 2.13's
torch.nn.attention.varlen. Options that ours does not use are refused, so that one that reaches them is seen.
"""

import torch


def attend(q, k, v, cu_q, cu_k, scale, left, softcap):
    """As flash-attn: causal masks are aligned to the last key; `left` keys before a query's own, None: all."""
    assert cu_q.dtype == cu_k.dtype == torch.int32 and scale is not None
    parts = []
    for place in range(len(cu_q) - 1):
        queries = q[cu_q[place] : cu_q[place + 1]].transpose(0, 1)
        keys, values = (x[cu_k[place] : cu_k[place + 1]].transpose(0, 1) for x in (k, v))
        keys, values = (x.repeat_interleave(q.shape[1] // k.shape[1], 0) for x in (keys, values))
        scores = scale * (queries @ keys.transpose(1, 2))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        at = torch.arange(queries.shape[1])[:, None] + keys.shape[1] - queries.shape[1]
        before = at - torch.arange(keys.shape[1])
        seen = before >= 0 if left is None else (before >= 0) & (before <= left)
        parts.append((scores.masked_fill(~seen, -torch.inf).softmax(-1) @ values).transpose(0, 1))
    return torch.cat(parts)


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert causal and (dropout_p, alibi_slopes, return_attn_probs, block_table) == (0.0, None, False, None)
    check(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left = None if window_size[0] == -1 else window_size[0]
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left, softcap)


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None,
    softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0,
    return_attn_probs=False,
):  # fmt: skip
    assert causal and (seqused_q, seqused_k, qv, attention_chunk, return_attn_probs) == (None, None, None, 0, False)
    check(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    left = None if window_size[0] == -1 else window_size[0]
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, left, softcap)


def flash_attn_4(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None, seqused_q=None,
    seqused_k=None, page_table=None, softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, cu_total_m_blocks=None, cu_total_n_blocks=None, aux_tensors=None, return_lse=False,
):  # fmt: skip
    assert causal and softcap == 0.0  # its backward pass has none
    assert (seqused_q, seqused_k, page_table, learnable_sink, score_mod, mask_mod) == (None,) * 6
    check(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, window_size[0], softcap), None


def varlen_attn(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1),
    enable_gqa=False, seqused_k=None, block_table=None, num_splits=None,
):  # fmt: skip
    assert enable_gqa or query.shape[1] == key.shape[1]
    assert window_size[1] == 0 and (return_aux, seqused_k, block_table, num_splits) == (None,) * 4
    check(query, cu_seq_q, cu_seq_k, max_q, max_k)
    left = None if window_size[0] == -1 else window_size[0]
    return attend(query, key, value, cu_seq_q, cu_seq_k, scale, left, 0.0)


def check(q, cu_q, cu_k, max_q, max_k):
    """What the kernels read past the ends without."""
    assert q.ndim == 3 and cu_q[0] == cu_k[0] == 0 and cu_q[-1] == len(q)
    assert type(max_q) is type(max_k) is int and max_q == cu_q.diff().max() and max_k == cu_k.diff().max()
