"""One test body for every engine: the same protocol, log-probs that are the model's, weights as synchronised. And runs
by another engine than the local one, and with samples ahead."""

import copy
import gc
import os
import signal
import threading
import time
import warnings
from contextlib import ExitStack

import pytest
import torch

from redit_fast.cli import main
from redit_fast.training import builtin, checkpoint, config_file, policy, report, setup
from redit_fast.training.distributed import Ranks
from redit_fast.training.rollout import EngineError, paged
from redit_fast.training.rollout.ahead import Ahead
from redit_fast.training.rollout.local import LocalEngine
from redit_fast.training.rollout.paged import PagedEngine
from redit_fast.training.rollout.server import Server
from redit_fast.training.trainer import train
from tests.packing.models import model_of
from tests.training import processes
from tests.training.fake_vllm import serving
from tests.training.jobs import flags, lines_of
from tests.training.test_stops import assert_equal_checkpoints, timeless

ENGINES = {"local": LocalEngine, "paged": PagedEngine, "server": Server}
SAMPLING = {"group_size": 3, "max_new_tokens": 20, "temperature": 1.0, "top_p": 1.0, "seed": 1, "step": 2}
URL = "http://127.0.0.1:9"  # nobody listens


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    monkeypatch.setattr(report, "write", lambda run: None)


@pytest.fixture
def loaded(model_folder):
    """A model, the tokens that end a completion, and prompts of several lengths."""
    model, tokenizer = policy.load(model_folder)
    prompts = tokenizer([record["prompt"] for record in builtin.records(4, held_out=False, seed=3)])["input_ids"]
    prompts[1] = prompts[1][:5]
    return model, list(range(0, len(tokenizer), 15)), prompts  # so many that some complete


@pytest.fixture(params=ENGINES)
def engine(request, loaded, tmp_path):
    model, ends, _ = loaded
    with ExitStack() as held:
        if request.param == "server":
            fake = held.enter_context(serving(copy.deepcopy(model)))
            rows = model.get_input_embeddings().weight.shape[0]
            opened = Server(fake.url, ends, rows, timeout=30, retries=0, folder=tmp_path)
        else:
            opened = ENGINES[request.param](model, ends)
        held.callback(opened.close)
        yield opened


def sampled(engine, prompts, first=0, **more):
    options = {**SAMPLING, **more}
    return engine.generate(prompts, **options, sample_ids=torch.arange(len(prompts) * options["group_size"]) + first)


def logp_of(model, prompts, rollout, temperature, group_size=3):
    """Of each token by the model's own logits, one sample at a time."""
    found = []
    for i, completion in enumerate(rollout.completions):
        ids = torch.tensor([*prompts[i // group_size], *completion])
        with torch.no_grad():
            logp = torch.log_softmax(model(ids[None]).logits[0, :-1].float() / temperature, -1)
        found.append(logp.gather(1, ids[1:, None])[-len(completion) :, 0])
    return torch.cat(found)


def joined(rows):
    return torch.tensor([value for row in rows for value in row])


def test_completions_log_probs_and_flags_are_those_of_the_model(engine, loaded):
    model, ends, prompts = loaded
    model.train()
    before, attention = torch.get_rng_state(), model.config._attn_implementation
    engine.sync(model)
    for temperature in (1.0, 0.7):
        found = sampled(engine, prompts, temperature=temperature)
        assert torch.equal(torch.get_rng_state(), before) and model.training
        assert model.config._attn_implementation == attention
        lengths = [len(completion) for completion in found.completions]
        assert len(lengths) == len(found.finished) == 12 and found.tokens == sum(lengths)
        assert all(1 <= length <= 20 for length in lengths) and 0 < sum(found.finished) < 12
        for completion, finished in zip(found.completions, found.finished):
            assert (completion[-1] in ends) == finished and not set(completion[:-1]) & set(ends)
            assert finished or len(completion) == 20
        expected = logp_of(model.eval(), prompts, found, temperature)
        model.train()
        torch.testing.assert_close(joined(found.logp), expected, rtol=0, atol=1e-5)
        groups = [found.completions[i : i + 3] for i in range(0, 12, 3)]
        assert all(len(set(map(tuple, group))) > 1 for group in groups)


def test_the_most_likely_tokens_have_no_log_probs_and_are_the_local_engines(engine, loaded):
    model, ends, prompts = loaded
    engine.sync(model)
    found = sampled(engine, prompts, temperature=0.0, group_size=1)
    assert found.logp is None
    assert found == sampled(LocalEngine(model, ends), prompts, temperature=0.0, group_size=1)


def test_a_call_repeats_and_its_random_numbers_are_of_seed_step_and_samples(engine, loaded):
    model, _, prompts = loaded
    engine.sync(model)
    found = sampled(engine, prompts)
    torch.rand(3)
    assert sampled(engine, prompts) == found
    others = [sampled(engine, prompts, **more).completions for more in ({"seed": 2}, {"step": 3}, {"first": 12})]
    assert found.completions not in others and len({str(other) for other in others}) == 3


def test_completions_are_by_the_weights_of_the_last_sync(engine, loaded):
    model, _, prompts = loaded
    for _ in range(2):
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        engine.sync(model)
        found = sampled(engine, prompts)
        expected = logp_of(model.eval(), prompts, found, 1.0)
        torch.testing.assert_close(joined(found.logp), expected, rtol=0, atol=1e-5)


# paged


@pytest.mark.parametrize("kind", ["cohere2", "mistral", "llama"])
def test_paged_knows_the_logits_and_windows_of_other_families(kind):
    model = model_of(kind).eval()
    prompts = [list(range(1, 15)), list(range(5, 30))]
    found = sampled(PagedEngine(model, []), prompts)
    torch.testing.assert_close(joined(found.logp), logp_of(model, prompts, found, 1.0), rtol=0, atol=1e-5)


def test_what_paged_cannot_do_is_one_sentence(loaded):
    model, ends, prompts = loaded
    threads = threading.enumerate()
    with pytest.raises(EngineError, match=r"^rollout paged cannot sample from model .*gpt2\): \S.*[^.]$"):
        sampled(PagedEngine(model_of("gpt2"), []), prompts)
    with pytest.raises(EngineError, match="^rollout paged needs transformers 5.8 or newer"):
        PagedEngine(torch.nn.Linear(2, 2), ends)
    with torch.no_grad():
        model.lm_head.weight[:] = float("nan")
    with pytest.raises(EngineError, match="probability tensor contains either") as error:
        sampled(PagedEngine(model, ends), prompts)
    assert "\n" not in str(error.value) and threading.enumerate() == threads


def test_ctrl_c_ends_pageds_thread_and_puts_the_model_back(loaded):
    model, _, prompts = loaded
    model.train()
    attention, threads = model.config._attn_implementation, threading.enumerate()
    pressed = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
    pressed.start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        sampled(PagedEngine(model, []), prompts, max_new_tokens=900)
    pressed.join()
    assert threading.enumerate() == threads and model.training and model.config._attn_implementation == attention
    assert time.monotonic() - begun < 10


def test_paged_leaves_what_was_there_out_of_its_collections_unless_somebody_has_done_so(loaded, monkeypatch):
    """As conftest.py has."""
    model, _, prompts = loaded
    seen, switch = [], paged._switch_attention
    monkeypatch.setattr(paged, "_switch_attention", lambda *args: seen.append(gc.get_freeze_count()) or switch(*args))
    sampled(PagedEngine(model, []), prompts)
    assert seen[0] > 0 and gc.get_freeze_count() > 0
    gc.unfreeze()
    try:
        sampled(PagedEngine(model, []), prompts)
        assert seen[1] > 0 and gc.get_freeze_count() == 0
    finally:
        gc.freeze()


def test_a_run_by_paged_goes_on_bit_by_bit(settings, tmp_path):
    job = {**settings, "rollout": "paged", "eval_samples": 2, "eval_problems": 2, "steps": 2}
    whole, halves = (config_file.load(overrides={**job, "name": name}) for name in ("whole", "halves"))
    train(whole)
    train(halves.model_copy(update={"steps": 1}))
    train(halves, resume=True)
    for name in ("metrics", "completions"):
        whole, halves = (timeless(tmp_path / f"{run}/{name}.jsonl") for run in ("whole", "halves"))
        if name == "metrics":  # the first run of one step was evaluated after it
            halves[1] = {key: value for key, value in halves[1].items() if "held_out" not in key}
            for line in whole[1:]:
                assert line["sampling/sampling_logp_difference/max"] < 1e-5 and line["sampling/frac_corrected"] == 0
        assert whole == halves
    assert_equal_checkpoints(*(tmp_path / f"{run}/checkpoints/step-000002" for run in ("whole", "halves")))


def test_ranks_sample_by_paged_with_gathered_weights(settings, tmp_path):
    job = {**settings, "rollout": "paged", "strategy": "fsdp2", "steps": 1, "max_completion_length": 8,
           "eval_problems": 0}  # fmt: skip
    codes, printed = processes.finish(processes.start(2, processes.train, flags(job), folder=tmp_path), tmp_path)
    assert codes == [0, 0], printed
    line = lines_of(tmp_path / "run/metrics.jsonl")[1]
    assert line["sampling/sampling_logp_difference/max"] < 1e-5
    samples = lines_of(tmp_path / "run/completions.jsonl")
    assert [row["sample"] for row in samples] == list(range(12)) and len({row["completion"] for row in samples}) > 6


# Runs by an engine that is watched


class Watched:
    """A local engine on a copy of the weights of the last sync, as a server has them."""

    off, off_in_the_trial = 0.0, 0.0  # of its log-probs

    def __init__(self, model, ends):
        self.local = LocalEngine(copy.deepcopy(model), ends)
        self.before = lambda step: None
        self.closed = 0

    def generate(self, prompts, **sampling):
        self.before(sampling["step"])
        found = self.local.generate(prompts, **sampling)
        off = self.off if sampling["step"] < 2**31 else self.off_in_the_trial
        logp = found.logp and [[value + off for value in row] for row in found.logp]
        return type(found)(found.completions, found.finished, logp)

    def sync(self, model):
        self.local.model.load_state_dict(model.state_dict())

    def close(self):
        self.closed += 1


@pytest.fixture
def watched(monkeypatch):
    """The engine of a run whose rollout is a server, once it is there."""
    made = []

    def opened(run, parts, ranks):
        made.append(Watched(parts.model, parts.ends))
        made[-1].before = opened.before
        return made[-1]

    opened.before, opened.made = lambda step: None, made
    monkeypatch.setattr(setup, "_opened", opened)
    return opened


def test_a_weight_above_the_cap_is_the_cap(settings, tmp_path, watched, monkeypatch):
    """The sampler says that its tokens are e times less likely than they are to the policy: all weights are cut to the
    cap, or with a mask to 0. In every update of a rollout, whose old log-probs are those of the first."""
    monkeypatch.setattr(Watched, "off", -1.0)
    common = {"rollout": URL, "gr_gamma": 0, "max_grad_norm": None, "steps": 1, "eval_problems": 0}
    lines = {}
    for name, more in {
        "none": {"correction": "none"},
        "truncate": {},
        "sequence": {"correction": "sequence_truncate", "correction_cap": 3.0},
        "mask": {"correction": "token_mask"},
        "floor": {"correction": "token_mask", "correction_cap": 3.0, "correction_floor": 0.5},
        "padded": {"packing": "off", "micro_batch_size": 3},
    }.items():
        with pytest.warns(UserWarning, match=r"are 1 off the policy's on average.* usual causes: another dtype"):
            train(config_file.load(overrides={**settings, **common, **more, "name": name, "updates_per_rollout": 2}))
        lines[name] = lines_of(tmp_path / name / "metrics.jsonl")[1]
    plain = lines["none"]
    assert "sampling/frac_corrected" not in plain
    for name, weight, corrected in (("truncate", 2.0, 1.0), ("sequence", 3.0, None), ("mask", 0.0, 1.0),
                                    ("floor", 2.718282, 0.0), ("padded", 2.0, 1.0)):  # fmt: skip
        line = lines[name]
        assert line["sampling/sampling_logp_difference/mean"] == pytest.approx(1, rel=1e-5)
        assert line["sampling/sampling_logp_difference/max"] == pytest.approx(1, rel=1e-4)
        if name == "sequence":  # those of one token keep e
            short = sum(len(row["completion"]) == 0 for row in lines_of(tmp_path / name / "completions.jsonl"))
            assert 1 - line["sampling/frac_corrected"] <= short / 12
            continue
        assert line["sampling/frac_corrected"] == corrected
        assert line["sampling/importance_sampling_ratio/mean"] == pytest.approx(weight, rel=1e-4)
        # AdamW's steps are the same for a gradient that is so many times larger, and so is the second update's.
        assert line["grad_norm"] == pytest.approx(weight * plain["grad_norm"], rel=1e-3, abs=1e-9), name


def test_an_engine_without_log_probs_is_refused_where_there_is_a_correction(settings, watched, capsys):
    original = Watched.generate

    def silent(engine, prompts, **sampling):
        found = original(engine, prompts, **sampling)
        return type(found)(found.completions, found.finished)

    job = {**settings, "rollout": URL}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Watched, "generate", silent)
        assert main(["train", *flags(job)]) == 2
        assert "gives no log-probs, which correction token_truncate compares" in capsys.readouterr().err
        assert main(["train", *flags({**job, "name": "without", "correction": "none", "steps": 1})]) == 0


def test_an_engine_of_other_weights_is_refused_before_anything_is_written(
    settings, tmp_path, watched, monkeypatch, capsys
):
    monkeypatch.setattr(Watched, "off_in_the_trial", 0.5)
    assert main(["train", *flags({**settings, "rollout": URL})]) == 2
    assert f"rollout {URL} cannot be used with model" in (said := capsys.readouterr().err) and "0.5 off those" in said
    assert not (tmp_path / "run").exists() and [engine.closed for engine in watched.made] == [1]


def test_a_server_further_off_than_float32_is_warned_of_at_the_start(settings, tmp_path, watched, monkeypatch, capsys):
    def stop(step):
        if step < 2**31:
            raise EngineError("the trial is over")

    watched.before = stop
    for off, said in ((0.13, True), (-0.002, True), (5e-4, False)):
        monkeypatch.setattr(Watched, "off_in_the_trial", off)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert main(["train", *flags({**settings, "rollout": URL, "name": f"off{off}"})]) == 2
        assert capsys.readouterr().err.endswith("redit-fast: the trial is over\n")
        sentences = [str(warning.message) for warning in caught if URL in str(warning.message)]
        assert len(sentences) == said
        assert not said or f"are {abs(off):.2g} off those of the training pass here, where" in sentences[0]


def test_an_engine_that_fails_stops_the_run_after_a_checkpoint(settings, tmp_path, watched, capsys):
    def fails(step):
        if step == 2:
            raise EngineError("the server is away")

    job = {**settings, "rollout": URL, "steps": 4, "checkpoint_every": 10, "rollout_timeout": 50, "correction_cap": 3}
    for name, more in (("behind", []), ("ahead", ["--rollout-ahead", "1"])):
        watched.before = fails
        assert main(["train", *flags({**job, "name": name}), *more]) == 2
        assert capsys.readouterr().err.endswith("redit-fast: the server is away\n")
        assert checkpoint.step_of(checkpoint.newest(tmp_path / name / "checkpoints")) == 2
        assert watched.made[-1].closed == 1
        watched.before = lambda step: None
        for other in ("local", "paged"):
            elsewhere = {**settings, "name": name, "steps": 4, "rollout": other, "rollout_ahead": 0}
            assert main(["train", *flags(elsewhere), "--resume"]) == 2
            assert f"rollout was '{URL}' in" in (said := capsys.readouterr().err) and f"become '{other}' on" in said
        run = flags({"name": name, "out_dir": settings["out_dir"]})
        for words in (["--rollout", "local"], ["--rollout", "paged"], ["--correction", "none"]):
            # Each contradicts a setting of the run that does not matter then.
            assert main(["train", *run, "--resume", *words]) == 2
            setting, value = words[0][2:], "auto" if words[1] == "none" else URL
            sentence = f"{setting} was '{value}' in {tmp_path / name} and cannot become '{words[1]}' on --resume"
            assert capsys.readouterr().err == f"redit-fast: {sentence}\n"
        assert main(["train", *run, "--resume", "--rollout-timeout", "0"]) == 2
        assert "rollout_timeout: got '0', needs a number greater than 0" in capsys.readouterr().err
        moved = {**job, "name": name, "rollout": "http://127.0.0.1:10", "rollout_timeout": 5, "rollout_retries": 0}
        assert main(["train", *flags(moved), *more, "--resume"]) == 0
        lines = lines_of(tmp_path / name / "metrics.jsonl")
        assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
        behind = [line.get("sampling/steps_behind") for line in lines[1:]]
        assert behind == ([0, 1, 0, 1] if name == "ahead" else [None] * 4)  # the resumed process begins anew


def failing_on_one_rank(words):
    """A rank's job, whose engine fails in the second step on the second rank."""

    def opened(run, parts, ranks):
        engine = Watched(parts.model, parts.ends)

        def before(step):
            if ranks.rank == 1 and step == 1:
                raise EngineError("the server is away")

        engine.before = before
        return engine

    setup._opened = opened
    return main(["train", *words])


def test_an_engine_that_fails_on_one_rank_stops_all_with_one_sentence(settings, tmp_path):
    job = {**settings, "rollout": URL, "steps": 3, "checkpoint_every": 10, "rollout_ahead": 1}
    codes, printed = processes.finish(processes.start(2, failing_on_one_rank, flags(job), folder=tmp_path), tmp_path)
    assert codes == [2, 2] and sum(text.count("the server is away") for text in printed) == 1, printed
    assert checkpoint.step_of(checkpoint.newest(tmp_path / "run/checkpoints")) == 1


# One step ahead


def test_ahead_a_steps_samples_are_by_the_weights_of_the_step_before(settings, tmp_path, watched, monkeypatch):
    """The first step of a process has none ahead. What further rounds sample is by the policy itself."""
    (tmp_path / "some.py").write_text(
        "def judge(prompts, completions, **columns):\n"
        "    return [float(len(p) % 3 and len(c) % 5) for p, c in zip(prompts, completions)]\n"
    )
    job = {**settings, "rollout": URL, "rollout_ahead": 1, "checkpoint_every": 1, "keep_checkpoints": None, "steps": 3}
    job |= {"rewards": [f"{tmp_path}/some:judge"], "dynamic_sampling": 1, "prompts_per_step": 4}
    records = []
    original = Watched.generate

    def recorded(engine, prompts, **sampling):
        found = original(engine, prompts, **sampling)
        if sampling["step"] < 2**31:
            records.append((sampling["step"], prompts, found, threading.current_thread() is threading.main_thread()))
        return found

    monkeypatch.setattr(Watched, "generate", recorded)
    train(config_file.load(overrides=job))
    lines = lines_of(tmp_path / "run/metrics.jsonl")[1:]
    first, *others = [line["sampling/steps_behind"] for line in lines]
    assert first == 0 and 0 < min(others) < 1 and all("time/sync" in line for line in lines)
    first, *others = [line["sampling/sampling_logp_difference/mean"] for line in lines]
    assert first < 1e-5 and min(others) > 1e-4
    assert {(step, in_main) for step, *_, in_main in records} == {(0, True)} | {
        (step, in_main) for step in (1, 2) for in_main in (True, False)
    }
    for step, prompts, found, in_main in records:
        model, _ = policy.load(tmp_path / f"run/checkpoints/step-{step if in_main else step - 1:06d}")
        expected = logp_of(model, prompts, found, 1.0, group_size=4)
        torch.testing.assert_close(joined(found.logp), expected, rtol=0, atol=1e-5)


def test_ctrl_c_does_not_wait_for_what_runs_ahead(settings, tmp_path, watched, capsys):
    held = threading.Event()

    def silent(step):
        if step == 1 and threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGINT)
            held.wait(60)

    watched.before = silent
    begun = time.monotonic()
    job = {**settings, "rollout": URL, "rollout_ahead": 1, "steps": 3, "checkpoint_every": 10}
    assert main(["train", *flags(job)]) == 130
    assert time.monotonic() - begun < 40 and "stopped after step" in capsys.readouterr().err
    held.set()
    watched.before = lambda step: None
    assert main(["train", *flags(job), "--resume"]) == 0


def test_what_a_thread_raises_is_raised_where_it_is_taken():
    ahead = Ahead()
    assert not ahead.begun
    ahead.begin(lambda: 7)
    ahead.wait()
    assert ahead.begun and ahead.take() == 7 and not ahead.begun
    ahead.begin(lambda: 1 / 0)
    ahead.wait()
    with pytest.raises(ZeroDivisionError):
        ahead.take()
    with pytest.raises(RuntimeError, match="nothing has begun"):
        ahead.take()


def test_the_engine_of_a_run_is_what_its_config_says(settings, loaded):
    model, ends, _ = loaded
    parts = type("Parts", (), {"model": model, "ends": ends, "base": None})
    for name, kind in ENGINES.items():
        rollout = URL if kind is Server else name
        assert type(setup._opened(config_file.load(overrides={**settings, "rollout": rollout}), parts, Ranks())) is kind
