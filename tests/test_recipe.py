"""A recipe says what is wrong with it in the user's own spelling, and what is written out reads back."""

import shlex
from pathlib import Path

import pytest
import yaml

from lrcompress import recipe as recipes
from lrcompress.cli import cli
from lrcompress.errors import RecipeError
from lrcompress.recipe import Recipe, dump, find, load, parse, shipped_recipes
from lrcompress.recovery.settings import Recovery

SHIPPED = shipped_recipes()
DATA = {"train": {"path": "a.txt"}}


def mistake(value: object) -> str:
    """The message for a recipe given as YAML or plain values."""
    with pytest.raises(RecipeError) as caught:
        parse(yaml.safe_load(value) if isinstance(value, str) else value)
    return str(caught.value)


def written(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


# shipped recipes ----------------------------------------------------------------------------------------------


def test_the_shipped_recipes_are_those_of_the_documentation():
    assert set(SHIPPED) == {
        "attn_only", "mlp_only", "all_linear", "llama_qv", "smallest", "frontier", "demo", "seed_tau01", "encoder_sst2",
        "gpt2_sst2", "masked_lm", "token_classes", "seq2seq", "image_classes", "speech", "embeddings",
        "text_pairs",
    }  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_valid_and_short(name: str):
    recipe = load(find(name))
    assert recipe.data is not None
    assert recipe.data.test is not None
    assert recipe.evaluate
    assert len(SHIPPED[name].read_text(encoding="utf-8").splitlines()) <= 40


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_begins_with_the_command_that_runs_it(name: str):
    first = SHIPPED[name].read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# lrcompress run ")
    words = shlex.split(first.removeprefix("# "))
    context = cli.make_context(words[0], words[1:])
    _, command, rest = cli.resolve_command(context, words[1:])
    assert command is not None
    parsed = command.make_context("run", rest)
    assert parsed.params["model"]
    assert parsed.params["recipe"] == name


def test_seed_tau01_is_the_source_to_the_letter():
    recovery = load(find("seed_tau01")).recovery
    assert recovery is not None
    assert (recovery.start, recovery.scaling, recovery.loss.kind) == ("lora", "source", "task")
    assert [recovery.tau.at(step, 300) for step in (0, 150, 299)] == [0.1, 0.1, 0.1]


def test_defaults_are_the_documented_ones():
    recipe = Recipe()
    assert (recipe.method.kind, recipe.ranks.kind, recipe.task) == ("kron", "budget", "auto")
    assert recipe.ranks.keep_parameters == 0.5
    recovery = recipe.recovery
    assert recovery is not None
    assert (recovery.start, recovery.tau.schedule, recovery.loss.kind) == ("method", "constant", "distill")
    assert recovery.tau.start == 1.0
    assert Recovery.model_validate({"start": "lora"}).tau.schedule == "theseus"  # BA = 0: something has to carry it
    assert Recovery.model_validate({"start": "lora", "tau": 0.1}).tau.start == 0.1
    assert (recovery.train, recovery.steps) == ("factors", 300)


# finding and reading ------------------------------------------------------------------------------------------


def test_a_path_is_found_before_a_bare_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert find("attn_only") == SHIPPED["attn_only"]
    written(tmp_path, "targets: {}")
    assert find("recipe.yaml") == Path("recipe.yaml")


@pytest.mark.parametrize("name", ["atn_only", "atn_only.yaml", "some/folder/atn_only.yaml"])
def test_an_unknown_recipe_is_answered_with_the_nearest(name: str):
    with pytest.raises(RecipeError, match=r"(?s)no recipe `.*atn_only.*nearest: attn_only"):
        find(name)


@pytest.mark.parametrize(
    "text", ["targets: {groups: [attention", "- a\n- list", "just words", b"\xff\xfe\x00".decode("latin-1")]
)
def test_a_file_that_is_no_mapping_is_an_error_with_its_name(tmp_path: Path, text: str):
    file = tmp_path / "recipe.yaml"
    file.write_bytes(text.encode("latin-1"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml"):
        load(file)


@pytest.mark.parametrize("value", [["svd"], "words", 3])
def test_values_that_are_no_mapping_are_an_error(value: object):
    with pytest.raises(RecipeError, match="no mapping of keys"):
        parse(value)


def test_an_empty_file_is_the_default_recipe(tmp_path: Path):
    assert load(written(tmp_path, "# nothing yet\n")) == Recipe()


# unknown keys -------------------------------------------------------------------------------------------------

MISSPELLED = [
    ("target: {}", "target", "targets", "calibration, method, ranks"),
    ("targets: {group: [all]}", "targets.group", "groups", "groups, include, exclude"),
    ("data: {trian: {path: a.txt}}", "data.trian", "train", "train, validation, test"),
    ("data: {train: {path: a.txt, txt: body}}", "data.train.txt", "text", "path, name, split, text, text_pair, label"),
    ("calibration: {sequence: 3}", "calibration.sequence", "sequences", "sequences, length, batch"),
    ("method: {kind: svd_llm, dampng: 1}", "method.dampng", "damping", "kind, damping"),
    ("method: {kind: kron, damping: 1}", "method.damping", "input_damping", "input_damping, output_damping"),
    (
        "ranks: {kind: uniform, keep_paramters: 0.5}",
        "ranks.keep_paramters",
        "keep_parameters",
        "kind, keep_parameters",
    ),
    ("recovery: {step: 3}", "recovery.step", "steps", "start, tau, scaling"),
    (
        "recovery: {tau: {shedule: linear}}",
        "recovery.tau.shedule",
        "schedule",
        "schedule, start, end, until",
    ),
    ("recovery: {loss: {temprature: 1}}", "recovery.loss.temprature", "temperature", "kind, temperature"),
    ("evaluate: [{kind: perplexity, sride: 3}]", "evaluate.0.sride", "", "allowed here: kind"),
    ("evaluation: {strid: 3}", "evaluation.strid", "stride", "split, length, stride, batch"),
    ("timing: {promt: 3}", "timing.promt", "prompt", "batches, prompt, generate"),
    ("method: svd\nranks: {kind: fixed, rnk: 3, rank: 2}", "ranks.rnk", "rank", "rank, patterns"),
    ("baselines: [svd, {kind: asvd, alfa: 1}]", "baselines.1.alfa", "alpha", "kind, alpha, damping"),
]


@pytest.mark.parametrize(("text", "path", "near", "allowed"), MISSPELLED, ids=[row[1] for row in MISSPELLED])
def test_a_misspelled_key_names_its_path_the_nearest_and_the_allowed(text: str, path: str, near: str, allowed: str):
    message = mistake(text)
    line = next(line for line in message.splitlines() if f"`{path}`" in line)
    assert "is no key" in line
    assert allowed in line
    assert ("nearest: " in line) == bool(near)
    assert near in line.partition("nearest: ")[2].partition(";")[0]
    assert "do: " in message


@pytest.mark.parametrize(
    ("text", "path", "near", "allowed"),
    [
        ("method: {kind: svdllm}", "method.kind", "svd_llm", "svd, fwsvd, asvd, svd_llm, kron"),
        ("method: fwsdv", "method.kind", "fwsvd", "svd, fwsvd, asvd, svd_llm, kron"),
        (
            "ranks: {kind: buget, keep_parameters: 0.5}",
            "ranks.kind",
            "budget",
            "fixed, uniform, energy, budget",
        ),
        ("baselines: [svd, krno]", "baselines.1.kind", "kron", "svd, fwsvd, asvd, svd_llm, kron"),
        ("evaluate: [perplexty]", "evaluate.0.kind", "perplexity", "perplexity, accuracy, divergence"),
    ],
)
def test_a_misspelled_kind_is_answered_with_all_kinds(text: str, path: str, near: str, allowed: str):
    message = mistake(text)
    assert f"`{path}`" in message
    assert near in message.partition("nearest: ")[2]
    assert allowed in message


@pytest.mark.parametrize(
    ("text", "section", "kinds"),
    [
        ("method: {knd: svd}", "method", "svd, fwsvd, asvd, svd_llm, kron"),
        ("ranks: {keep_parameters: 0.5}", "ranks", "fixed, uniform, energy, budget"),
        ("evaluate: [{}]", "evaluate.0", "perplexity, accuracy, divergence"),
    ],
)
def test_a_section_without_a_kind_says_which_there_are(text: str, section: str, kinds: str):
    message = mistake(text)
    assert f"`{section}` needs a `kind`" in message
    assert kinds in message


def test_all_mistakes_are_named_at_once():
    message = mistake("targts: {}\nrecovery: {stepps: 3}\nranks: {kind: uniform, keep_parameters: 2}")
    assert "3 mistakes" in message
    assert all(key in message for key in ("`targts`", "`recovery.stepps`", "`ranks.keep_parameters`"))


# bounds -------------------------------------------------------------------------------------------------------

OUT_OF_BOUNDS = [
    ("ranks.keep_parameters", 0),
    ("ranks.keep_parameters", -0.1),
    ("ranks.keep_parameters", 1.01),
    ("ranks.keep_parameters", ".nan"),
    ("ranks.round_to", 0),
    ("recovery.tau.start", 0),
    ("recovery.tau.start", 1.5),
    ("recovery.tau.end", 0),
    ("recovery.tau.until", 0),
    ("recovery.tau.until", 1.1),
    ("recovery.loss.temperature", 0),
    ("recovery.loss.hidden", -1),
    ("recovery.steps", 0),
    ("recovery.steps", 1.5),
    ("recovery.batch", 0),
    ("recovery.length", 1),
    ("recovery.learning_rate", 0),
    ("recovery.learning_rate", ".inf"),
    ("recovery.warmup", 2),
    ("recovery.gradient_clip", 0),
    ("recovery.train", "everything"),
    ("recovery.tau.schedule", "sine"),
    ("calibration.sequences", 0),
    ("calibration.length", 1),
    ("method.input_damping", -1),
    ("evaluation.stride", 0),
    ("evaluation.split", "train"),
    ("timing.prompt", 0),
    ("timing.repeats", 2),
    ("task", "chess"),
]


@pytest.mark.parametrize(("key", "value"), OUT_OF_BOUNDS, ids=[f"{key}={v}" for key, v in OUT_OF_BOUNDS])
def test_a_value_out_of_bounds_is_named_by_its_path_with_what_was_got(tmp_path: Path, key: str, value: object):
    file = written(tmp_path, "method: {kind: kron}\nranks: {kind: budget, keep_parameters: 0.5}\n")
    with pytest.raises(RecipeError) as caught:
        load(file, [f"{key}={value}"])
    line = next(line for line in str(caught.value).splitlines() if f"`{key}`" in line)
    assert str(value).lstrip(".") in line
    assert "should" in line  # what is allowed
    assert "do: " in str(caught.value)


@pytest.mark.parametrize("value", [0, -1, 1.5])
def test_a_bare_tau_has_the_same_bounds(value: float):
    message = mistake({"recovery": {"tau": value}})
    assert "`recovery.tau" in message
    assert str(value) in message


def test_list_items_are_named_by_number():
    assert "`timing.batches.1`" in mistake("timing: {batches: [1, 0]}")
    assert "`targets.groups.0`" in mistake("targets: {groups: [atention]}")


@pytest.mark.parametrize("text", ["baselines: svd", "evaluate: perplexity"])
def test_a_word_in_place_of_a_list_is_named_as_it_was_written(text: str):
    key, _, word = text.partition(": ")
    assert f"`{key}`: Input should be a list, got '{word}'" in mistake(text)


@pytest.mark.parametrize(("key", "value"), [("recovery", 3), ("ranks", 0.3), ("data", "a.txt"), ("targets", "all")])
def test_a_value_in_place_of_a_section_is_named_with_what_was_got(key: str, value: object):
    message = mistake({key: value})
    assert f"`{key}`: Input should be a" in message
    assert f"got {value!r}" in message


@pytest.mark.parametrize("method", ["svd", "fwsvd", "asvd", "svd_llm"])
def test_a_budget_refuses_methods_whose_values_do_not_compare_and_says_why(method: str):
    message = mistake({"method": method, "ranks": {"kind": "budget", "keep_parameters": 0.5}})
    assert f"`{method}` do not estimate the loss" in message
    assert "kron" in message.partition("use method")[2]
    assert "uniform" in message
    assert parse({"method": method, "ranks": {"kind": "uniform", "keep_parameters": 0.5}}).method.kind == method


def test_a_baseline_given_twice_is_refused():
    assert "twice" in mistake("baselines: [svd, {kind: svd}]")


@pytest.mark.parametrize("text", ["{kind: fixed}", "{kind: fixed, patterns: {a: 0}}", "{kind: fixed, rank: 0}"])
def test_fixed_ranks_need_a_rank_of_at_least_one(text: str):
    assert "`ranks" in mistake(f"ranks: {text}")


# short forms --------------------------------------------------------------------------------------------------


def test_bare_kinds_stand_for_sections():
    bare = parse(yaml.safe_load("method: kron\nbaselines: [svd, asvd]\nevaluate: [perplexity, divergence]"))
    full = parse(
        {
            "method": {"kind": "kron"},
            "baselines": [{"kind": "svd"}, {"kind": "asvd"}],
            "evaluate": [{"kind": "perplexity"}, {"kind": "divergence"}],
        }
    )
    assert bare == full
    assert [method.kind for method in bare.baselines] == ["svd", "asvd"]


@pytest.mark.parametrize("value", [1.0, 1, 0.1])
def test_a_number_for_tau_is_a_constant(value: float):
    recovery = parse({"recovery": {"tau": value}}).recovery
    assert recovery is not None
    assert recovery.tau.schedule == "constant"
    assert [recovery.tau.at(step, 10) for step in (0, 9)] == [value, value]
    assert recovery.tau.final(10) == value


def test_null_switches_recovery_and_timing_off():
    recipe = parse(yaml.safe_load("recovery: null\ntiming: null"))
    assert recipe.recovery is None
    assert recipe.timing is None


def test_a_number_without_a_dot_before_its_exponent_is_a_number(tmp_path: Path):
    recovery = load(written(tmp_path, "recovery: {learning_rate: 1e-3}")).recovery
    assert recovery is not None
    assert recovery.learning_rate == 1e-3


# settings over the file ---------------------------------------------------------------------------------------


def test_settings_override_the_file(tmp_path: Path):
    file = written(tmp_path, "ranks: {kind: budget, keep_parameters: 0.5}\nbaselines: [svd]\nrecovery: {steps: 9}")
    recipe = load(
        file,
        [
            "ranks.keep_parameters=0.3",
            "baselines=[svd_llm, {kind: asvd, alpha: 0.25}]",
            "recovery.tau.start=0.9",
            "recovery.tau.schedule=cosine",
            "timing.batches=[1, 2]",
            "data={train: {path: 'a=b.txt'}}",
            'data.train.separator="\\n"',
            "evaluate=[perplexity]",
        ],
    )
    assert recipe.ranks.keep_parameters == 0.3
    assert [m.kind for m in recipe.baselines] == ["svd_llm", "asvd"]
    assert recipe.baselines[1].alpha == 0.25
    assert recipe.recovery is not None
    assert recipe.recovery.steps == 9
    assert (recipe.recovery.tau.start, recipe.recovery.tau.schedule) == (0.9, "cosine")
    assert recipe.timing is not None
    assert recipe.timing.batches == (1, 2)
    assert recipe.data is not None
    assert (recipe.data.train.path, recipe.data.train.separator) == ("a=b.txt", "\n")
    assert [e.kind for e in recipe.evaluate] == ["perplexity"]


def test_settings_are_applied_in_order_and_can_replace_a_section(tmp_path: Path):
    file = written(tmp_path, "ranks: {kind: budget, keep_parameters: 0.5}")
    recipe = load(file, ["ranks={kind: uniform, keep_parameters: 0.2}", "ranks.keep_parameters=0.1", "recovery=null"])
    assert (recipe.ranks.kind, recipe.ranks.keep_parameters, recipe.recovery) == ("uniform", 0.1, None)


@pytest.mark.parametrize("setting", ["ranks.keep_parameters", "=3", ""])
def test_a_setting_of_another_form_is_refused_with_the_form(tmp_path: Path, setting: str):
    with pytest.raises(RecipeError, match=r"(?s)--set.*allowed: key\.path=value.*do: "):
        load(written(tmp_path, ""), [setting])


def test_a_setting_whose_value_is_no_yaml_is_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"--set baselines=\[svd"):
        load(written(tmp_path, ""), ["baselines=[svd"])


def test_a_setting_inside_something_that_is_no_section_is_refused(tmp_path: Path):
    file = written(tmp_path, "baselines: [svd]")
    with pytest.raises(RecipeError, match=r"`baselines` is \['svd'\], not a section"):
        load(file, ["baselines.0=asvd"])


def test_a_misspelled_setting_is_a_misspelled_key(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"`recovery\.stpes` is no key; nearest: steps"):
        load(written(tmp_path, ""), ["recovery.stpes=3"])


# writing out --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_written_out_reads_back(name: str):
    recipe = load(SHIPPED[name])
    assert parse(yaml.safe_load(dump(recipe))) == recipe


def test_a_recipe_written_out_has_every_default():
    text = dump(parse({"data": DATA}))
    assert parse(yaml.safe_load(text)) == parse({"data": DATA})
    assert {"sequences: 512", "keep_parameters: 0.5", "schedule: constant", "gradient_clip: 1.0"} <= {
        line.strip() for line in text.splitlines()
    }


def test_odd_values_survive_being_written_out(tmp_path: Path):
    value = {
        "targets": {"include": ["*.c_attn"], "exclude": ["h.0.*"]},
        "data": {"train": {"path": "größe.tsv", "text": 0, "label": 1, "separator": "\n\n"}},
        "ranks": {"kind": "fixed", "rank": 4, "patterns": {"*.c_fc": 2}},
        "recovery": {"tau": 1.0},
    }
    recipe = parse(value)
    file = written(tmp_path, dump(recipe))
    assert load(file) == recipe
    assert "größe" in file.read_text(encoding="utf-8")


def test_a_recipe_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        recipes.Recipe().task = "causal-lm"
