"""Weights that a server gets, and runs by one: the server is the tests' own, and loads them by the page's file."""

from pathlib import Path

import pytest
import torch

from redit_fast.cli import main
from redit_fast.training import checkpoint, lora, policy, report
from redit_fast.training.config import TrainConfig
from redit_fast.training.distributed import Ranks
from redit_fast.training.rollout import EngineError, connection, server
from redit_fast.training.rollout.server import Server
from tests import ROOT
from tests.project.pages import PAGES, fenced
from tests.training import processes
from tests.training.fake_vllm import PROMPTS, FakeVLLM, a_model, at_rest, engine, sampled, serving, slow, status
from tests.training.jobs import flags, lines_of


@pytest.fixture(scope="module")
def fake():
    with serving(a_model()) as found:
        yield found


@pytest.fixture
def clean(fake, monkeypatch):
    with at_rest(fake, monkeypatch) as found:
        yield found


def test_the_weights_arrive_and_leave_no_files(clean, tmp_path, monkeypatch):
    """In memory, or next to the run where memory has no room."""
    model = a_model(1)
    assert not torch.equal(model.lm_head.weight, clean.model.lm_head.weight)
    memory = tmp_path / "memory"
    memory.mkdir()
    for room in (memory, tmp_path / "none"):
        monkeypatch.setattr(server, "MEMORY", room)
        with torch.no_grad():
            model.lm_head.weight += 0.01
        running = engine(clean.url, tmp_path)
        running.sync(model)
        place = Path(next(body["args"][0] for path, body in clean.seen if path == "/collective_rpc")).parents[1]
        assert place == (memory if room is memory else tmp_path)
        assert clean.paths()[:2] == ["/collective_rpc", "/reset_prefix_cache"]
        mine, served = model.state_dict(), clean.model.state_dict()
        assert all(torch.equal(mine[name], served[name]) for name in mine)
        assert not list(memory.iterdir()) and list(tmp_path.iterdir()) == [memory]
        clean.seen.clear()
        running.sync(model)
        assert clean.paths() == ["/collective_rpc", "/reset_prefix_cache"]  # the probe is of the first time
        clean.seen.clear()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_log_probs_are_those_of_the_model_that_was_sent(clean, tmp_path, temperature):
    model = a_model(2)
    running = engine(clean.url, tmp_path)
    running.sync(model)
    found = sampled(running, temperature=temperature)
    for row, (tokens, logp) in enumerate(zip(found.completions, found.logp, strict=True)):
        prompt = PROMPTS[row // 2]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
        ours = (logits / temperature).log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        assert ours.tolist() == pytest.approx(logp, abs=1e-5)


def test_log_probs_of_before_the_temperature_are_refused_at_the_start(clean, tmp_path):
    clean.mode = "raw_logprobs"
    with pytest.raises(EngineError, match="start it with --logprobs-mode processed_logprobs$"):
        engine(clean.url, tmp_path).sync(a_model())


def test_the_mode_of_log_probs_is_found_whatever_token_was_drawn(clean, tmp_path, monkeypatch):
    """vLLM gives the token that was drawn beside the likeliest, here the least likely one at temperature 2."""

    def completions(self, body):
        found = plain(self, body)
        if body["temperature"] == 2:
            found["choices"][0]["logprobs"]["top_logprobs"][0]["token_id:0"] = -50.0
        return found

    plain = FakeVLLM.completions
    monkeypatch.setattr(FakeVLLM, "completions", completions)
    engine(clean.url, tmp_path).sync(a_model())


def test_a_server_that_cannot_load_says_why(clean, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "LOAD", "another_method")
    with pytest.raises(EngineError, match="/collective_rpc: status 500, .*another_method"):
        engine(clean.url, tmp_path).sync(a_model())
    monkeypatch.undo()
    monkeypatch.setattr(Server, "_written", lambda self, folder, *_: folder / "nowhere")
    with pytest.raises(EngineError, match="holds no safetensors that the server can read"):
        engine(clean.url, tmp_path).sync(a_model())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("path", "needs"),
    [
        ("/collective_rpc", "VLLM_SERVER_DEV_MODE=1"),
        ("/reset_prefix_cache", "VLLM_SERVER_DEV_MODE=1"),
        ("/v1/load_lora_adapter", "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 and --enable-lora"),
    ],
)
def test_a_server_that_was_started_without_a_route_is_told_with_what(clean, tmp_path, monkeypatch, path, needs):
    monkeypatch.setattr(clean, "without", (path,))
    model, base = a_model(), None
    if "lora" in path:
        base = with_adapters(model)
    with pytest.raises(EngineError, match=f"{path}: status 404, Not Found: start the server with {needs}$"):
        engine(clean.url, tmp_path, base=base).sync(model)


def test_a_full_disk_is_one_sentence(clean, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    model = a_model()
    monkeypatch.setattr(type(model), "save_pretrained", full)
    with pytest.raises(EngineError, match="^rollout: the weights could not be written for the server: .*No space left"):
        engine(clean.url, tmp_path).sync(model)
    assert clean.paths() == []


def test_what_the_old_weights_have_computed_is_not_kept(clean, tmp_path):
    running = engine(clean.url, tmp_path)
    clean.held = 3
    running.sync(a_model())
    assert clean.paths().count("/reset_prefix_cache") == 4
    clean.held = 1000
    with pytest.raises(EngineError, match="/reset_prefix_cache: the server keeps what it has computed"):
        running.sync(a_model())
    clean.held = 0


def with_adapters(model):
    base = lora.Base("x", {})
    lora.attach(model, TrainConfig(model="x", data="x", rewards=["integer_answer"], lora_rank=2), base)
    return base


def test_adapters_are_sent_under_a_new_name_each_time(clean, tmp_path, monkeypatch):
    gathered = []
    monkeypatch.setattr(Ranks, "state_of", lambda ranks, model, *, trained=False: gathered.append(trained))
    model = a_model()
    base = with_adapters(model)
    running = engine(clean.url, tmp_path, base=base)
    names = []
    for _ in range(2):
        running.sync(model)
        assert list(clean.adapters.values()) == [["adapter_config.json", "adapter_model.safetensors", "base.json"]]
        names += clean.adapters
        clean.seen.clear()
        sampled(running)
        assert {body["model"] for path, body in clean.seen if path == "/v1/completions"} == {names[-1]}
        (files,) = {Path(running.adapter[1].name)}
        assert files.is_dir()  # vLLM may read them again
    assert len(set(names)) == 2 and gathered == [True, True]  # FSDP2's ranks gather the adapters alone
    running.close()
    assert not files.exists()
    clean.adapters.clear()


def test_the_server_sleeps_between_rollouts(clean, tmp_path):
    running = engine(clean.url, tmp_path, sleeps=True)
    running.sync(a_model())
    assert not clean.asleep
    sampled(running)
    assert clean.asleep and clean.paths()[-1] == "/sleep?level=1"
    clean.seen.clear()
    running.sync(a_model())
    sampled(running)
    assert clean.paths()[0] == "/wake_up" and clean.paths().count("/wake_up") == 1 and clean.asleep
    clean.asleep = False


def test_ranks_that_share_a_server_cannot_put_it_to_sleep(clean, tmp_path):
    with pytest.raises(ValueError, match="^rollout_sleep: several ranks share the server"):
        engine(clean.url, tmp_path, sleeps=True, ranks=Ranks(0, 2, "ddp"))


def test_the_page_has_the_workers_file():
    (quoted,) = fenced("python", PAGES["docs/integrations/vllm.md"])
    assert quoted == (ROOT / "examples/vllm_weights.py").read_text()


# --- a run


@pytest.fixture
def served(settings):
    """A server of the run's own model, as it is at the start."""
    model, _ = policy.load(settings["model"])
    with serving(model) as found:
        yield found


def test_a_run_by_a_server_ends_as_its_checkpoint(settings, tmp_path, served, monkeypatch, capsys):
    """And the key is in no file of it."""
    monkeypatch.setattr(report, "write", lambda run: None)
    monkeypatch.setenv(connection.KEY, "a-secret")
    served.key = "a-secret"
    job = {**settings, "rollout": served.url, "steps": 2, "learning_rate": 1e-2}
    assert main(["train", *flags(job), "--temperature", "0.7", "--rollout-sleep"]) == 0
    lines = [line for line in lines_of(tmp_path / "run/metrics.jsonl") if line["step"]]
    assert len(lines) == 2 and all(line["sampling/sampling_logp_difference/max"] < 1e-5 for line in lines)
    assert all(line["sampling/frac_corrected"] == 0 for line in lines)
    last, _ = policy.load(tmp_path / "run/checkpoints/step-000002")
    mine, theirs = last.state_dict(), served.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert served.asleep and served.paths().count("/wake_up") == served.paths().count("/sleep?level=1") - 1 >= 3
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert len(files) > 5 and not [path for path in files if b"a-secret" in path.read_bytes()]
    printed = capsys.readouterr()
    assert "a-secret" not in printed.out + printed.err


def test_a_server_samples_one_step_ahead(settings, tmp_path, served, monkeypatch):
    monkeypatch.setattr(report, "write", lambda run: None)
    job = {**settings, "rollout": served.url, "rollout_ahead": 1, "steps": 3, "eval_problems": 0, "learning_rate": 1e-2}
    assert main(["train", *flags(job)]) == 0
    lines = lines_of(tmp_path / "run/metrics.jsonl")[1:]
    assert [line["sampling/steps_behind"] for line in lines] == [0, 1, 1]
    gaps = [line["sampling/sampling_logp_difference/max"] for line in lines]
    assert gaps[0] < 1e-5 and min(gaps[1:]) > 1e-3


def test_a_server_that_goes_away_stops_the_run_after_a_checkpoint(settings, tmp_path, served, monkeypatch, capsys):
    monkeypatch.setattr(report, "write", lambda run: None)
    monkeypatch.setattr(connection, "PAUSE", 0.01)
    job = {**settings, "rollout": served.url, "steps": 3, "eval_problems": 0, "checkpoint_every": 10}
    job["rollout_retries"] = 1
    loads, plain = [], served.collective_rpc

    def load(method, args):
        loads.append(args)
        if len(loads) == 3:  # at the start, after the first step, after the second
            served.faults += [status(503, b"draining")] * 100
        return plain(method, args)

    monkeypatch.setattr(served, "collective_rpc", load)
    assert main(["train", *flags(job)]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"redit-fast: rollout {served.url}/v1/completions: no answer in 2 attempts")
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run/checkpoints")) == 2
    assert main(["train", *flags({**job, "rollout": "http://127.0.0.1:9"}), "--resume"]) == 2  # moved, and away


def test_a_server_that_is_too_slow_is_refused_before_anything_is_written(settings, tmp_path, served, capsys):
    served.faults += [slow(3)] * 4
    assert main(["train", *flags({**settings, "rollout": served.url, "rollout_timeout": 1.5})]) == 2
    assert capsys.readouterr().err.endswith("no answer within 1.5 s (rollout_timeout)\n")
    assert not (tmp_path / "run").exists()


def test_ranks_share_a_server(settings, tmp_path, served):
    """Each with a part of the weights, which are gathered for it."""
    job = {**settings, "rollout": served.url, "strategy": "fsdp2", "steps": 1, "max_completion_length": 8}
    codes, printed = processes.finish(processes.start(2, processes.train, flags(job), folder=tmp_path), tmp_path)
    assert codes == [0, 0], printed
    line = lines_of(tmp_path / "run/metrics.jsonl")[1]
    assert line["sampling/sampling_logp_difference/max"] < 1e-5
    samples = lines_of(tmp_path / "run/completions.jsonl")
    assert [row["sample"] for row in samples] == list(range(12)) and len({row["completion"] for row in samples}) > 6
    assert served.paths().count("/collective_rpc") == 2  # by the first rank alone: at the start and after the step
    last, _ = policy.load(tmp_path / "run/checkpoints/step-000001")
    mine, theirs = last.state_dict(), served.model.state_dict()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
