"""What setup.py does with csrc/cuda: finds nvcc, compiles every .cu, and says what the module's host code needs.

It runs nvcc and no other program, and needs no GPU and no driver. docs/build_cuda.md has its settings, and what to do
about each of its sentences.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools.errors import CompileError

FLAGS = ["-std=c++17", "-O3", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xfatbin=-compress-all"]
ARCHITECTURES = "8.0 9.0a 10.0+PTX"  # plain 9.0 has no wgmma; PTX is for devices that come later
OLDEST = (12, 4)
# A CUDA runtime of its own, of which the module shows no symbol: torch has another one in the same process.
LINK = ["-lcudart_static", "-lpthread", "-ldl", "-lrt", "-Wl,--exclude-libs,ALL"]
READ_BY_NVCC = ("NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "NVCC_CCBIN")
OBJECTS = Path("build", "cuda")  # not setuptools' folder, which is a new one for each editable build
CHOICE = os.environ.get("REDIT_FAST_CUDA", "auto")
if CHOICE not in ("auto", "0", "1"):
    sys.exit(f"REDIT_FAST_CUDA must be auto, 0 or 1, got {CHOICE!r}")


def find_nvcc():
    """The first that is there, or None, and where it was looked for."""
    homes = {name: os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")}
    places = [f"{home}/bin/nvcc" if home else f"{name} (not set)" for name, home in homes.items()]
    places += [shutil.which("nvcc") or "PATH (no nvcc)", "/usr/local/cuda/bin/nvcc"]
    return next((place for place in places if os.access(place, os.X_OK)), None), places


def run(nvcc, *words):
    """What nvcc prints; where it fails, a CompileError of one sentence."""
    command = [nvcc, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode == 0:
        return done.stdout
    print(shlex.join(command), done.stdout, sep="\n", flush=True)
    if refused := re.search(r"error -- unsupported (.*?)[ !.]* The nvcc flag", done.stdout):
        raise CompileError(f"nvcc refuses the host compiler: {refused[1]}; set NVCC_CCBIN to one that it takes")
    if "host compiler properties" in done.stdout:
        raise CompileError("nvcc does not find its host compiler; install g++, or set NVCC_CCBIN to one that is there")
    said = re.search(r".*(?:error|fatal).*", done.stdout)
    raise CompileError(f"nvcc fails: {said[0].strip() if said else f'exit code {done.returncode}'}")


def architectures(known):
    """nvcc's flags and what they compile for: all of TORCH_CUDA_ARCH_LIST; else, of ours, what this nvcc knows."""
    asked, flags, names = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip(), [], []
    for word in re.split(r"[ ;,]+", asked or ARCHITECTURES):
        if not (found := re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)):
            raise CompileError(f"TORCH_CUDA_ARCH_LIST takes numbers such as 8.0, 9.0a and 10.0+PTX, got {word!r}")
        number, old = found[1] + found[2], int(found[1]) < 8
        unknown = f"compute_{number}" not in known
        if old or unknown and not asked:
            print(f"redit_fast._cuda: without {word}, {'the kernels need 8.0' if old else 'this nvcc is older'}")
        elif unknown:
            raise CompileError(f"TORCH_CUDA_ARCH_LIST asks for {word}, this nvcc knows {' '.join(known)}")
        else:
            number += found[3]
            code = [f"sm_{number}", f"compute_{number}"] if found[4] else [f"sm_{number}"]
            flags.append(f"-gencode=arch=compute_{number},code=[{','.join(code)}]")
            names += code
    if not names:
        raise CompileError(f"TORCH_CUDA_ARCH_LIST is {asked!r}, the kernels need 8.0 or newer")
    return flags, names


def jobs():
    """MAX_JOBS, else one a core, if there are 4 GB of memory for each."""
    given = os.environ.get("MAX_JOBS") or "0"
    if not given.isdecimal():
        raise CompileError(f"MAX_JOBS must be a whole number, got {given!r}")
    cores, memory = len(os.sched_getaffinity(0)), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(given) or max(1, min(cores, memory // 2**32))


def compiled(source, command, threads, made_with):
    """The object of `source`; that of an earlier build where it was made so, of files that are older than it."""
    path = OBJECTS / Path(source).stem
    target, headers, record = (path.with_suffix(end) for end in (".o", ".d", ".txt"))
    command = [*command, *["-fmad=false"] * ("-fmad=false" in Path(source).read_text())]  # by the file's own comment
    text, start = "\n".join([*command, *made_with]), time.time()
    if record.exists() and record.read_text() == text:
        files = [Path(name) for name in headers.read_text().replace("\\\n", " ").split()[2:]]
        if all(file.exists() and file.stat().st_mtime < record.stat().st_mtime for file in files):
            return str(target)
    record.unlink(missing_ok=True)
    OBJECTS.mkdir(parents=True, exist_ok=True)
    said = run(*command, f"--threads={threads}", "-MMD", "-MF", str(headers), "-c", source, "-o", str(target))
    print(said, end="", flush=True)
    record.write_text(text)
    os.utime(record, (start, start))  # a file that was saved while nvcc ran is newer
    return str(target)


def compile_kernels(ext, sources):
    """`sources` by nvcc; `ext` gets their objects and what its own sources need. Returns compiler and architectures."""
    place, places = find_nvcc()
    if place is None:
        raise CompileError(f"REDIT_FAST_CUDA=1 and no nvcc; looked for {', '.join(places)}")
    version = re.search(r"release ((\d+)\.(\d+))", run(place, "--version"))
    if version is None or (int(version[2]), int(version[3])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise CompileError(f"{place} is of CUDA {version[1] if version else '?'}, the oldest supported is {oldest}")
    flags, names = architectures(run(place, "--list-gpu-arch").split())
    host = os.environ.get("CXX", "").split()[-1:] if "NVCC_CCBIN" not in os.environ else []  # of "ccache g++" g++
    command = [place, *(f"-ccbin={name}" for name in host), *FLAGS, *flags]
    plan = run(*command, "--dryrun", "-c", "-x", "cu", os.devnull)  # knows the toolkit's folders where nvcc is a script
    words = shlex.split(" ".join(re.findall(r"^#\$ (?:INCLUDES|LIBRARIES)=(.*)", plan, re.M)))
    include, library = ([word[2:] for word in words if word.startswith(option)] for option in ("-I", "-L"))
    if not any(Path(folder, "libcudart_static.a").exists() for folder in library):
        raise CompileError(f"{place} has no libcudart_static.a in {', '.join(library)}; install its toolkit's runtime")
    made_with = [version[1], *(f"{name}={os.environ.get(name)}" for name in READ_BY_NVCC)]
    count = jobs()
    threads = max(1, count // len(sources))  # a source's architectures side by side
    with ThreadPoolExecutor(count) as pool:
        made = pool.map(lambda source: compiled(source, command, threads, made_with), sources)
        ext.extra_objects = list(made)
    ext.include_dirs += include
    ext.define_macros.append(("REDIT_CUDA_ARCHITECTURES", f'"{" ".join(names)}"'))
    ext.extra_link_args += [*(f"-L{folder}" for folder in library), *LINK]
    return f"CUDA {version[1]} of {place}, {' '.join(names)}"
