"""What the documents say is true: commands parse, settings validate, files exist, and nothing that has a name is left out."""

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import modicum
from modicum import cli
from modicum.checkpoint import Preprocessing, save_backbone
from modicum.config import flatten, load_experiment, shipped_configs, validate
from modicum.data.catalogue import BUILT_IN
from modicum.errors import InputError, Interrupted, Preempted
from modicum.evaluate.rows import COLUMNS
from modicum.evaluate.table import spelt
from modicum.method import find_method, method_names, settings_model
from modicum.networks import create_backbone
from modicum.pipelines.sweep import _choices
from modicum.settings import HARMLESS, Experiment
from modicum.views import build_policy
from modicum.views.recipes import PAPERS, Recipe

CHECKOUT = Path(modicum.__file__).parent.parent
DOCUMENTS = [CHECKOUT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md")] + sorted(
    (CHECKOUT / "docs").glob("*.md")
)
SHELL = sorted((CHECKOUT / "pipelines").glob("*.sh"))
STAGES = ("pretrain", "finetune")
COLOUR = {"image_size": 224, "channels": 3, "mirror": True, "mean": (0.5,) * 3, "std": (0.25,) * 3}
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(CHECKOUT)))


def read(name: str) -> str:
    return (CHECKOUT / name).read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def commands(text: str) -> list[list[str]]:
    """The words of every command: the lines of ```sh blocks, and what stands in the text as `make ...`, `modicum ...`, `python -m ...`."""
    lines = [line for block in blocks(text, "sh") for line in block.splitlines()]
    lines += [code for code in inline_code(text) if re.match(r"((\.venv/bin/)?(modicum|python)|make|torchrun) ", code)]
    return [words for line in lines if (words := shlex.split(line.partition(" > ")[0], comments=True))]


def our_arguments(words: list[str]) -> list[str] | None:
    """The arguments after `modicum`, however it is started; None where something else is."""
    program = Path(words[0]).name
    if program == "modicum":
        return words[1:]
    if program == "torchrun":  # it takes --run for its own unless a lone -- stands before it
        module = words.index("-m")
        assert words[module + 1 : module + 3] == ["modicum.cli", "--"], words
        return words[module + 3 :]
    if program == "python" and words[1] == "-m" and words[2] != "benchmarks" and (CHECKOUT / words[2] / "__main__.py").is_file():
        return words[2:]
    return None


def check_other(words: list[str]) -> None:
    """`make TARGET`, `python -m benchmarks [CASE]` and `python -m MODULE [FILE]`: what is named must be there."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", read("Makefile"), flags=re.MULTILINE)
        assert words[1] in targets, f"no such target: make {words[1]}"
        return
    assert (Path(words[0]).name, words[1]) == ("python", "-m"), f"no such command: {words}"
    if words[2] == "benchmarks":
        cases = [word for word in words[3:] if not word.startswith("--") and "=" not in word]
        assert all((CHECKOUT / "benchmarks" / f"{case}.py").is_file() for case in cases), f"no such case: {words}"
        return
    assert words[2] == "pytest" or (CHECKOUT / f"{words[2].replace('.', '/')}.py").is_file(), f"no such module: {words[2]}"
    assert all((CHECKOUT / word).is_file() for word in words[3:] if word.endswith(".py")), f"no such file: {words}"


def check_ours(arguments: list[str]) -> None:
    """Lets the real command line read the arguments, without carrying them out, and validates the settings they give."""
    group: Any = typer.main.get_command(cli.app)
    name, *rest = arguments
    assert name in group.commands, f"no such command: {name}"
    if not rest:
        return  # the text speaks of the command
    options = group.commands[name].make_context(name, rest).params
    config = {"CONFIG": "digits"}.get(options.get("config"), options.get("config"))
    if config is None:  # of `predict` and `config --schema`
        return
    overrides = list(options["overrides"] or ())
    check_settings(config, overrides)
    for text in options.get("over") or ():
        for choice in _choices(text):
            check_settings(config, [*overrides, choice])


def check_settings(config: str, overrides: list[str]) -> None:
    """Validates the experiment, its methods' own settings and its views, all that can be without data. Raises InputError."""
    experiment = load_experiment(config, overrides)
    for stage in STAGES:
        section = getattr(experiment, stage)
        given = {key: value for key, value in section.method.items() if key != "name"}
        validate(settings_model(find_method(stage, section.method["name"])), given, source=config)
        for spec in section.views if section.views != "auto" else ():
            build_policy(spec, **COLOUR)


def check_commands(text: str) -> int:
    found = commands(text)
    for words in found:
        arguments = our_arguments(words)
        check_other(words) if arguments is None else check_ours(arguments)
    return len(found)


@pytest.fixture(autouse=True)
def beside_a_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where documents name a config of one's own, it is mine.yaml."""
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(read("configs/folder.yaml"))


@every_document
def test_every_command_is_accepted(document: Path) -> None:
    check_commands(document.read_text(encoding="utf-8"))


def test_the_documents_hold_commands_at_all() -> None:
    assert check_commands(read("README.md")) > 15
    assert check_commands("```sh\nmodicum run digits seed=1   # a comment\n```\nand `modicum run` or `make demo`") == 3


@pytest.mark.parametrize(
    "line",
    [
        "modicum run digits --nonsense",
        "modicum run unknown_config",
        "modicum run digits finetune.label=40",
        "modicum run digits pretrain.method.temprature=1",
        "modicum run digits finetune.method=unknown_method",
        "modicum run digits 'pretrain.views={name: moco_v2, crop: 1}'",
        "modicum sweep digits --seeds 2 --over finetune.labels=40,unknown",
        "modicum explain digits",
        "torchrun -m modicum.cli pretrain digits --run runs/two",
        "make coffee",
        "python -m benchmarks coffee",
        "python -m benchmarks.coffee",
        "rm -r runs",
    ],
)
def test_a_wrong_command_is_noticed(line: str) -> None:
    with pytest.raises(Exception, match=r"[Nn]o such|[Uu]nknown|torchrun"):
        check_commands(f"```sh\n{line}\n```\n")


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_the_examples_in_the_headers_of_the_pipelines_are_accepted(script: Path) -> None:
    (example,) = re.findall(rf"for example +(.*pipelines/{script.name} .*)$", script.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert script.stat().st_mode & 0o111, "is not executable"
    arguments = shlex.split(example.partition(script.name)[2])
    check_ours(["run", script.stem, *(arguments[1:] if script.stem == "folder" else arguments)])


@every_document
def test_every_setting_that_is_named_exists(document: Path) -> None:
    known = set(flatten(Experiment().model_dump())) | set(Experiment.model_fields)
    known |= {key.rpartition(".")[0] for key in known}
    known |= {f"{stage}.method.{key}" for stage in STAGES for name in method_names(stage) for key in settings_of(stage, name)}
    text = document.read_text(encoding="utf-8")
    named = [re.match(r"((?:data|backbone|pretrain|finetune|evaluate)(?:\.\w+)+)(?:$|[=: ])", code) for code in inline_code(text)]
    assert [match[1] for match in named if match and match[1] not in known] == []


def settings_of(stage: str, name: str) -> list[str]:
    model = settings_model(find_method(stage, name))
    teacher = ["teacher.norm", "teacher.momentum", "teacher.groups"] if "teacher" in model.model_fields else []
    return [*model.model_fields, *teacher]


@every_document
def test_every_yaml_is_a_config(document: Path) -> None:
    for block in blocks(document.read_text(encoding="utf-8"), "yaml"):
        assert yaml.safe_load(block)
        Path("block.yaml").write_text(block)
        check_settings("block.yaml", [])


@every_document
def test_no_code_is_broken_across_lines(document: Path) -> None:
    prose = re.sub(r"^```.*?^```$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    assert [line for line in prose.splitlines() if line.count("`") % 2] == []


@every_document
def test_every_link_leads_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", document.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert missing == []


@every_document
def test_every_file_that_is_named_exists(document: Path) -> None:
    tokens = re.findall(r"[\w.]+(?:/[\w.]+)+", " ".join(inline_code(document.read_text(encoding="utf-8"))))
    ours = [token for token in tokens if token.endswith((".py", ".sh")) or token.startswith(("configs/", "docs/", "tests/", ".ci/"))]
    assert [token for token in ours if not (CHECKOUT / token).is_file()] == []


def test_the_demos_table_is_there() -> None:
    between = read("README.md").partition("<!-- demo table -->")[2].partition("<!-- /demo table -->")[0]
    assert re.search(r"[|│].*\d\d\.\d", between)


def test_the_readme_describes_the_demo_as_its_config_is() -> None:
    told = read("README.md").partition("`make demo` pretrains")[2].partition("<!-- demo table -->")[0]
    digits = load_experiment("digits")
    assert f"{digits.finetune.labels} labels" in " ".join(told.split())
    assert spelt(digits.pretrain.method["name"]) in told
    assert spelt(digits.finetune.method["name"]) in told
    assert ("EMAN" in told) == ("eman" in str([digits.pretrain.method, digits.finetune.method]))


def test_the_readme_is_short() -> None:
    own = re.sub(r"<!-- (\w+ table) -->.*<!-- /\1 -->", "", read("README.md"), flags=re.DOTALL)
    assert len(own.splitlines()) <= 200


def test_the_readme_tells_every_exit_status() -> None:
    for ending in (InputError, Interrupted, Preempted):
        assert f"`{ending.exit_status}`" in read("README.md")


def test_the_readme_loads_the_backbone_by_the_lines_that_are_printed_beside_it(tmp_path: Path) -> None:
    known = BUILT_IN["digits"]
    backbone = create_backbone(load_experiment("digits").backbone, known.channels, known.image_size, seed=0)
    save_backbone(tmp_path, backbone, Preprocessing(known.image_size, known.channels, (0.5,), (0.5,)))
    (told,), (printed,) = (blocks(text, "python") for text in (read("README.md"), (tmp_path / "README.md").read_text(encoding="utf-8")))
    assert ast.dump(ast.parse(told)) == ast.dump(ast.parse(printed))  # the formatter has its own taste in quotes


def test_a_method_is_added_in_four_steps() -> None:
    section = read("CONTRIBUTING.md").partition("## Adding a method, in four steps")[2].partition("\n## ")[0]
    assert re.findall(r"^(\d)\. ", section, flags=re.MULTILINE) == ["1", "2", "3", "4"]


@pytest.mark.parametrize(("stage", "number"), [("pretrain", "one"), ("finetune", "two")])
def test_every_method_has_its_paragraph_and_no_other_has(stage: str, number: str) -> None:
    section = read("docs/methods.md").partition(f"## Stage {number}\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^### (\w+)$", section, flags=re.MULTILINE)) == method_names(stage)


def test_every_policy_and_what_one_may_edit_in_it_is_named() -> None:
    named = set(inline_code(read("docs/settings.md")))
    assert set(PAPERS) | set(Recipe.model_fields) <= named


def test_every_data_set_is_described_as_it_is() -> None:
    rows = [line for line in read("docs/data.md").splitlines() if line.startswith("| `")]
    described = {name: row.split("|")[2:5] for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    for name, known in BUILT_IN.items():
        assert [cell.strip() for cell in described[name]] == [str(known.image_size), str(known.channels), "yes" if known.mirror else "no"]
    assert described.keys() == BUILT_IN.keys()


def test_the_run_folder_is_described() -> None:
    named = set(inline_code(read("docs/run_folder.md")))
    assert HARMLESS | set(COLUMNS) <= named


def test_every_shipped_config_is_in_the_readme_or_among_the_recipes() -> None:
    assert [name for name in shipped_configs() if name not in read("README.md") + read("docs/recipes.md")] == []


def test_the_changelog_ends_at_this_version() -> None:
    first = re.search(r"^## \[(.+?)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), flags=re.MULTILINE)
    assert first is not None
    assert first[1] == modicum.__version__
