"""A script in nvcc's place."""

import sys
from pathlib import Path

SCRIPT = """#!{python} -SE
import os, sys
words, home = sys.argv[1:], {home!r}
with open(home + "/calls", "a") as calls:
    calls.write(chr(9).join(words) + chr(10))
for name in os.listdir(home + "/says"):  # of a file's name: the option that it answers
    if name in words:
        text = open(home + "/says/" + name).read()
        code, _, text = text.partition(" ")
        sys.stderr.write(text)
        sys.exit(int(code))
source, target, headers = words[words.index("-c") + 1], words[words.index("-o") + 1], words[words.index("-MF") + 1]
found = [line.split(chr(34))[1] for line in open(source) if line.startswith("#include")]
open(target, "w").write("object")
open(headers, "w").write(target + " : " + " \\\\\\n ".join([source, *found]))
"""
KNOWN = "compute_75 compute_80 compute_86 compute_89 compute_90 compute_100 compute_120"


class Toolkit:
    """A folder with a script for nvcc that answers as 13.0 does, and notes what it gets."""

    def __init__(self, home):
        self.home, self.nvcc = home, home / "bin" / "nvcc"
        for folder in ("bin", "says", "lib", "include"):
            (home / folder).mkdir(parents=True)
        (home / "lib" / "libcudart_static.a").write_text("!<arch>\n")
        self.nvcc.write_text(SCRIPT.format(python=sys.executable, home=str(home)))
        self.nvcc.chmod(0o755)
        self.say("--version", "Cuda compilation tools, release 13.0, V13.0.88\n")
        self.say("--list-gpu-arch", KNOWN.replace(" ", "\n"))
        self.say("--dryrun", f'#$ TOP={home}\n#$ INCLUDES="-I{home}/include"  \n#$ LIBRARIES=  "-L{home}/lib"\n')

    def say(self, option, text, code=0):
        (self.home / "says" / option).write_text(f"{code} {text}")

    def calls(self):
        """The commands since the last call."""
        path = self.home / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        path.unlink(missing_ok=True)
        return [line.split("\t") for line in lines]

    def compiled(self):
        """{name of the .cu: command}"""
        return {Path(words[words.index("-c") + 1]).name: words for words in self.calls() if "-MF" in words}
