"""Our head behind verl's fused kernels: in the forward that verl gives a model, and in its real TrainingWorker."""

import pytest
import torch

pytest.importorskip("verl", reason="verl is not installed: its integration needs it")
pytest.register_assert_rewrite("tests.integrations.verl_rank")  # imported below, and a plugin: its fixtures

import verl.models.transformers.monkey_patch as monkey_patch  # noqa: E402
import verl.utils.experimental.torch_functional as torch_functional  # noqa: E402
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen2Config, Qwen2ForCausalLM  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402

from tests.integrations.verl_rank import SIZES, V, batch_of, close, new_worker, rows, train, weights  # noqa: E402
from tests.tolerance import relative  # noqa: E402

pytest_plugins = ("tests.integrations.verl_rank",)
pytestmark = pytest.mark.usefixtures("verl_process")


def models():
    torch.manual_seed(0)
    gemma = Gemma2Config(**SIZES, head_dim=16, final_logit_softcapping=0.5, query_pre_attn_scalar=16)
    return {"qwen2": Qwen2ForCausalLM(Qwen2Config(**SIZES)), "gemma2": Gemma2ForCausalLM(gemma)}


def through_verls_patch(model, backend, monkeypatch):
    monkeypatch.setattr(type(model), "forward", type(model).forward)  # verl patches the class: put it back after
    monkey_patch.apply_monkey_patch(
        model, use_remove_padding=False, use_fused_kernels=True, fused_kernels_backend=backend
    )
    return model


def outputs_and_gradients(model, score):
    """Log-probs and entropy (B, T), and every parameter's gradient of a sum of both."""
    model.zero_grad()
    logp, entropy = score(model)
    weight = torch.linspace(-1, 1, logp.numel()).view_as(logp)
    ((weight * logp).sum() + 0.1 * (weight.roll(1) * entropy).sum()).backward()
    return [logp.detach(), entropy.detach(), *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("name", ["qwen2", "gemma2"])
def test_the_fused_forward_gives_what_the_full_logits_do(name, shifted, monkeypatch):
    model = models()[name]
    own, tokens = type(model).forward, torch.randint(V, (2, 9))
    targets = torch.randint(V, (2, 9)) if shifted else tokens.roll(-1, 1)

    def full(model):
        logp = torch.log_softmax(model(tokens).logits / 0.7, -1)
        return logp.gather(2, targets[..., None])[..., 0], -(logp.exp() * logp).sum(-1)

    def fused(model):
        out = model(tokens, temperature=0.7, return_dict=True, **({"shift_labels": targets} if shifted else {}))
        return out.log_probs, out.entropy

    expected = outputs_and_gradients(model, full)
    ours = outputs_and_gradients(through_verls_patch(model, "redit", monkeypatch), fused)
    assert type(model).forward is own and torch_functional.FusedLinearForPPO.__module__ == torch_functional.__name__
    assert "forward" not in vars(model.lm_head)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert max(map(relative, ours, expected)) < 1e-5
    theirs = outputs_and_gradients(through_verls_patch(models()[name], "torch", monkeypatch), fused)
    if name == "qwen2":
        assert max(map(relative, ours, theirs)) < 1e-5
    else:
        assert relative(theirs[0], expected[0]) > 0.01  # verl's leaves the softcap out


def test_verls_own_backends_go_on_to_verl(monkeypatch):
    model = through_verls_patch(models()["qwen2"], "torch", monkeypatch)
    assert "forward" not in vars(model) and type(model).forward.__name__ == "forward_with_torch_backend"
    with pytest.raises(ValueError, match="impl_backend=redit needs one temperature for all tokens, got a tensor of"):
        ours = through_verls_patch(models()["qwen2"], "redit", monkeypatch)
        ours(torch.zeros(1, 3, dtype=torch.int64), temperature=torch.ones(1), return_dict=True)


@pytest.mark.parametrize("tied", [False, True])
def test_a_worker_with_our_head_trains_as_one_without(folder, tmp_path, tied):
    if tied:
        folder = tmp_path
        Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "tie_word_embeddings": True})).save_pretrained(folder)
    found = []
    for fused in (None, "redit"):
        worker = new_worker(folder, fused=fused)
        scored = worker.infer_batch(batch_of(rows(), temperature=0.7))
        metrics = train(worker, batch_of(rows(), temperature=0.7))
        # A sequence's last place has no next token: what stands there is never read.
        logp, entropy = (torch.cat([x[:-1] for x in scored[name].unbind()]) for name in ("log_probs", "entropy"))
        found.append((logp, entropy, weights(worker), metrics["grad_norm"]))
    (logp, entropy, stepped, norm), (our_logp, our_entropy, ours, our_norm) = found
    assert torch.allclose(our_logp, logp, atol=1e-5) and torch.allclose(our_entropy, entropy, atol=1e-5)
    assert our_norm == pytest.approx(norm, rel=1e-5) and close(ours, stepped)


def test_what_the_fused_forward_does_not_give_is_refused_by_verl(folder):
    data = batch_of(rows())
    tu.assign_non_tensor(data, calculate_sum_pi_squared=True)
    with pytest.raises(NotImplementedError, match="calculate_sum_pi_squared=True is not supported with use_fused"):
        train(new_worker(folder, fused="redit"), data)
