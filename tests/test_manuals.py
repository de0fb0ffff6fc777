"""The manual pages say what the code does: made parts, options, and every example in them."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import click
import documents
import gpujobd_worker
import msgspec
import pytest
from documents import ROOT
from gpujobd import config, protocol
from gpujobd.__main__ import main as gpujobd
from gpujobd_notify import config as notify_config
from gpujobd_notify.__main__ import main as gpujobd_notify
from jobctl.__main__ import cli as jobctl

PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in documents.MANUALS}
PARTS = [(page, part) for page, text in PAGES.items() for part in documents.parts(text)]

# --- made parts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("page", "part"), PARTS)
def test_made_list_is_as_the_code_has_it(page, part):
    body = documents.parts(PAGES[page])[part]
    assert body == documents.make_list(part, body), f"run: python tests/documents.py --rewrite ({page})"


@pytest.mark.parametrize(("page", "part"), PARTS)
def test_every_entry_is_explained(page, part):
    entries = documents.entries(documents.parts(PAGES[page])[part])
    assert entries
    assert [word for word, meaning in entries.items() if not meaning.strip()] == []


def test_every_mark_is_a_list():
    for page, text in PAGES.items():
        opened = len(re.findall(r'^\.\\" made: ', text, re.MULTILINE))
        assert len(documents.parts(text)) == opened == text.count('\n.\\" end\n'), page


def test_every_key_of_a_job_in_json_is_told():
    text = PAGES["man/jobctl.1"].partition("\n.Sh JSON\n")[2].partition("\n.Sh ")[0]
    words = set(re.findall(r"\w+", " ".join(re.findall(r"^\.(?:It )?Va (.*)$", text, re.MULTILINE))))
    for record in (protocol.Job, protocol.Items, protocol.Forecast, protocol.Foretold, protocol.JobTimings):
        assert {name for name, _, _ in documents.fields(record, without=())} <= words, record


def test_every_key_of_the_configuration_is_in_its_page():
    page = documents.parts(PAGES["man/gpujobd.toml.5"])
    told = {
        word for part, body in page.items() if part.startswith("keys") for word in documents.entries(body)
    }
    assert told == {row[0].strip("`") for row in documents.configuration()[1]}


# --- form ---------------------------------------------------------------------------------------------------------


def said(*command):
    """What the command complains of."""
    ran = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    return (ran.stdout + ran.stderr).splitlines()


@pytest.mark.skipif(not shutil.which("mandoc"), reason="mandoc is not installed")
@pytest.mark.parametrize("page", PAGES)
def test_page_is_clean_before_mandoc(page):
    """Its style level too, save that it looks for the pages named in SEE ALSO among those installed."""
    complaints = [line for line in said("mandoc", "-T", "lint", "-W", "style", ROOT / page) if page in line]
    assert [line for line in complaints if "referenced manual not found" not in line] == []


@pytest.mark.skipif(not shutil.which("groff"), reason="groff is not installed")
@pytest.mark.parametrize("page", PAGES)
def test_page_is_clean_before_groff(page):
    """As `man --warnings` does it, at 80 columns."""
    assert said("groff", "-mandoc", "-Tutf8", "-rLL=78n", "-ww", "-z", ROOT / page) == []


# --- commands and options -----------------------------------------------------------------------------------------


def options(command):
    """Every option that --help prints."""
    params = [param for param in command.params if isinstance(param, click.Option)]
    return {word for param in params for word in param.opts}


def described(page):
    """Verb to its options in the page, each with its entry; "" is the verb's own, inner lists without options included.

    `.It Ic VERB`, then `.It Fl OPTION`, until the next verb or section.
    """
    found, verb, here = {}, "", [""]
    for line in PAGES[page].splitlines():
        if line.startswith(".It Ic "):
            verb, here = line.split()[2], [""]
            found[verb] = {"": ""}
        elif line.startswith(".Sh"):
            verb = ""
        elif verb and line.startswith(".It Fl "):
            here = [f"-{word.split()[0]}" for word in re.split(r"(?: ,)? ?Fl ", line[3:])[1:]]
        if verb:
            for option in here:
                found[verb][option] = found[verb].get(option, "") + line + "\n"
    return found


def told(page):
    return {verb: entries.keys() - {""} for verb, entries in described(page).items()}


def test_every_command_of_jobctl_is_in_its_page_with_every_option_and_no_other():
    commands = {name: jobctl.get_command(None, name) for name in jobctl.list_commands(None)}
    of_all = {"--json", "--socket"}
    assert told("man/jobctl.1") == {name: options(v) - of_all for name, v in commands.items()}


def test_every_command_of_gpujobd_is_in_its_page_with_every_option_and_no_other():
    assert told("man/gpujobd.8") == {name: options(verb) for name, verb in gpujobd.commands.items()}


def test_every_command_of_the_notifier_is_in_its_page_with_every_option_and_no_other():
    commands = gpujobd_notify.commands
    assert told("man/gpujobd-notify.8") == {name: options(verb) for name, verb in commands.items()}


def test_every_key_of_the_notifiers_configuration_is_in_its_page():
    """As msgspec has the records, not as the list is made: a kind of endpoint that was forgotten there is found here."""
    page = (ROOT / "man/gpujobd-notify.toml.5").read_text(encoding="utf-8")
    told = set(re.findall(r"^\.It Va (\S+)", page, re.MULTILINE))
    sections = {field.name: field.type for field in msgspec.structs.fields(notify_config.File)}
    of_endpoints = typing.get_args(typing.get_args(sections.pop("endpoints"))[1])
    keys = {
        f"{name}.{field.name}" for name, kind in sections.items() for field in msgspec.structs.fields(kind)
    }
    keys |= {field.name for kind in of_endpoints for field in msgspec.structs.fields(kind)}
    assert told == keys


def choices():
    """Every parameter with choices: (page, verb, option or "", its choices)."""
    for page, program in (("man/jobctl.1", jobctl), ("man/gpujobd.8", gpujobd)):
        for name in program.list_commands(None):
            for param in program.get_command(None, name).params:
                if isinstance(param.type, click.Choice):
                    option = param.opts[0] if isinstance(param, click.Option) else ""
                    yield page, name, option, set(param.type.choices)


@pytest.mark.parametrize(("page", "verb", "option", "words"), list(choices()))
def test_every_choice_is_told(page, verb, option, words):
    assert words <= set(re.findall(r"[\w-]+", described(page)[verb][option]))


def test_options_of_all_commands_are_told_once():
    opening = PAGES["man/jobctl.1"].partition(".Ss ")[0]
    for option in ("-json", "-socket Ar path", "h , Fl -help", "-version"):
        assert re.search(rf"^\.(It )?Fl {option}", opening, re.MULTILINE), option


# --- examples -----------------------------------------------------------------------------------------------------

README_DEBIAN = "packaging/debian/gpujobd.README.Debian"
BLOCK = re.compile(r"^\.Bd -literal.*\n((?:.*\n)*?)^\.Ed$", re.MULTILINE)


def examples(page):
    """The literal blocks as a reader sees them."""
    for block in BLOCK.findall(PAGES[page]):
        yield block.replace("\\e", "\\").replace("\\&", "").replace("\\(aq", "'").replace("\\-", "-")


def lines_of_shell():
    """Every line of every example: (document, line without its prompt)."""
    for page in PAGES:
        for block in examples(page):
            for line in block.replace("\\\n", " ").splitlines():
                yield page, re.sub(r"^[#$] ", "", line)
    readme = (ROOT / README_DEBIAN).read_text(encoding="utf-8")
    for line in re.sub(r"\\\n +", "", readme).splitlines():
        if found := re.match(r" {2,4}[#$] (.*?)(?: {3,}.*)?$", line):
            yield README_DEBIAN, found[1]


def command_lines(program):
    """Every call of the program in an example: (document, arguments), without the options that all commands have."""
    return [
        (document, words[2:] if words[0] == "--socket" else words)
        for document, line in lines_of_shell()
        for words in calls(line, program)
        if words
    ]


def calls(line, program):
    """The arguments of every call of the program in a line of shell; redirections are left out."""
    line = re.sub(r"\d?>&?\d?( \w[\w./]*)?|runuser -u \w+ -- ", "", line)
    if not re.search(rf"\b{program}(?![\w:.-])", line):
        return
    at_start, words = True, None
    tokens = shlex.shlex(line, posix=True, punctuation_chars="|&;()<")
    tokens.whitespace_split = True
    for token in [*tokens, ";"]:
        if re.fullmatch(r"[|&;()<]+", token):
            if words is not None:
                yield words
            at_start, words = True, None
        elif at_start and token == program:
            at_start, words = False, []
        elif words is not None:
            words.append(token)
        else:
            at_start = token in ("$", "!", "do", "then")


def test_calls_in_a_line_of_shell_are_found():
    line = (
        'if x=$(jobctl submit a - --submit-id "b-$(date +%F)") && ! jobctl wait 3 >&2; then echo jobctl; fi'
    )
    assert list(calls(line, "jobctl")) == [
        ["submit", "a", "-", "--submit-id", "b-$(date +%F)"],
        ["wait", "3"],
    ]


@pytest.mark.parametrize(("page", "arguments"), command_lines("jobctl"))
def test_command_of_jobctl_in_an_example_is_one_that_it_takes(page, arguments):
    command = jobctl.get_command(None, arguments[0])
    assert command is not None
    assert command.make_context(arguments[0], arguments[1:]).command is command


@pytest.mark.parametrize(("page", "arguments"), command_lines("gpujobd"))
def test_command_of_gpujobd_in_an_example_is_one_that_it_takes(page, arguments):
    command = gpujobd.commands[arguments[0]]
    assert command.make_context(arguments[0], arguments[1:]).command is command


def files(page):
    """Path and text of every file in the examples: those that begin with its path as a comment."""
    for block in examples(page):
        if found := re.match(r"# (/?[\w./-]+\.(?:py|toml))\n", block):
            yield found[1], block


ALL_FILES = [file for page in PAGES for file in files(page)]


@pytest.mark.parametrize("text", [text for path, text in ALL_FILES if path.endswith(".toml")])
def test_configuration_in_an_example_is_good(tmp_path, text):
    path = text.split()[1]
    if path == "notify.toml":
        secret = tmp_path / "smtp"
        secret.write_text("a password")
        secret.chmod(0o600)
        (tmp_path / path).write_text(text.replace("/etc/gpujobd/notify-credentials/smtp", str(secret)))
        assert notify_config.load(tmp_path / path) != notify_config.load(None)
        return
    folder = tmp_path / "handlers.d" if "handlers.d" in path else tmp_path
    (tmp_path / "handlers.d").mkdir()
    (tmp_path / "gpujobd.toml").write_text("")
    name = path.rpartition("/")[2]
    (folder / name).write_text(
        re.sub(r'^python = ".*"', f'python = "{sys.executable}"', text, flags=re.MULTILINE)
    )
    loaded = config.load(tmp_path / "gpujobd.toml")
    assert set(loaded.handlers) == ({name.removesuffix(".toml")} if "handlers.d" in path else {"checksum"})


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder with the Python files of the examples, on the import path."""
    names = [path.rpartition("/")[2] for path, _ in ALL_FILES if path.endswith(".py")]
    for path, text in ALL_FILES:
        if path.endswith(".py"):
            (tmp_path / path.rpartition("/")[2]).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in names:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_first_handler_of_the_page_does_what_the_page_says(modules):
    from lengths import Lengths

    assert Lengths(device="cpu")([{"text": "abc"}]) == [{"characters": 3}]


def make_iris_model(path):
    """A model as the page's handler loads it, of weights that nobody trained."""
    torch = pytest.importorskip("torch")
    import iris

    torch.manual_seed(1)
    torch.save(iris.network().state_dict(), path)


def test_torch_handler_of_the_page_works_and_runs_in_ray_data(modules):
    torch = pytest.importorskip("torch")
    model = str(modules / "iris.pt")
    make_iris_model(model)
    import iris
    from for_ray import ForRay

    handler = iris.Iris(device="cpu", model=model)
    batch = [{"features": [5.1, 3.5, 1.4, 0.2]}, {"features": [6, 3, 5, 2]}]
    for item in batch:
        handler.check(item)
    for bad in ({}, {"features": [1, 2]}, {"features": ["a"] * 4}):
        with pytest.raises(ValueError, match="number"):
            handler.check(bad)
    outputs = handler(batch)
    assert [sorted(output) for output in outputs] == [["chance", "label"]] * 2
    refused = handler(batch, least=1.0)
    assert [type(output) for output in refused] == [gpujobd_worker.Rejected] * 2
    columns = {"features": torch.tensor([item["features"] for item in batch]).numpy()}
    in_ray = ForRay(device="cpu", model=model)(columns)
    assert in_ray == {key: [output[key] for output in outputs] for key in outputs[0]}


UNTIL_READY = "until jobctl ping >/dev/null 2>&1; do sleep 0.1; done\n"


@pytest.mark.slow
def test_rehearsal_of_the_page_runs_as_it_stands(modules, monkeypatch):
    make_iris_model(modules / "iris.pt")
    moved = {"/opt/iris/bin/python": sys.executable, "/srv/gpujobd/handlers": modules, "/srv/models": modules}
    toml = next(text for path, text in ALL_FILES if path.endswith("iris.toml"))
    for there, here in moved.items():
        toml = toml.replace(there, str(here))
    (modules / "iris.toml").write_text(toml)
    rows = [[5.1, 3.5, 1.4, 0.2], [6.7, 3.1, 4.7, 1.5], [1, 2]]
    (modules / "items.jsonl").write_text("".join(json.dumps({"features": row}) + "\n" for row in rows))
    block = next(b for b in examples("man/gpujobd-handler.7") if "mkdir -p try" in b)
    script = re.sub(r"^\$ ", "", block, flags=re.MULTILINE)
    script = script.replace(
        "export JOBCTL_SOCKET=try/socket\n", "export JOBCTL_SOCKET=try/socket\n" + UNTIL_READY
    )
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    ran = subprocess.run(
        ["bash", "-c", script], cwd=modules, check=False, capture_output=True, text=True, timeout=120
    )
    assert "try/gpujobd.toml: good\n" in ran.stdout
    assert '"label": "' in ran.stdout or "unsure" in ran.stdout
    assert "features must be a list of N numbers" in ran.stdout
    assert re.fullmatch(r"jobctl: job 1 completed: \d done, \d failed of 3 \(100 %\)\n", ran.stderr)
