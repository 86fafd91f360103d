"""Config files and flags: what is accepted, and the one sentence that everything else gets."""

import math
import re
import shlex
from decimal import Decimal
from fractions import Fraction

import pytest
from pydantic import BaseModel, Field, ValidationError

from redit_fast import known_names
from redit_fast.training import config, config_errors, config_file, presets
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_file import load


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


OWN = "model: gpt2\ndata: d.jsonl\nrewards: [exact_answer]\n"


def test_the_demo_and_a_model_of_ones_own_have_their_own_defaults(tmp_path):
    demo, own = load(), load(write(tmp_path / "c.yaml", OWN))
    assert (demo.learning_rate, demo.steps) == (presets.DEMO["learning_rate"], presets.DEMO["steps"])
    assert (own.learning_rate, own.steps, own.warm_start_steps) == (5e-6, presets.OWN_MODEL["steps"], 0)
    assert demo.warm_start_steps > 0
    assert all("builtin:" in reward for reward in demo.rewards)
    assert demo.group_size == own.group_size == 8


def test_every_field_has_a_description_and_one_default_at_most_in_each_table():
    for name, field in TrainConfig.model_fields.items():
        assert field.description and "Default:" in config.describe(name)
        tables = (name in presets.DEMO) + (name in presets.OWN_MODEL)
        assert tables == (0 if not field.is_required() else 1 if name == "rewards" else 2), name


def test_overrides_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = write(tmp_path / "c.yaml", "steps: 5\nseed: 7\n")
    both = load(path, {"steps": "9"})
    assert (both.steps, both.seed, both.group_size) == (9, 7, 8)


@pytest.mark.parametrize("text", ["learning_rate: 5e-6", "learning_rate: 0.000005", "learning_rate: '5e-6'"])
def test_a_number_may_be_written_in_any_way(tmp_path, text):
    assert load(write(tmp_path / "c.yaml", text)).learning_rate == 5e-6


LAX = {
    "group_size": [8.0, "8.0", b"8", "1_0", " 8", "8e0", "\uff18", Decimal(8), Fraction(8), True],
    "micro_batch_size": [8.0, "1_0", Decimal(8)],
    "temperature": ["1_0", b"1", Decimal(1), Fraction(1), True, "inf", math.nan, "1e400", 10**400],
    "gr_epsilon": ["1_0", b"1", Decimal(1), True],
    "gr_normalized": [1, 0, "t", "true", "yes", 1.0, None],
    "reward_weights": [["1_0", 1, 1], (1, 1, Decimal(1)), [1, True, 1]],
    "name": [b"x", 5, True],
    "rewards": [[b"exact_answer"]],
    "reward_scales": [["1_0", 1, 1], (1, 1, Decimal(1)), [1, True, 1]],
    "data": ["a\0b.jsonl"],
    "model": ["a\0b"],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in LAX for value in LAX[field]])
def test_a_value_of_another_kind_is_refused_by_name(field, value):
    with pytest.raises(ValueError, match=rf"^{field}(\[0\])?: got .* needs ") as error:
        load(None, {field: value})
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=field):
        TrainConfig(**{field: value})


def test_a_value_is_taken_as_it_is_written():
    read = load(None, {"group_size": "+8", "seed": "007", "temperature": "5e-1", "learning_rate": 1, "name": "1_0"})
    assert (read.group_size, read.seed, read.temperature, read.learning_rate, read.name) == (8, 7, 0.5, 1.0, "1_0")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('data: "a\\0b.jsonl"', "c.yaml:1: data: got 'a\\x00b.jsonl', needs text without null characters"),
        ("gr_normalized: 1", "c.yaml:1: gr_normalized: got 1, needs true or false"),
        ("stepz: 3", "c.yaml:1: unknown key 'stepz', the closest valid one is 'steps'"),
        ("seed: 1\n\nlearning-rate: 1e-5", "c.yaml:3: unknown key 'learning-rate', the closest valid one is"),
        ("seed: 1\nsteps: many", "c.yaml:2: steps: got 'many', needs an integer"),
        ("steps: 2.5", "c.yaml:1: steps: got 2.5, needs an integer"),
        ("steps: 0", "c.yaml:1: steps: got 0, needs a number greater than or equal to 1"),
        ("steps: null", "c.yaml:1: steps: got None, needs an integer"),
        ("steps: true", "c.yaml:1: steps: got True, needs a number or quoted text, not a truth value"),
        ("steps: {a: 1}", "c.yaml:1: steps: got {'a': 1}, needs an integer"),
        ("name: no", "c.yaml:1: name: got False, needs a number or quoted text, not a truth value"),
        ("name: ../x", "c.yaml:1: name: got '../x', needs one printable path component"),
        ("name: ..", "c.yaml:1: name: got '..', needs one printable path component"),
        ('name: "a\\n"', "c.yaml:1: name: got 'a\\n', needs one printable path component"),
        ("name: ' '", "c.yaml:1: name: got ' ', needs one printable path component"),
        ("learning_rate: .inf", "c.yaml:1: learning_rate: got inf, needs a finite number"),
        ("group_size: 1", "c.yaml:1: group_size: got 1, needs a number greater than or equal to 2"),
        ("seed: -1", "c.yaml:1: seed: got -1, needs a number greater than or equal to 0"),
        (f"seed: {2**64}", "c.yaml:1: seed: got 18446744073709551616, needs a number less than 18446744073709551616"),
        (
            "dither_dead_groups: drop",
            "c.yaml:1: dither_dead_groups: got 'drop', needs 'apply', 'skip', 'center_only' or 'only'",
        ),
        ("rewards: exact_answer", "c.yaml:1: rewards: got 'exact_answer', needs a list"),
        ("rewards: []", "c.yaml:1: rewards: got [], needs at least 1 item"),
        ("rewards: [a, 3]", "c.yaml:1: rewards[1]: got 3, needs text"),
        ("data: x.jsonl", "c.yaml:1: data: the embedded demo has its own"),
        ("model: gpt2", "rewards: training a model of your own needs at least one reward function"),
        ("model: gpt2\nrewards: [a]", "data: training a model of your own needs a JSONL or Parquet file, or hub:"),
        (OWN + "warm_start_steps: 3", "c.yaml:4: warm_start_steps: got 3, only the embedded demo has a warm start"),
        (OWN + "reward_weights: [1, 2]", "c.yaml:4: reward_weights: got 2 for 1 reward functions"),
        ("seed: 1\nloss_type: dro", "c.yaml:2: loss_type: dro needs a dro_beta"),
        ("gr_epsilon: 0", "c.yaml:1: gr_epsilon: got 0, needs a number greater than 0"),
        ("gr_epsilon: auot", "c.yaml:1: gr_epsilon: got 'auot', needs a number or 'auto'"),
        ("epsilon: 1e-3", "c.yaml:1: unknown key 'epsilon': GR's step is 'gr_epsilon', a clip range is 'clip_low' and"),
        ("seed: 1\nlr: 1e-5", "c.yaml:2: unknown key 'lr', it is 'learning_rate' here"),
        (
            "seed: 1\nuse_vllm: true",
            "c.yaml:2: unknown key 'use_vllm': completions come from 'rollout', a vLLM server by its URL",
        ),
        ("vllm_enable_sleep: true", "c.yaml:1: unknown key 'vllm_enable_sleep', it is 'rollout_sleep' here"),
        ("vllm_sync_backend: nccl", "the server of 'rollout' gets weights as files, nccl and ipc are not used until"),
        ("gr_gamma: 1\ngamma: 1", "c.yaml:2: gamma is another name of gr_gamma, which is set too"),
        ("seed: 1\ngamma: -1", "c.yaml:2: gr_gamma: got -1, needs a number greater than or equal to 0"),
        ("loss_type: vespo\nclip_low: 0.1", "c.yaml:2: clip_low: got 0.1, loss_type vespo has no clip range"),
        ("clip_high: 0.3\nloss_type: gpg", "c.yaml:1: clip_high: got 0.3, loss_type gpg has no clip range"),
        ("clip_low: -0.1", "c.yaml:1: clip_low: got -0.1, needs a number greater than or equal to 0"),
        ("dro_beta: 0.1", "c.yaml:1: dro_beta: got 0.1, only loss_type dro uses it"),
        ("loss_type: dro\ndro_beta: 0", "c.yaml:2: dro_beta: got 0, needs a number greater than 0"),
        ("rollout: vllm", "c.yaml:1: rollout: needs local, paged or the URL of a server, http://HOST:PORT or https://"),
        ("rollout: 8000", "c.yaml:1: rollout: got 8000, needs text"),
        (OWN + "rollout: ftp://host", "c.yaml:4: rollout: needs local, paged or the URL of a server"),
        (OWN + "rollout: 'http://:8000'", "c.yaml:4: rollout: needs local, paged or the URL of a server"),
        (OWN + "rollout: http://host:80000", "c.yaml:4: rollout: needs local, paged or the URL of a server"),
        (OWN + "rollout: 'http://[::1'", "c.yaml:4: rollout: needs local, paged or the URL of a server"),
        (OWN + "rollout: 'http://host/a b'", "c.yaml:4: rollout: needs local, paged or the URL of a server"),
        (OWN + "rollout: http://host/v1?key=1", "c.yaml:4: rollout: the URL has a part after ? or #"),
        ("rollout: http://host:8000", "c.yaml:1: rollout: the embedded demo samples by itself"),
        ("rollout_ahead: 2", "c.yaml:1: rollout_ahead: got 2, needs a number less than or equal to 1"),
        (
            "seed: 1\nrollout_ahead: 1",
            "c.yaml:2: rollout_ahead: got 1 with rollout local, which samples in the process",
        ),
        ("rollout: paged\nrollout_ahead: 1", "c.yaml:2: rollout_ahead: got 1 with rollout paged, which samples"),
        ("rollout_timeout: 0", "c.yaml:1: rollout_timeout: got 0, needs a number greater than 0"),
        ("rollout_timeout: 5", "c.yaml:1: rollout_timeout: got 5.0, only a rollout by a server has one"),
        ("rollout_retries: -1", "c.yaml:1: rollout_retries: got -1, needs a number greater than or equal to 0"),
        ("rollout_retries: 0", "c.yaml:1: rollout_retries: got 0, only a rollout by a server has one"),
        ("rollout_sleep: true", "c.yaml:1: rollout_sleep: got True, only a rollout by a server has one"),
        (OWN + "rollout: http://host\nrollout_sleep: 1", "c.yaml:5: rollout_sleep: got 1, needs true or false"),
        (
            OWN + "rollout: http://host\nrollout_ahead: 1\nrollout_sleep: true",
            "c.yaml:6: rollout_sleep: got true with rollout_ahead 1, whose server is at work while a step is trained",
        ),
        ("correction: tis", "c.yaml:1: correction: got 'tis', needs 'auto', 'none', 'token_truncate', 'token_mask',"),
        ("correction_cap: 0", "c.yaml:1: correction_cap: got 0, needs a number greater than 0"),
        ("correction_cap: 3", "c.yaml:1: correction_cap: got 3.0 without a correction, which rollout local has only"),
        ("rollout: paged\ncorrection: none\ncorrection_floor: 0.5", "c.yaml:3: correction_floor: got 0.5 without a"),
        (
            "correction: token_mask\ncorrection_floor: 3",
            "c.yaml:2: correction_floor: got 3.0, needs a number of at most",
        ),
        (
            "correction: token_mask\ncorrection_cap: 0.5",
            "c.yaml:2: correction_cap: got 0.5, correction token_mask needs",
        ),
        ("correction: sequence_mask\ncorrection_floor: 1", "c.yaml:2: correction_floor: got 1.0, correction sequence_"),
        ("rollout: paged\ntop_p: 0.9", "c.yaml:2: top_p: got 0.9 together with correction token_truncate, which"),
        (
            "loss_type: vespo\ncorrection: sequence_mask",
            "c.yaml:2: correction: got sequence_mask, loss_type vespo has a weight of its own",
        ),
        ("steps: 1\nsteps: 2", "c.yaml:2: key 'steps' is there twice"),
        ("3: 1", "c.yaml:1: key 3 is not text"),
        ("- steps", "needs keys and values at its top level"),
        ("steps: [1", "c.yaml:1:10: while parsing a flow sequence, expected ',' or ']'"),
        ("\tsteps: 1", "c.yaml:1:1: while scanning for the next token, found character '\\t' that cannot start any"),
        ("seed: 1\n---\nseed: 2", "c.yaml:2:1: expected a single document in the stream, but found another document"),
        ("name: 2026-13-45", "month must be in 1..12"),
        ("[" * 5000, "recursion"),
    ],
)
def test_a_bad_file_gets_one_sentence_that_names_the_place(tmp_path, text, sentence):
    with pytest.raises(ValueError) as error:
        load(write(tmp_path / "c.yaml", text))
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_a_key_in_the_url_of_a_server_is_refused_and_never_shown(tmp_path):
    plain = ["http://me:s3cret@host:8000", "https://s3cret@host", "http://:s3cret@host", "https://me:s3cret@[::1"]
    hidden = [  # from a look for a user name: escaped, by another character, behind a slash
        "https://me%3as3cret%40host:1", "https://me%253as3cret%2540host", "http://[fe80::1%25s3cret]", "http://s3cret\\h",
        "http://me;s3cret:1", "http://me\uff1as3cret", "http://me:1/s3cret@host:8000", "http://me/s3cret%40host",
        f"http://s3cret{'a' * 64}", "http://s3cret..host", "http://host/?s3cret@host", "http://host?#s3cret",
    ]  # fmt: skip
    for url in plain + hidden:
        for refused in (lambda: load(write(tmp_path / "c.yaml", OWN + f"rollout: '{url}'")),  # noqa: B023
                        lambda: load(None, {"rollout": url}), lambda: TrainConfig(rollout=url)):  # noqa: B023  # fmt: skip
            with pytest.raises(ValueError, match="rollout: ") as error:
                refused()
            assert "s3cret" not in str(error.value)


def test_the_url_of_a_server_has_a_name_or_an_address_for_its_host():
    for url in (
        "http://a_b-c.d.:80",
        "https://10.0.0.7/base/v2",
        "http://[::1]:8000",
        "http://[::ffff:10.0.0.7]",
        "http://xn--bcher-kva:1",
    ):
        assert TrainConfig(model="m", data="d", rewards=["exact_answer"], rollout=url).server == url


def test_the_correction_is_on_where_another_program_or_another_attention_samples():
    own = {"model": "m", "data": "d", "rewards": ["exact_answer"]}
    for rollout, kind in (("local", "none"), ("paged", "token_truncate"), ("https://host/base", "token_truncate")):
        found = load(None, {**own, "rollout": rollout})
        assert found.sampler_correction == kind and (found.server is None) == (not rollout.startswith("http"))
        for chosen in ("none", "sequence_mask"):
            assert load(None, {**own, "rollout": rollout, "correction": chosen}).sampler_correction == chosen
    assert load(None, {"rollout": "paged", "top_p": 0.5, "correction": "none"}).top_p == 0.5


HOSTILE = ["x", "", "\ud800", "1" * 5000, "-1", 0, -1, 2**33, 10.5, math.inf, [], [[]], ["\ud800"], [""], {}, object()]


def test_every_error_that_pydantic_can_have_for_a_setting_has_its_words():
    seen = set()
    for field in TrainConfig.model_fields:
        for value in HOSTILE:
            try:
                TrainConfig(**{field: value})
                continue
            except ValidationError as error:
                seen |= {problem["type"] for problem in error.errors()}
            with pytest.raises(ValueError, match=field) as error:
                load(None, {field: value})
            assert "another value" not in str(error.value) and len(str(error.value).splitlines()) == 1
            assert len(str(error.value)) < 500
    assert seen - {"value_error", "missing"} == set(config_errors.NEEDS)


def test_an_error_that_is_in_no_table_is_told_as_pydantic_tells_it():
    class Even(BaseModel):
        number: int = Field(multiple_of=2)

    with pytest.raises(ValidationError) as error:
        Even(number=3)
    told = "number: got 3, needs another value (Input should be a multiple of 2)"
    assert config_errors.first(error.value) == ("number", told)


def test_an_override_that_is_wrong_is_not_blamed_on_the_file(tmp_path):
    path = write(tmp_path / "c.yaml", "steps: 5")
    with pytest.raises(ValueError, match=r"^steps: got 'x'"):
        load(path, {"steps": "x"})
    with pytest.raises(ValueError, match=r"^unknown key 'stepz'"):
        load(path, {"stepz": 1})


def test_a_missing_file_and_a_file_that_is_not_text(tmp_path):
    with pytest.raises(ValueError, match="config nowhere.yaml: No such file"):
        load("nowhere.yaml")
    (tmp_path / "c.yaml").write_bytes(b"steps: \xff")
    with pytest.raises(ValueError, match=r"config c.yaml: 'utf-8' codec"):
        load("c.yaml")


@pytest.mark.parametrize("value", ["!!timestamp x", "!!bool x", "!!int x", "!!float x", "[1, !!bool x]", "2026-13-45"])
def test_a_yaml_value_that_is_not_what_its_tag_says_is_told_its_place(tmp_path, value):
    path = write(tmp_path / "c.yaml", f"seed: 1\nname: {value}")
    reasons = "the value is not what its tag says|invalid literal|could not convert|month must be"
    with pytest.raises(ValueError, match=rf"c.yaml:2:7: ({reasons})"):
        config_file.load(path)


def test_yaml_tags_build_no_objects(tmp_path):
    path = write(tmp_path / "c.yaml", "name: !!python/object/apply:os.mkdir [made_by_yaml]")
    with pytest.raises(ValueError, match=r"c.yaml:1:7: could not determine a constructor for the tag .*os.mkdir"):
        load(path)
    assert not (tmp_path / "made_by_yaml").exists()


HARD = {
    "name": "a $x$ <b> 'q' \"d\"",
    "system_prompt": " two\nlines: # no comment\n\ttab \u2028 \x85 😀\n",
    "learning_rate": 1e-7,
    "max_grad_norm": None,
    "gr_normalized": True,
    "reward_weights": [1.0, -0.5, 1e-9],
    "reward_scales": [1.0, 0.5, 1e-9],
    "seed": 2**64 - 1,
}


def test_the_printed_yaml_loads_back_to_the_same_config(tmp_path):
    for settings in ({}, HARD):
        original = load(None, settings)
        printed = original.to_yaml()
        assert load(write(tmp_path / "c.yaml", printed)) == original
        lines = printed.splitlines()
        assert all(f"{name}:" in printed for name in TrainConfig.model_fields)
        assert sum(line.startswith("# ") for line in lines) >= len(TrainConfig.model_fields)


def test_the_json_of_a_run_is_a_config(tmp_path):
    import json

    original = load(None, HARD)
    for text in (original.model_dump_json(), json.dumps(original.model_dump()), original.model_dump_json(indent=2)):
        assert load(write(tmp_path / "config.json", text)) == original
    for text, sentence in (
        ('{"steps": 1, "steps": 2}', "config.json: key 'steps' is there twice"),
        ('{"steps": {"a": 1, "b": {"c": 2, "c": 2}}}', "config.json: key 'c' is there twice"),
        ('{"steps": }', "config.json:1:11: Expecting value"),
        ("[1]", "needs keys and values"),
        ('{"steps": "x"}', "config.json: steps: got 'x'"),
    ):
        with pytest.raises(ValueError) as error:
            load(write(tmp_path / "config.json", text))
        assert sentence in str(error.value)


OLD = {"gamma": 0.5, "epsilon": 0.25, "pass2_ratio": "pass1", "dead_groups": "skip"}
NEW = {"gr_gamma": 0.5, "gr_epsilon": 0.25, "gr_pass2_ratio": "pass1", "dither_dead_groups": "skip"}


def test_a_run_of_version_0_1_is_read_under_the_new_names(tmp_path, recwarn):
    """A run's own config.json is the one beside its metrics.jsonl, which is there from the start."""
    import json

    written = load().model_dump()
    for new in (*NEW, "clip_low", "clip_high"):
        del written[new]
    path = write(tmp_path / "runs" / "old" / "config.json", json.dumps({**written, **OLD}))
    write(path.with_name("metrics.jsonl"), "")
    assert load(path) == load(None, NEW) and load(path, {"steps": 3}) == load(None, {**NEW, "steps": 3})
    assert not recwarn
    assert load(path, {"gr_gamma": 0}).gr_gamma == 0
    with pytest.raises(ValueError, match="^unknown key 'epsilon': GR's step is"):
        load(path, {"epsilon": 0.1})
    path.with_name("metrics.jsonl").unlink()
    with pytest.raises(ValueError, match="config.json: unknown key 'epsilon': GR's step is"):
        load(path)


def test_an_old_name_in_a_file_is_taken_and_answered_with_the_new_one(tmp_path):
    path = write(tmp_path / "c.yaml", "gamma: 0.5\ndead_groups: skip\npass2_ratio: pass1\n")
    with pytest.warns(UserWarning) as caught:
        loaded = load(path)
    assert [str(warning.message) for warning in caught] == [
        f"{path}:1: gamma is called gr_gamma now",
        f"{path}:2: dead_groups is called dither_dead_groups now",
        f"{path}:3: pass2_ratio is called gr_pass2_ratio now",
    ]
    assert loaded == load(None, {**NEW, "gr_epsilon": 1e-3})


def test_every_name_of_another_trainer_leads_to_settings_that_exist():
    for name, meant in known_names.MEANT.items():
        assert name not in TrainConfig.model_fields and name not in known_names.RENAMED
        for spell in (known_names.flag, repr):
            said = known_names.hint(name, TrainConfig.model_fields, spell)
            fields = re.findall(r"\{(\w+)\}", meant)
            assert all(field in TrainConfig.model_fields and spell(field) in said for field in fields)
            assert "{" not in said and said.startswith((": ", ", it is "))
            assert said == known_names.hint(name.upper().replace("_", "-"), TrainConfig.model_fields, spell)
    trl = "lr num_generations kl_coef lora save_steps per_device_train_batch_size max_steps num_train_epochs bf16"
    assert set(trl.split()) < set(known_names.MEANT)


def test_the_command_of_a_config_gives_it_back(tmp_path):
    from redit_fast import cli, commands

    own = {"model": "gpt2", "data": "my data.jsonl", "rewards": ["exact_answer", "xml_format", "gsm8k_int"]}
    for settings in ({}, {**HARD, "reward_weights": None, "reward_scales": None}, {**own, "steps": 3}, {**own, **HARD},
                     {"name": "-x", "out_dir": "-o", "system_prompt": "-s"},
                     {**own, "reward_weights": [1.0, -1e-9, -2.5e20], "model": "-m", "data": "--d"},
                     {**NEW, "clip_low": 0.1, "clip_high": 0.3}, {"clip_high": 0.0},
                     {**own, "preset": "kl", "gr_gamma": 1e-3, "advantage_scale": "none",
                      "gr_epsilon": "auto"}):  # fmt: skip
        original = load(None, settings)
        words = shlex.split(original.command())
        assert words[:2] == ["redit-fast", "train"]
        parser = cli._Parser()
        cli._add_train_flags(parser)
        assert load(None, commands.settings(parser.parse_args(words[2:]))) == original
    assert load().command() == "redit-fast train"
    assert load(None, {"steps": 3}).command(name="x") == "redit-fast train --name x --steps 3"


def test_paths_of_a_file_are_looked_up_in_the_current_folder_and_then_in_its_own(tmp_path):
    text = "model: tiny\ndata: d.jsonl\nrewards: [mine:f, pkg.mine:f, xml_format, other:g]"
    path = write(tmp_path / "sub" / "c.yaml", text)
    for name in ("sub/d.jsonl", "sub/tiny/config.json", "sub/mine.py", "sub/pkg/mine.py"):
        write(tmp_path / name, "")
    found = load("sub/c.yaml")
    assert (found.model, found.data) == ("sub/tiny", "sub/d.jsonl")
    assert found.rewards == ["sub/mine:f", "sub/pkg.mine:f", "xml_format", "other:g"]
    for name in ("d.jsonl", "mine.py", "tiny/config.json"):
        write(tmp_path / name, "")
    found = load(path)
    assert (found.model, found.data) == ("tiny", "d.jsonl")
    assert found.rewards[:2] == ["mine:f", f"{path.parent}/pkg.mine:f"]
    assert load("sub/c.yaml", {"rewards": ["pkg.mine:h"], "data": "other.jsonl"}).rewards == ["sub/pkg.mine:h"]


def test_an_unnamed_run_takes_the_first_free_name(tmp_path):
    assert load().with_name().name == "demo"
    write(tmp_path / "runs" / "demo" / "config.json", "{}")
    write(tmp_path / "runs" / "demo-2" / "config.json", "{}")
    assert load().with_name().name == "demo-3"
    assert load(None, {"name": "demo"}).with_name().name == "demo"
    own = load(None, {"model": "Qwen/Qwen2.5-0.5B", "data": "d.jsonl", "rewards": ["xml_format"]})
    assert own.with_name().name == "Qwen2.5-0.5B"


def test_a_run_is_named_after_the_folder_of_its_model_however_that_is_written(tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")

    def name(model):
        return load(None, {"model": model, "data": "d.jsonl", "rewards": ["xml_format"]}).with_name().name

    for model, expected in (
        ("..", "here"), (".", "below"), ("/", "run"), ("tiny/", "tiny"), ("../tiny/.", "tiny"), ("a/../tiny", "tiny"),
        ("~/tiny", "tiny"), ("runs/demo/checkpoints/step-000010/", "demo-step-000010"), ("x" * 200, "x" * 200),
        ("../checkpoints/last", "here-last"),
    ):  # fmt: skip
        assert name(model) == expected
    for model in ("x" * 201, "a\\b", "\u00e4" * 101):
        with pytest.raises(ValueError, match="is none that a run can have: give a --name"):
            name(model)
