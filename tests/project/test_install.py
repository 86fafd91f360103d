"""What an installation promises, on real builds of a clean copy of the sources (pip reads its index for setuptools)."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from email.parser import Parser
from importlib.metadata import distribution
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from redit_fast.extras import MODULES
from tests import ROOT
from tests.project.pages import PAGES, fenced

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]

GENERATED = (".git", ".venv*", "build", "dist", "runs", "*.egg-info", "__pycache__", "*.so", ".*_cache", ".benchmarks")
PYTHON = (sys.executable, "-S")  # without the import hooks of .pth files, an editable install's among them
NO_COMPILER = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++"}
WHERE = """
import importlib.util, redit_fast
print(redit_fast.__file__, importlib.util.find_spec("redit_fast.kernels.element").origin)
"""
LINKED = ("kernels", "benchmarks")  # folders that are packages of redit_fast
SENTENCE = "redit_fast._cpu was not built; install a C++17 compiler (g++)"


def run(*command, cwd, **env):
    """Standard output; both streams in the failure when the command fails."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "REDIT_FAST_BACKEND")}
    clean |= PYPROJECT["tool"]["cibuildwheel"]["environment"]  # the wheel is built as those that are published
    done = subprocess.run([str(word) for word in command], cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python(script, cwd, **env):
    return run(*PYTHON, "-c", script, cwd=cwd, **env).split()


def beside(folder):
    """The package in `folder` and the libraries of this environment, without its editable install of the package."""
    return {"PYTHONPATH": f"{folder}{os.pathsep}{sysconfig.get_path('purelib')}"}


def checkout(folder):
    return Path(shutil.copytree(ROOT, folder, symlinks=True, ignore=shutil.ignore_patterns(*GENERATED)))


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return checkout(tmp_path_factory.mktemp("clean") / "source")


@pytest.fixture(scope="module")
def dist(source):
    """An sdist, and the wheel that pip builds from it in an isolated environment without torch, as cibuildwheel does:
    `run` has its settings."""
    folder = source.parent / "dist"
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, cwd=source)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, only(folder, "*.tar.gz"), cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist):
    return only(dist, "*.whl")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel alone in an empty folder, for PYTHONPATH beside the torch that runs these tests."""
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def pure(tmp_path_factory):
    """The same without a compiler, built beside a `torch` that raises when it is imported."""
    folder = tmp_path_factory.mktemp("pure")
    (folder / "poison" / "torch").mkdir(parents=True)
    (folder / "poison" / "torch" / "__init__.py").write_text("raise RuntimeError('the build imported torch')\n")
    poison = NO_COMPILER | {"PYTHONPATH": str(folder / "poison")}
    assert python("try: import torch\nexcept RuntimeError as e: print(e)", folder, **poison)[-1] == "torch"
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder)
    run(*build, cwd=checkout(folder / "source"), **poison)
    wheel = only(folder, "*.whl")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder / "target", wheel, cwd=folder)
    return wheel, folder / "target"


def modules(root):
    return {path.relative_to(root).as_posix() for path in root.rglob("*.py")}


def test_the_wheel_holds_the_package_the_kernels_and_the_compiled_module(wheel, source):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        kernel = archive.read("redit_fast/kernels/element.py")
    expected = {path.relative_to(source).as_posix() for path in (source / "redit_fast").rglob("*") if path.is_file()}
    expected |= {f"redit_fast/{folder}/{name}" for folder in LINKED for name in modules(source / folder)}
    expected |= {f"redit_fast/benchmarks/{name}" for name in ("report.html.j2", "lengths.json")}
    expected |= {f"redit_fast/examples/word_problems.{kind}" for kind in ("jsonl", "yaml")}
    assert {"redit_fast/py.typed", "redit_fast/training/report/page.html.j2"} < expected
    assert {name for name in names if name.startswith("redit_fast/") and not name.endswith(".so")} == expected
    assert kernel == (source / "kernels" / "element.py").read_bytes()
    assert any(name.startswith("redit_fast/_cpu.") for name in names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"redit_fast"}


def test_the_sdist_holds_what_a_build_needs_docs_examples_and_benchmarks(dist, source):
    with tarfile.open(only(dist, "*.tar.gz")) as archive:
        names = {member.name.split("/", 1)[-1] for member in archive.getmembers() if member.isfile()}
    needed = {path.relative_to(source).as_posix() for path in (source / "csrc").rglob("*") if path.is_file()}
    needed |= {path.relative_to(source).as_posix() for path in (source / "redit_fast").rglob("*") if path.is_file()}
    needed |= {f"{folder}/{name}" for folder in LINKED for name in modules(source / folder)}
    for folder in ("docs", "examples", "benchmarks"):
        needed |= {path.relative_to(source).as_posix() for path in (source / folder).rglob("*") if path.is_file()}
    needed |= {
        "setup.py",
        "setup_cuda.py",
        "pyproject.toml",
        "LICENSE",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "mkdocs.yml",
    }
    assert needed <= names


def test_the_wheel_runs_beside_the_torch_that_is_there(installed, tmp_path):
    script = f"""{WHERE}
import torch
if importlib.util.find_spec("triton"): import redit_fast.kernels.element
with redit_fast.use_backend("cpu"): redit_fast.group_advantages(torch.rand(8), group_size=4)
"""
    package, kernel = python(script, tmp_path, **beside(installed))
    assert Path(package).is_relative_to(installed) and Path(kernel).is_relative_to(installed)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads ELF files and /proc")
def test_the_compiled_module_links_no_torch_and_no_openmp_and_keeps_denormals(installed, tmp_path):
    module = only(installed / "redit_fast", "_cpu.*.so")
    libraries = run("readelf", "-d", module, cwd=tmp_path)
    assert "NEEDED" in libraries and not re.search(r"NEEDED.*lib(torch|c10|gomp|omp|iomp|cudart)", libraries)
    script = """
import re, torch, redit_fast._cpu
x = float("1e-308")
print(redit_fast._cpu.__file__, x / 16 > 0)
paths = set(re.findall(r"/\\S+", open("/proc/self/maps").read()))
print(*[path for path in paths if re.search(r"lib(gomp|omp|iomp5)[-.\\w]*\\.so", path)])
"""
    loaded, denormals, *openmp = python(script, tmp_path, **beside(installed))
    assert loaded == str(module) and denormals == "True"
    assert len(openmp) == 1 and "/torch" in openmp[0]


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86-64 registers")
def test_the_compiled_module_needs_no_more_than_x86_64_outside_dispatched_functions(installed, tmp_path):
    """AVX (any v... instruction: also on xmm it ends a process without AVX) only in symbols that say so; a clone
    (.constprop, .isra, ._omp_fn) keeps the name, and in a stripped file everything would stand under .text and fail."""
    code = run("objdump", "-d", "--no-show-raw-insn", only(installed / "redit_fast", "_cpu.*.so"), cwd=tmp_path)
    assert stray_avx(code) == {}
    uses = {level: 0 for level in ("_avx2", "_avx512")}
    for symbol, body in functions(code):
        for level, register in (("_avx2", "%ymm"), ("_avx512", "%zmm")):
            uses[level] += level in symbol and register in body
    assert all(uses.values())


def functions(code):
    return re.findall(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", code, re.M)


def stray_avx(code):
    """{symbol: first AVX instruction} of the functions that may not hold it."""
    found = {}
    for symbol, body in functions(code):
        forbidden = (
            r"%zmm|%[xy]mm(?:1[6-9]|2\d|3[01])\b|%k[0-7]" if "_avx2" in symbol else r"\sv[a-z]\w+\s|%[yz]mm|%k[0-7]"
        )
        if "_avx512" not in symbol and (match := re.search(f".*(?:{forbidden}).*", body)):
            found[symbol] = match.group().strip()
    return found


@pytest.mark.parametrize(
    ("symbol", "instruction"),
    [("sum", "vaddps %xmm0,%xmm1,%xmm2"), (".text", "vzeroupper "), ("f_avx2", "vaddps %zmm0,%zmm1,%zmm2"),
     ("f_avx2.constprop.0", "kmovw  %k1,%eax"), ("f_avx2", "vaddps %ymm16,%ymm1,%ymm2")],
)  # fmt: skip
def test_the_search_for_avx_finds_each(symbol, instruction):
    line = f"    10:\t{instruction}\n"
    assert set(stray_avx(f"0000000000000010 <{symbol}>:\n{line}")) == {symbol}
    assert stray_avx(f"0000000000000010 <f_avx512.isra.0>:\n{line}") == {}


def test_a_build_without_compiler_and_torch_gives_a_package_that_says_so(pure, tmp_path):
    wheel, target = pure
    with zipfile.ZipFile(wheel) as archive:
        assert not any("_cpu." in name for name in archive.namelist())
    env = beside(target)
    assert SENTENCE in " ".join(run(*PYTHON, "-m", "redit_fast", "info", cwd=tmp_path, **env).split())
    script = """
import redit_fast, torch
print(redit_fast.__file__, len(redit_fast.group_advantages(torch.rand(8), group_size=4).values))
try:
    with redit_fast.use_backend("cpu"): redit_fast.group_advantages(torch.rand(8), group_size=4)
except NotImplementedError as error: print(error)
"""
    package, count, *error = python(script, tmp_path, **env)
    assert Path(package).is_relative_to(target) and count == "8"
    assert SENTENCE in " ".join(error)


def test_an_editable_install_works_without_a_compiler(tmp_path):
    source = checkout(tmp_path / "source")
    venv.create(tmp_path / "venv", with_pip=True)
    bin = tmp_path / "venv" / "bin"
    run(bin / "pip", "install", "-q", "--no-deps", "-e", source, cwd=tmp_path, **NO_COMPILER)
    # The dependencies come from the environment of these tests; a .pth file in it would not be read from here.
    site = run(bin / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    package, kernel = run(bin / "python", "-c", WHERE, cwd=tmp_path).split()
    assert package == str(source / "redit_fast" / "__init__.py")
    assert os.path.samefile(kernel, source / "kernels" / "element.py")
    assert SENTENCE in " ".join(run(bin / "redit-fast", "info", cwd=tmp_path).split())


def test_a_bare_checkout_imports(source):
    package, kernel = python(WHERE, source)
    assert package == str(source / "redit_fast" / "__init__.py")
    assert os.path.samefile(kernel, source / "kernels" / "element.py")


def test_requirements_have_lower_bounds_only_and_installing_replaces_nothing(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(name).decode())
    requirements = [line.split(";")[0].strip() for line in metadata.get_all("Requires-Dist")]
    assert "torch>=2.8" in requirements and not re.search(r"<|==|~=|!=", "\n".join(requirements))
    assert metadata["License-Expression"] == "Apache-2.0" and metadata["Requires-Python"] == ">=3.11"
    versions = (ROOT / "redit_fast" / "__init__.py").read_text()
    assert f'__version__ = "{metadata["Version"]}"' in versions
    plan = ("-m", "pip", "install", "--dry-run", "--no-index", "--no-cache-dir", wheel)
    would_install = re.findall(r"Would install (.*)", run(sys.executable, *plan, cwd=tmp_path))
    assert set(" ".join(would_install).split()) <= {f"redit-fast-{metadata['Version']}"}


def test_importing_loads_nothing_heavy_and_starts_no_gpu(tmp_path):
    script = """
import sys, torch
before = set(sys.modules)
import redit_fast
for name in redit_fast.__all__: getattr(redit_fast, name)
heavy = ("triton", "transformers", "matplotlib", "pydantic", "rich", "yaml", "numpy", "safetensors")
print(torch.cuda.is_initialized(), *[name for name in heavy if name in set(sys.modules) - before])
"""
    assert python(script, tmp_path, **beside(ROOT)) == ["False"]


def locked():
    lines = (ROOT / "tests" / "lock.txt").read_text().split()
    return {canonicalize_name(name): version for name, version in (line.split("==") for line in lines)}


def wanted():
    """What `make` installs, by its lists and pyproject.toml, and with --no-deps."""
    listed = [line for name in ("tests", "docs") for line in (ROOT / name / "packages.txt").read_text().splitlines()]
    needs = [Requirement(line) for line in listed if line and not line.startswith("#")]
    needs += map(Requirement, [*PROJECT["dependencies"], *EXTRAS["train"]])
    return needs, ("setuptools", "pybind11", "verl", "transferqueue")


def tree(needs):
    """{name: distribution} of what is installed here for requirements, and for those of each, to the last."""
    found, todo = {}, list(needs)
    while todo:
        need = todo.pop()
        name = canonicalize_name(need.name)
        if name in found or need.marker and not any(need.marker.evaluate({"extra": x}) for x in ("", *need.extras)):
            continue
        found[name] = distribution(name)
        for line in found[name].requires or ():
            child = Requirement(line)
            if child.marker is None or any(child.marker.evaluate({"extra": x}) for x in ("", *need.extras)):
                todo.append(Requirement(line.split(";")[0]))
    return found


def test_the_lock_has_one_release_of_everything_that_make_asks_for_but_torch():
    needs, alone = wanted()
    names = [canonicalize_name(need.name) for need in needs]
    assert "torch" in names and "torch" not in locked() and "trl" in names and "transformers" in names
    assert {*names, *alone} - {"torch"} <= set(locked())
    for name, need in zip(names, needs):
        assert name == "torch" or need.specifier.contains(locked()[name]), need


@pytest.mark.skipif("PIP_CONSTRAINT" not in os.environ, reason="set by make test, where the releases are locked")
def test_the_lock_holds_for_everything_that_those_need():
    """Of the environment that `make test` made; on a CUDA machine but for what torch brings for it."""
    needs, alone = wanted()
    found = {name: distribution(name).version for name in alone}
    found |= {name: of.version for name, of in tree(needs).items() if name not in found}
    cuda = [r"nvidia-.*|cuda-.*|triton"] if torch.version.cuda else []
    for name in [name for name in found if name == "torch" or any(re.fullmatch(form, name) for form in cuda)]:
        del found[name]
    assert len(found) > 80 and found == {name: locked().get(name) for name in found}


@pytest.fixture(scope="module")
def environment(installed, tmp_path_factory):
    """extra -> the variables of an environment with the wheel, what `pip install "redit-fast[extra]"` brings, and
    nothing else: links to the packages of this one."""

    def of(extra=None):
        folder = tmp_path_factory.mktemp(f"with_{extra}")
        needs = map(Requirement, [*PROJECT["dependencies"], *EXTRAS.get(extra, ())])
        for package in tree(needs).values():
            for top in {file.parts[0] for file in package.files} - {"..", "__pycache__"}:
                if not (folder / top).exists():
                    (folder / top).symlink_to(package.locate_file(top))
        return {"PYTHONPATH": f"{installed}{os.pathsep}{folder}", "CI": "1"}  # TRL sends telemetry otherwise

    return of


@pytest.fixture(scope="module")
def torch_alone(environment):
    return environment()


ALONE = """
import contextlib, importlib, io, json, pkgutil, sys
import redit_fast
from redit_fast import cli, extras

names = {name: str(getattr(redit_fast, name)) for name in redit_fast.__all__}
said = {}
for module in pkgutil.walk_packages(redit_fast.__path__, "redit_fast.", onerror=lambda name: None):
    if not module.name.startswith(("redit_fast.kernels", "redit_fast.backends.triton.", "redit_fast.__main__")):
        try:
            importlib.import_module(module.name)
        except extras.MissingExtra as error:
            said[module.name] = str(error)
commands = "selftest", "info", "info --jsn", "train --config none.yaml", "train --help", "report none", "merge none"
commands += ("generate none", "generate --help", "to-verl none.yaml", "eval none", "sample none a", "plot none")
for words in commands:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(words.split())
    said[words] = [code, err.getvalue(), len(out.getvalue())]
try:
    redit_fast.apply_to(None)
except extras.MissingExtra as error:
    said["apply_to"] = str(error)
print(json.dumps(said))
"""


OPS = """
import torch, redit_fast as rf

for code in CODE: exec(code, {})
logits, targets = torch.randn(2, 3, 5), torch.randint(5, (2, 3))
hidden, weight = torch.randn(2, 3, 4), torch.randn(5, 4)
full, head = rf.token_logp(hidden @ weight.T, targets), rf.linear_logp(hidden, weight, targets)
torch.testing.assert_close(full, head)
grads = torch.zeros(5, 4)
rf.linear_grpo_loss_and_grad_(hidden, weight, targets, torch.ones(2), weight_grad=grads, config=rf.LossConfig())
model, reference = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)
optimizer = rf.GradientRegularizer(torch.optim.SGD(model.parameters(), lr=0.1), gamma=0.1, epsilon=0.1)
model(hidden).square().mean().backward()
if optimizer.perturb(): model(hidden).square().mean().backward()
optimizer.step()
rf.reset_reference(reference, model)
assert torch.equal(reference.weight, model.weight) and grads.abs().sum() > 0
assert rf.estimate_memory(8, 4, 5, torch.float32, True) > 0
"""


def test_with_torch_alone_every_op_runs(torch_alone, tmp_path):
    pages = [PAGES[f"docs/{name}.md"] for name in ("ops", "losses", "peers", "noise", "epsilon")]
    run(*PYTHON, "-c", f"CODE = {[fenced('python', page)[0] for page in pages]!r}" + OPS, cwd=tmp_path, **torch_alone)


def test_with_torch_alone_the_self_test_runs_and_what_needs_more_says_so_in_one_sentence(torch_alone, tmp_path):
    said = json.loads(run(*PYTHON, "-c", ALONE, cwd=tmp_path, **torch_alone).splitlines()[-1])
    assert PYPROJECT["tool"]["cibuildwheel"]["test-command"] == "redit-fast selftest"
    assert said["selftest"][:2] == said["info"][:2] == [0, ""] and said["selftest"][2] > 500 < said["info"][2]
    assert said["info --jsn"] == [2, "redit-fast: unknown flag --jsn, the closest valid one is --json\n", 0]

    def sentence(user, extra, missing):
        return f'{user} needs {missing}, not installed here; run `pip install "redit-fast[{extra}]"`'

    missing = ", ".join(name for name in MODULES["train"] if name != "jinja2")  # torch brings it
    for words in (
        "train --config none.yaml",
        "train --help",
        "report none",
        "merge none",
        "generate none",
        "generate --help",
        "to-verl none.yaml",
        "eval none",
        "sample none a",
        "plot none",
    ):
        assert said[words] == [2, f"redit-fast: {sentence('redit_fast.training', 'train', missing)}\n", 0]
    assert said["redit_fast.training"] == sentence("redit_fast.training", "train", missing)
    for host, missing in (("trl", "trl, transformers"), ("transformers", "transformers"), ("verl", "verl")):
        module = f"redit_fast.integrations.{host}"
        assert said[module] == sentence(module, host, missing)
    assert said["apply_to"] == sentence("apply_to", "transformers", "transformers")
    assert set(said) > {"redit_fast.packing.attention", "redit_fast.integrations.second_pass"}
    assert not {"redit_fast.integrations.openrlhf", "redit_fast.info", "redit_fast.gr.adamw"} & set(said)


def test_the_line_that_is_named_installs_no_other_redit_fast(installed, tmp_path):
    """pip goes on to what the extra brings, and does not ask an index for this package."""
    folders = {"PYTHONPATH": str(installed)}
    plan = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "redit-fast[train]"]
    done = subprocess.run(plan, cwd=tmp_path, env=os.environ | folders, capture_output=True, text=True)
    assert done.returncode == 0 and "Would install" not in done.stdout, done.stderr


def test_an_extra_is_checked_by_what_it_installs():
    imported = {"pyyaml": "yaml", "math-verify": "math_verify"}
    for extra, modules in MODULES.items():
        names = [Requirement(line).name for line in EXTRAS[extra]]
        assert set(modules) <= {imported.get(name, name) for name in names}, extra


def test_the_train_extra_runs_the_demo_and_the_shipped_example(environment, tmp_path):
    there = environment("train")
    command = (*PYTHON, "-m", "redit_fast")
    small = "--steps 1 --warm-start-steps 2 --eval-problems 4 --prompts-per-step 2 --group-size 4".split()
    run(*command, "train", *small, cwd=tmp_path, **there)
    assert (tmp_path / "runs" / "demo" / "report.html").exists()
    (snippet,) = fenced("python", PAGES["docs/metrics.md"])
    assert len(run(*PYTHON, "-c", snippet, cwd=tmp_path, **there).splitlines()) == 2
    run(*command, "example", "word_problems", cwd=tmp_path, **there)
    printed = run(*command, "train", "--config", "word_problems.yaml", "--print-config", cwd=tmp_path, **there)
    assert "numeric_answer" in printed and (tmp_path / "word_problems.jsonl").stat().st_size > 50_000


def test_the_transformers_extra_runs_its_example_which_learns(environment, tmp_path):
    script = """
import json
from examples import transformers_sft
trainer, losses = transformers_sft.main(steps=8, out="run")
print(json.dumps([losses, trainer.state.log_history[0], "forward" in vars(trainer.model)]))
"""
    losses, log, swapped = example(script, environment("transformers"), tmp_path)
    assert losses[-1] < losses[0] - 0.5 and "gr/g1_norm" in log and not swapped


def test_the_trl_extra_runs_its_example_with_dithering_and_gr(environment, tmp_path):
    script = f"""
import json, sys
sys.prefix = {sys.prefix!r}  # of the links' targets: by it dill knows the modules that it need not write
from examples import trl_grpo
trainer, rewards = trl_grpo.main(steps=2, out="run")
print(json.dumps([rewards, trainer.state.log_history[0]]))
"""
    rewards, log = example(script, environment("trl"), tmp_path)
    assert {"dither/reward_std", "dither/advantage_std", "gr/g1_norm", "time/gr_pass2"} <= set(log)
    assert len(rewards) == 2 and log["dither/reward_std"] > log["reward_std"]


def example(script, there, folder):
    """What `script` prints at last, as JSON, with the folder examples/ beside the wheel."""
    (folder / "examples").symlink_to(ROOT / "examples")
    return json.loads(run(*PYTHON, "-c", script, cwd=folder, **there).splitlines()[-1])
