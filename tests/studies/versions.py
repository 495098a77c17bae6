"""Which versions of its packages cspine.py passes its tests with: one environment a set.

    python tests/studies/versions.py --folder envs
    python tests/studies/versions.py --folder envs --set kaggle tests/test_reading.py -x

lowest: the bounds at the head of cspine.py exactly; kaggle: the image of 2026-08; newest:
whatever pip finds. Each takes its Python from the PATH (python3.10, ...) or, where there is
none, the one that runs this, and some 6 GB of disk. An environment that is there with what
was asked for is used again. Words that are no options of ours go to pytest.
"""

import argparse
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
COUNTS = ("failures", "errors", "skipped")

KAGGLE = (
    "torch==2.10.0",
    "timm==1.0.26",
    "pydicom==3.0.2",
    "opencv-python==4.13.0.92",
    "numpy==2.0.2",
    "pandas==2.2.2",
    "tqdm==4.67.1",
)


def lower_bounds():
    """The requirements at the head of cspine.py, such as numpy>=2.0.2."""
    head = (ROOT / "cspine.py").read_text().split("# ///")[1]
    return re.findall(r'"([\w-]+>=[\d.]+)"', head)


def wanted():
    """{set: (version of Python, requirements)}."""
    bounds = lower_bounds()
    lowest = [bound.replace(">=", "==") for bound in bounds]
    newest = [bound.split(">=")[0] for bound in bounds]
    return dict(lowest=("3.10", lowest), kaggle=("3.12", KAGGLE), newest=("3.13", newest))


def environment(folder, python, requirements):
    """The Python of a virtual environment in `folder`, made or brought to what is asked."""
    inside = folder / "bin" / "python"
    record = folder / "asked.txt"
    asked = "\n".join(requirements)
    if record.exists() and record.read_text() == asked:
        return inside

    if not inside.exists():
        outside = shutil.which(f"python{python}") or sys.executable
        subprocess.run([outside, "-m", "venv", folder], check=True)
    install = [inside, "-m", "pip", "install", "-q", "--upgrade", *requirements, "pytest"]
    subprocess.run(install, check=True)
    record.write_text(asked)
    return inside


def versions(python, names):
    """What is installed: 'Python 3.12.1, torch 2.10.0, ...'."""
    code = (
        "import sys, platform; from importlib.metadata import version\n"
        "print('Python', platform.python_version(), end='')\n"
        "for name in sys.argv[1:]: print(',', name, version(name), end='')\n"
    )
    done = subprocess.run([python, "-c", code, *names], check=True, capture_output=True)
    return done.stdout.decode()


def run_tests(python, report, arguments):
    """(passed, failed, skipped, seconds) of pytest with these arguments, its words shown.

    An exit status that the report does not explain counts as one that failed.
    """
    report.unlink(missing_ok=True)
    started = time.monotonic()
    command = [python, "-m", "pytest", "-q", f"--junitxml={report}", *arguments]
    status = subprocess.run(command, cwd=ROOT).returncode
    seconds = time.monotonic() - started
    if not report.exists():
        sys.exit("pytest ended without a report")

    suite = ElementTree.parse(report).getroot().find("testsuite")
    failures, errors, skipped = (int(suite.get(count)) for count in COUNTS)
    failed = failures + errors
    passed = int(suite.get("tests")) - failed - skipped
    return passed, failed or int(status != 0), skipped, seconds


def main():
    """Run the suite in every environment that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="of the environments")
    parser.add_argument("--set", action="append", choices=wanted(), help="default: all")
    options, arguments = parser.parse_known_args()

    rows = []
    for name in options.set or wanted():
        python, requirements = wanted()[name]
        folder = options.folder.resolve() / name
        inside = environment(folder, python, requirements)
        names = [re.split("[=>]=", requirement)[0] for requirement in requirements]
        counts = run_tests(inside, folder / "report.xml", arguments)
        rows.append((name, versions(inside, names), *counts))

    print("\n| set | versions | passed | failed | skipped | seconds |\n|---|---|---|---|---|---|")
    for *cells, seconds in rows:
        print("|", *(f"{cell} |" for cell in cells), f"{seconds:.0f} |")
    return int(any(row[3] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
