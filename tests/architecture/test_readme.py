"""What our documents show is executed: every command of the README, and of the guides that have bash blocks, in one
folder, every Python block of every document in that document's own. And links between them lead somewhere.

How a command is executed depends on its first word (`translate`): moesaic's own are run as they stand, with the
quickstart shortened by its own flag; make targets are checked with `make -n`, pip's extras against pyproject.toml.
A block that cannot be run here says so, with its reason, in an HTML comment before it: `<!-- not executed: REASON -->`.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from moesaic.checkpoint.store import resolve_checkpoint
from moesaic.config.load import load_train_config, write_config
from moesaic.config.train import TrainConfig
from moesaic.errors import ConfigError
from moesaic.quickstart.life import quickstart, quickstart_config
from moesaic.report.records import read_metrics
from moesaic.report.serving import RequestResult, ServingResult, write_serving

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
DOCUMENTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_NOT_EXECUTED = re.compile(r"<!-- not executed: *(\S[^>]*?) *-->\s*\Z")
# What sets up the environment that the tests already run in.
_SETUP = ("git", "cd", "source", ".", "deactivate")
_COMMAND_SECONDS = 240
QUICKSTART = "moesaic quickstart --short"


@dataclass(frozen=True)
class Step:
    """One command of the README and what is executed for it: where, and in which words; "" for nothing."""

    command: str
    executed: str
    in_repository: bool = False


def bash_blocks(text: str) -> list[str]:
    """Return the bash blocks that are to be executed."""
    return _blocks(text, ("bash", "sh", "shell", "console"))


def python_blocks(text: str) -> list[str]:
    """Return the Python blocks that are to be executed."""
    return _blocks(text, ("python", "py"))


def _blocks(text: str, languages: tuple[str, ...]) -> list[str]:
    return [
        match.group(2)
        for match in _FENCE.finditer(text)
        if match.group(1) in languages and not _NOT_EXECUTED.search(text[: match.start()])
    ]


def commands_of(block: str) -> list[str]:
    """Return a block's commands: continued lines joined, prompts, comments and empty lines left out."""
    joined = re.sub(r"\\\n\s*", " ", block)
    lines = (line.strip().removeprefix("$ ") for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def translate(command: str) -> list[Step]:
    """Return what is executed for one command of the README."""
    words = shlex.split(command, comments=True)
    while words and re.fullmatch(r"[A-Z_][A-Z0-9_]*=.*", words[0]):
        words = words[1:]
    if not words or words[0] in _SETUP or words[1:3] == ["-m", "venv"]:
        return [Step(command, "")]
    name = words[0].removeprefix(".venv/bin/")
    if name == "make":
        step = Step(command, f"make -n {shlex.join(words[1:])}", in_repository=True)
        # What follows in the README looks at the run that this makes.
        return [step, Step(command, QUICKSTART)] if "quickstart" in words else [step]
    if name in ("pip", "pip3") or words[1:3] == ["-m", "pip"]:
        check_extras(words)
        return [Step(command, "")]
    if name == "moesaic" and "quickstart" in words and not {"--short", "--help"} & set(words):
        return [Step(command, re.sub(r"\bquickstart\b", "quickstart --short", command, count=1))]
    if name == "tensorboard":  # it serves until it is stopped
        return [Step(command, "tensorboard --version")]
    return [Step(command, command.replace(".venv/bin/", ""))]


def check_extras(words: list[str]) -> None:
    """Assert that the extras of moesaic in a pip command exist."""
    known = set(
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    )
    for word in words:
        match = re.fullmatch(r"(?:\.|moesaic)\[([^]]+)\].*", word)
        if match:
            named = {extra.strip() for extra in match.group(1).split(",")}
            assert named <= known, f"{word} names extras that are not in pyproject.toml: {sorted(named - known)}"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a clone, with a home of its own and this interpreter's commands beside it."""
    parent = tmp_path_factory.mktemp("readme")
    clone = parent / "moesaic"
    clone.mkdir()
    for entry in ROOT.iterdir():
        if not entry.name.startswith(".") and entry.name not in ("runs", "build", "dist"):
            (clone / entry.name).symlink_to(entry)
    (parent / "home").mkdir()
    commands = parent / "bin"
    commands.mkdir()
    for name, module in (("moesaic", "-m moesaic"), ("python", ""), ("python3", "")):
        script = commands / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {module} "$@"\n')
        script.chmod(0o755)
    return clone


def execute(step: Step, clone: Path) -> str:
    """Return what a step says, with this interpreter's commands first on the PATH."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(clone.parent / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "HOME": str(clone.parent / "home"),
        # The kernels of this machine are compiled once for all tests.
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
        "COLUMNS": "300",
        # Two threads that wait for each other are many times slower than one when something else runs beside the tests.
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", step.executed],
        cwd=ROOT if step.in_repository else clone,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_COMMAND_SECONDS,
        check=False,
    )
    assert result.returncode == 0, (
        f"a document says `{step.command}`; `{step.executed}` ended with status {result.returncode} and said\n"
        f"{result.stdout[-4000:]}"
    )
    return result.stdout


@pytest.fixture(scope="module")
def shown(clone: Path) -> dict[str, str]:
    """What every command of the README says, by what was executed for it; each has ended well."""
    steps = [
        step
        for block in bash_blocks(README.read_text(encoding="utf-8"))
        for command in commands_of(block)
        for step in translate(command)
    ]
    return {step.executed: execute(step, clone) for step in steps if step.executed}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_command_of_the_readme_works(shown: dict[str, str]) -> None:
    assert any(executed.startswith("moesaic ") for executed in shown), "the README shows no command of moesaic's"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_quickstart_makes_what_it_names_and_once_more_goes_on(
    shown: dict[str, str], clone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    first = shown[QUICKSTART]
    run, student = Path("runs/quickstart"), Path("runs/quickstart-student")
    config = load_train_config(run / "config.yaml")
    assert config == quickstart_config("runs/quickstart-data", short=True)
    for folder in (run, student):
        for name in ("config.yaml", "run.json", "metrics.jsonl", "tokenizer.json"):
            assert (folder / name).is_file()
        plots = {path.name for path in (folder / "plots").glob("*.png")}
        assert {"loss.png", "learning_rate.png", "expert_load.png", "expert_balance.png"} <= plots
        metrics = read_metrics(folder)
        assert metrics.train[-1].step == config.total_steps
        assert metrics.train[-1].loss < metrics.train[0].loss - 0.5
        loss = resolve_checkpoint(folder).validation_loss
        assert loss is not None and f"validation loss {loss:.3f}" in first
    taught = load_train_config(student / "config.yaml")
    assert taught.distill is not None and taught.distill.schedule == "staged"
    assert (config.model.num_layers, taught.model.num_layers) == (8, 7)
    for expected in ("1/5", "5/5", "The teacher writes", "The student writes", "The state of the Union is",
                     str(run / "plots"), str(run / "report.html"), f"moesaic inspect {run}"):  # fmt: skip
        assert expected in first
    page = (run / "report.html").read_text(encoding="utf-8")
    assert page.count('<img src="data:image/png;base64,') == 7
    assert page.count("The state of the Union is") == 2

    kept = [*run.glob("checkpoints/*/*"), *student.glob("checkpoints/*/*")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    metrics = read_metrics(student)
    again = execute(Step(QUICKSTART, QUICKSTART), clone)
    assert again.count("going on with it") == 2
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert read_metrics(student).train == metrics.train
    assert (run / "report.html").read_text(encoding="utf-8") == page

    # Without --short it is another run, which must not be mixed with this one.
    with pytest.raises(ConfigError, match=r"holds another run, .*--short; .*; name another folder"):
        quickstart(run)


EXAMPLE = """Text.

```bash
# a comment
git clone https://example.org/moesaic && cd moesaic
$ make quickstart
moesaic train pr-moe \\
    --set tokens=1e6
```

```python
print("not a command")
```

<!-- not executed: it needs eight GPUs -->
```bash
torchrun --nproc-per-node 8 -m moesaic train big
```

```sh
ls runs
```
"""


def test_blocks_are_found_and_a_reason_is_needed_to_leave_one_out() -> None:
    assert [commands_of(block) for block in bash_blocks(EXAMPLE)] == [
        [
            "git clone https://example.org/moesaic && cd moesaic",
            "make quickstart",
            "moesaic train pr-moe  --set tokens=1e6",
        ],
        ["ls runs"],
    ]
    assert len(bash_blocks(EXAMPLE.replace(": it needs eight GPUs", ":"))) == 3
    assert python_blocks(EXAMPLE) == ['print("not a command")\n']
    assert python_blocks(EXAMPLE.replace("```python", "<!-- not executed: it is an example -->\n```python")) == []


@pytest.mark.parametrize(
    ("command", "executed"),
    [
        ("git clone https://example.org/moesaic", [""]),
        ("python3 -m venv .venv", [""]),
        (". .venv/bin/activate", [""]),
        ("make test", ["make -n test"]),
        ("make quickstart", ["make -n quickstart", "moesaic quickstart --short"]),
        ("moesaic quickstart", ["moesaic quickstart --short"]),
        ("moesaic quickstart --output runs/a", ["moesaic quickstart --short --output runs/a"]),
        ("moesaic quickstart --help", ["moesaic quickstart --help"]),
        ("moesaic quickstart --short", ["moesaic quickstart --short"]),
        (".venv/bin/moesaic inspect runs/a  # look", ["moesaic inspect runs/a  # look"]),
        ("moesaic inspect dense-1.3b --json | head -3", ["moesaic inspect dense-1.3b --json | head -3"]),
        ("pip install -e '.[quickstart]'", [""]),
        ("python -m pip install torch --index-url https://example.org/cpu", [""]),
        ("tensorboard --logdir runs", ["tensorboard --version"]),
    ],
)
def test_a_command_is_translated(command: str, executed: list[str]) -> None:
    assert [step.executed for step in translate(command)] == executed


def test_an_extra_that_does_not_exist_is_found() -> None:
    with pytest.raises(AssertionError, match="nonsense"):
        translate("pip install 'moesaic[quickstart,nonsense]'")


# Their blocks are executed with what these tests say of the outcome.
EXECUTED_BY = {
    "docs/guides/configuration.md": "tests/config/test_guide.py",
    "docs/guides/distill.md": "tests/distill/test_guide.py",
    "docs/guides/serve.md": "tests/serve/test_guide.py",
    "docs/guides/transformers.md": "tests/hf/test_guide.py",
    "docs/serving.md": "tests/serve/test_guide.py",
}
# What would take minutes, and what is executed in its place.
SHORTENED = {
    '"pr-moe-tiny-8-16"': '"tiny.yaml"',
    "tokens=2e6": "tokens=256",
    "tokens=20e6": "tokens=256",
    '["embedded"]': '["text.txt"]',
}


def lay_out(document: str, make_config: Callable[..., TrainConfig]) -> None:
    """Make what a document's Python blocks start from, in the current folder."""
    from moesaic.train.loop import train

    sizes = {"hidden_size": 64, "intermediate_size": 64, "max_positions": 128, "dropout": 0.0}
    if document in ("README.md", "docs/guides/train.md"):
        config = make_config("pr-moe", model={"vocab_size": 4096})
        shutil.copytree(config.data.path, "data/mine")
        shutil.copy(ROOT / "docs" / "architecture.md", "text.txt")
        write_config(config, Path("tiny.yaml"))
    elif document in ("docs/guides/quantize.md", "docs/guides/commands.md"):
        train(make_config("pr-moe", steps=4, model=sizes), "runs/first")
    elif document == "docs/guides/upcycle.md":
        train(make_config(steps=4, model=sizes), "runs/dense")
    elif document == "docs/guides/convert.md":
        pytest.importorskip("transformers", reason="logits are compared with transformers' (extra `huggingface`)")
        from moesaic.convert.exporter import export_run

        train(make_config(steps=4, model={**sizes, "qk_norm": "head"}), "runs/small")
        Path("downloads").mkdir()
        export_run("runs/small", "downloads/Qwen3-0.6B")
    elif document == "docs/guides/bench-serve.md":
        request = RequestResult(
            due_seconds=0.0, sent_seconds=0.0, end_seconds=0.5, chunk_seconds=(0.2, 0.3, 0.4), asked_prompt_tokens=9,
            asked_output_tokens=3, prompt_tokens=9, output_tokens=3,
        )  # fmt: skip
        for name in ("ours", "theirs"):
            result = ServingResult(
                name=name, url="http://test", model="tiny", created="2026-01-01T00:00:00+00:00", workload={},
                ttft_limit_seconds=2.0, tpot_limit_seconds=0.1, requests=(request,),
            )  # fmt: skip
            write_serving(Path(f"{name}.json"), result)


@pytest.mark.parametrize(
    "document",
    [path.relative_to(ROOT).as_posix() for path in DOCUMENTS if python_blocks(path.read_text(encoding="utf-8"))],
)
def test_the_python_blocks_of_a_document_run_in_their_order(
    document: str, make_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if document in EXECUTED_BY:
        test = (ROOT / EXECUTED_BY[document]).read_text(encoding="utf-8")
        assert f'"{Path(document).name}"' in test and "exec(" in test, f"{EXECUTED_BY[document]} executes no block"
        return
    monkeypatch.chdir(tmp_path)
    lay_out(document, make_config)
    names: dict[str, object] = {}
    for block in python_blocks((ROOT / document).read_text(encoding="utf-8")):
        for shown, executed in SHORTENED.items():
            block = block.replace(shown, executed)
        exec(compile(block, document, "exec"), names)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "document",
    [path.relative_to(ROOT).as_posix() for path in DOCUMENTS[1:] if bash_blocks(path.read_text(encoding="utf-8"))],
)
def test_every_command_of_a_guide_works(
    document: str, clone: Path, make_config: Callable[..., TrainConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(clone)
    lay_out(document, make_config)
    for block in bash_blocks((ROOT / document).read_text(encoding="utf-8")):
        for command in commands_of(block):
            for step in translate(command):
                execute(step, clone)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_between_documents_lead_somewhere(document: Path) -> None:
    text = _FENCE.sub("", document.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\((?!https?:|mailto:|#)([^)#\s]+)", text)
    missing = [target for target in targets if not (document.parent / target).exists()]
    assert missing == []
