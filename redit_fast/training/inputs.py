"""What a run was started with, by content: its data, start model, reward modules and models, kept in inputs.json.

The settings name these files; a run that goes on with the same settings on other files is another run.
"""

from __future__ import annotations

import ast
import hashlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from redit_fast.training import builtin, data_files
from redit_fast.training.config import TrainConfig
from redit_fast.training.config_file import module_file
from redit_fast.training.config_values import is_url, loaded_reward
from redit_fast.training.data_names import hub_of
from redit_fast.training.reward_model.config import RewardModelConfig
from redit_fast.training.rewards import answers, math_child
from redit_fast.training.rewards.user_code import INSTALLED, source_of

Inputs = dict[str, dict[str, str]]  # {kind: {file: its content in short}}
PYTHON = "from Python"  # a kind: what `train` was given beside its config
END = 2**20  # bytes at either end of a weights file
MOST_HEADER = 100_000_000  # bytes that safetensors allows; what a file that is none claims may be all of it
# What transformers reads of a model's folder besides the weights.
DESCRIPTIONS = (
    "config.json", "generation_config.json", "*.safetensors.index.json", "tokenizer*", "special_tokens_map.json",
    "added_tokens.json", "vocab*", "merges.txt", "*.model", "*.jinja", "chat_template.json", "*.vocab", "*.tiktoken",
    "tekken.json", "bpe.codes", "additional_chat_templates/*.jinja", "adapter_config.json",
)  # fmt: skip


def of(config: TrainConfig, task: str | None = None, hook: bool = False) -> Inputs:
    """Of every file that the run reads; a model that is not at hand has none. Of a task and a hook from Python that
    they were there: what they are made of their code knows."""
    names = ([] if task is None else [f"task {task}"]) + ["advantages_hook"] * hook
    given = {PYTHON: dict.fromkeys(names, "not known")} if names else {}
    if task is not None:
        return given
    found: Inputs = {"reward module": {}} | given
    for name in config.rewards:
        if loaded_reward(name) is None:
            for module, file in _sources(name).items():
                found["reward module"][module] = _digest(file, f"reward module {file}")
    if config.judge_template is not None:
        template = config.judge_template
        found["judge_template"] = {template: _digest(Path(template), f"judge_template {template}")}
    if config.model is None:  # builtin.py makes the demo's model and data
        demo = _digest(Path(builtin.__file__), "the demo")
        return found | {"the demo": {builtin.__name__: demo}} | _models(config)
    return found | {"data": _data_of(config)} | _models(config)


def of_pairs(config: RewardModelConfig) -> Inputs:
    """The same of a reward model's training."""
    return {"data": _data_of(config)} | _models(config)


def completed(found: Inputs, config: TrainConfig | RewardModelConfig) -> Inputs:
    """With the models of the hub that were not at hand before they were loaded, which has brought them."""
    return found | {kind: files | found[kind] for kind, files in _models(config).items()}


def _models(config: TrainConfig | RewardModelConfig) -> Inputs:
    found: Inputs = {}
    for name in config.rewards if isinstance(config, TrainConfig) else ():
        if (loaded := loaded_reward(name)) and not is_url(loaded[1]):
            found.setdefault("reward model", {}).update(_model(loaded[1]))
    if config.model is not None:
        found["model"] = _model(config.model)
    return found


def _data_of(config: TrainConfig | RewardModelConfig) -> dict[str, str]:
    return {source: _data(source) for source in (config.data, config.eval_data) if source is not None}


def checked(now: Inputs, run: Path, *, accept_changed: bool, adapters: bool = False) -> Inputs:
    """What `run` is to go on with: `now`, which is what it began with, unless a change is accepted.

    Warns where that is not known: a run of version 0.1, a start model that is not at hand and that its checkpoints, for
    they are no `adapters`, have all of.

    Raises:
        ValueError: one that has changed, by name.
    """
    try:
        before = json.loads((run / "inputs.json").read_text("utf-8"))
    except FileNotFoundError:
        warnings.warn(f"{run} has no inputs.json: its data, rewards and model are taken as unchanged", stacklevel=2)
        return now
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{run / 'inputs.json'}: malformed: {error}") from None
    if not isinstance(before, dict) or not all(isinstance(files, dict) for files in before.values()):
        raise ValueError(f"{run / 'inputs.json'}: malformed: needs objects of files in an object")
    if before.get(PYTHON, {}).keys() != now.get(PYTHON, {}).keys():
        told = " and ".join(before.get(PYTHON, ["no task and no advantages_hook"]))
        raise ValueError(
            f"{run} began with {told} from Python, and goes on with the same in train(config, resume=True)"
        )
    if before.keys() != now.keys():
        raise ValueError(f"{run / 'inputs.json'}: malformed: needs the kinds of input {', '.join(now)}")
    if before.get("model") and not now["model"]:
        if not adapters:
            warnings.warn(
                f"the start model of {run} is not at hand, so whether it has changed is not known; the run goes on "
                "from its checkpoint, which has all of it",
                stacklevel=2,
            )
        now = now | {"model": before["model"]}
    for kind, files in () if accept_changed else before.items():
        for name in sorted(files.keys() | now[kind].keys()):
            if files.get(name) != now[kind].get(name):
                what = "is new" if name not in files else "is gone" if name not in now[kind] else "has changed"
                raise ValueError(
                    f"{kind} {name} {what} since {run} began: put back what it was, or go on with "
                    "--accept-changed-inputs"
                )
    return now


def _sources(reward: str) -> dict[str, Path]:
    """{module: its file}: that of a reward function, the packages that it is in, and what their import statements name
    of its own folder or, where that is of installed packages, of its own package; none where loading it will say so."""
    file = source_of(reward)
    if file is None:
        return {}
    if ":" not in reward:
        helper: Any = math_child if reward == "math" else answers
        return {reward: file, helper.__name__: Path(helper.__file__)}
    path = reward.rpartition(":")[0].removesuffix(".py")
    module = path.rpartition("/")[2]
    here, own = path.removesuffix(module), module.partition(".")[0]
    found = {path: file}
    if own == "redit_fast":
        return found
    root = file.parents[module.count(".") + (file.name == "__init__.py")]
    installed = str(root).startswith(INSTALLED)
    seen, ahead = set(), [module]
    while ahead:
        name = ahead.pop()
        if name in seen or name.partition(".")[0] == "redit_fast" or (installed and name.partition(".")[0] != own):
            continue
        seen.add(name)
        if source := file if name == module else module_file(root, name):
            found[here + name] = source
            ahead += _imported(source, name)
        if "." in name:
            ahead.append(name.rpartition(".")[0])
    return found


def _imported(file: Path, module: str) -> Iterator[str]:
    """The modules, and names that may be modules, in the import statements of a file."""
    try:
        nodes = list(ast.walk(ast.parse(file.read_bytes())))
    except (OSError, SyntaxError, ValueError, RecursionError):  # loading it will say so
        return
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *filter(None, [node.module])]
            yield from (".".join([*base, name.name]) for name in node.names)


def weights_of(name: str) -> dict[str, str]:
    """{file: its content in short} of what adapters depend on: a model's weights and config.json, or for one of the hub
    its commit."""
    found = _model(name)
    files = {Path(file).name: content for file, content in found.items()
             if file.endswith(".safetensors") or Path(file).name == "config.json"}  # fmt: skip
    return files or found


def _model(name: str) -> dict[str, str]:
    folder = Path(name).expanduser() if name.startswith("~/") else Path(name)
    if folder.is_dir():
        weights = {str(file): _weights(file) for file in folder.glob("*.safetensors") if file.is_file()}
        files = {file for pattern in DESCRIPTIONS for file in folder.glob(pattern) if file.is_file()}
        return weights | {str(file): _digest(file, f"model {file}") for file in files}
    try:
        cached = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # the path of a folder that is gone
        return {}
    return {name: f"commit {Path(cached).parent.name}"} if isinstance(cached, str) else {}


def _data(source: str) -> str:
    if (hub := hub_of(source)) is not None:
        return f"commit {data_files.commit_of(source, hub)}"
    return _digest(Path(source), f"data {source}")


def _weights(file: Path) -> str:
    """By its size, its safetensors header and its ends: to read 15 GB takes a minute."""
    size = file.stat().st_size
    with file.open("rb") as read:
        header = read.read(min(size, MOST_HEADER, int.from_bytes(read.read(8), "little")))
        read.seek(0)
        first = read.read(END)
        read.seek(max(0, size - END))
        digest = hashlib.sha256(header + first + read.read(END))
    return f"{size} bytes, sha256 of header and ends {digest.hexdigest()}"


def _digest(file: Path, what: str) -> str:
    try:
        data_files.check_regular(file, what)
        with file.open("rb") as read:
            return f"sha256 {hashlib.file_digest(read, 'sha256').hexdigest()}"
    except OSError as error:
        raise ValueError(f"{what}: {error.strerror}") from None
