"""Recipes: what is read, resolved and refused."""

import pytest

from fastrl.errors import ConfigError
from fastrl.recipe import load_recipe, resolve_stage
from fastrl.recipe_seeds import stage_seed
from fastrl.runs import PATH_FIELDS, RUN_TYPES

RECIPE = """
name: tiny
seed: 7
short:
  ppo.num_iterations: 1
  ppo.sampling.max_new_tokens: 4
stages:
  - name: sft
    kind: sft
    model_name_or_path: models/base
    data: [sft/a.jsonl, /absolute/b.jsonl]
  - name: ppo
    kind: ppo
    model_name_or_path: "@sft"
    reward_model: models/reward
    prompts: ["@sft/prompts.jsonl"]
    num_iterations: 30
    sampling: {temperature: 0.7}
"""


@pytest.fixture
def recipe_file(tmp_path):
    def write(text=RECIPE, old="", new=""):
        assert old in text
        (tmp_path / "tiny.yaml").write_text(text.replace(old, new) if old else text)
        return tmp_path / "tiny.yaml"
    return write


def test_a_recipe_is_read_in_order(recipe_file):
    recipe = load_recipe(recipe_file())
    assert (recipe.name, recipe.seeds) == ("tiny", (7,))
    assert [(stage.name, stage.kind) for stage in recipe.stages] == [("sft", "sft"), ("ppo", "ppo")]
    assert recipe.stages[1].config.num_iterations == 30
    assert recipe.stages[1].references == ["@sft", "models/reward", "@sft/prompts.jsonl"]


def test_paths_are_resolved_in_output_folder_and_data_root(recipe_file, tmp_path):
    sft, ppo = (resolve_stage(stage, tmp_path / "out", tmp_path / "root")
                for stage in load_recipe(recipe_file()).stages)
    assert sft.model_name_or_path == str(tmp_path / "root/models/base")
    assert sft.data == (str(tmp_path / "root/sft/a.jsonl"), "/absolute/b.jsonl")
    assert sft.reward_model is None and sft.ptx_data == ()
    assert sft.output_dir == str(tmp_path / "out/sft")
    assert ppo.model_name_or_path == str(tmp_path / "out/sft/model")
    assert ppo.prompts == (str(tmp_path / "out/sft/prompts.jsonl"),)


def test_overrides_come_after_the_short_form(recipe_file):
    short = load_recipe(recipe_file(), short=True).stages[1].config
    assert (short.num_iterations, short.sampling.max_new_tokens) == (1, 4)
    assert short.sampling.temperature == 0.7
    both = load_recipe(recipe_file(), ["ppo.num_iterations=5", "ppo.engine.page_size=8",
                                       "ppo.learning_rate=1e-3", "seed=9"], short=True)
    ppo = both.stages[1].config
    assert (ppo.num_iterations, ppo.engine.page_size, ppo.learning_rate) == (5, 8, 1e-3)
    assert both.seeds == (9,)


def test_stages_get_seeds_of_their_own(recipe_file):
    sft, ppo = (stage.config.seed for stage in load_recipe(recipe_file()).stages)
    assert sft == stage_seed(7, "sft") and ppo == stage_seed(7, "ppo") and sft != ppo
    assert load_recipe(recipe_file(), ["ppo.seed=3"]).stages[1].config.seed == 3


@pytest.mark.parametrize("old, new, message", [
    ("seed: 7", "sed: 7", "tiny.yaml: unknown key 'sed'; did you mean 'seed'"),
    ("seed: 7", "seed: one", "tiny.yaml: seed: expected a whole number"),
    ("name: tiny", "name: 3", "tiny.yaml: name: expected text, got 3"),
    ("kind: ppo", "kind: pop", "tiny.yaml, stage 'ppo': kind: unknown key 'pop'; did you mean "
                               "'ppo'"),
    ("name: ppo", "name: sft", "stage 'sft' is there twice"),
    ("name: ppo", "name: a/b", r"stages\[1\]: expected settings with a name of letters"),
    ("num_iterations: 30", "num_iteration: 30",
     "tiny.yaml, stage 'ppo': unknown key 'num_iteration'; did you mean 'num_iterations'"),
    ("num_iterations: 30", "kl_coef: small",
     "tiny.yaml, stage 'ppo': kl_coef: expected a number, got 'small'"),
    ("num_iterations: 30", "output_dir: x", "output_dir: a stage's folder is its name"),
    ("num_iterations: 30", "num_iterations: 30\n    num_iterations: 4", "is given twice"),
    ('"@sft"', '"@stf"', "model_name_or_path: '@stf' must name an earlier stage: unknown key "
                         "'stf'; did you mean 'sft'"),
    ("models/base", '"@ppo"', "stage 'sft': model_name_or_path: '@ppo' must name an earlier stage"),
    ("ppo.num_iterations: 1", "pop.num_iterations: 1", "did you mean 'ppo'"),
])
def test_mistakes_are_named(recipe_file, old, new, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file(old=old, new=new), short=True)


DATA_STAGES = """
name: data
stages:
  - {name: prompts, kind: prompts, model_name_or_path: m}
  - {name: rank, kind: rank, model_name_or_path: m, prompts: "@prompts/train.jsonl"}
  - {name: reward, kind: reward, model_name_or_path: m, data: ["@rank/rankings.jsonl"]}
"""


@pytest.mark.parametrize("old, new", [
    ("train.jsonl", "trian.jsonl"),
    ("@rank/rankings.jsonl", "@rank"),
    ("@rank/rankings.jsonl", "@rank/heldout.jsonl"),  # the stage has no heldout_prompts
    ("model_name_or_path: m, data", 'model_name_or_path: "@rank", data'),
])
def test_a_reference_to_what_no_stage_makes_is_found_before_anything_runs(recipe_file, old, new):
    load_recipe(recipe_file(DATA_STAGES))
    with pytest.raises(ConfigError, match="expected something that stage '(rank|prompts)' makes"):
        load_recipe(recipe_file(DATA_STAGES, old, new))


@pytest.mark.parametrize("override, message", [
    ("ppo.lam", "expected stage.field=value, got 'ppo.lam'"),
    ("pop.lam=1", "unknown key 'pop'; did you mean 'ppo'"),
    ("ppo.kind=sft", "neither name nor kind"),
    ("ppo=1", "expected stage.field"),
    ("ppo.lamm=1", "unknown key 'lamm'; did you mean 'lam'"),
    ("ppo.num_iterations.x=1", "has no settings inside"),
])
def test_wrong_overrides_are_named(recipe_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file(), [override])


def test_a_recipe_without_stages_or_short_form_is_refused(recipe_file):
    with pytest.raises(ConfigError, match="stages: expected a list of stages"):
        load_recipe(recipe_file("name: a\nstages: []\n"))
    short = RECIPE[RECIPE.index("short:"):RECIPE.index("stages:")]
    with pytest.raises(ConfigError, match="short: expected settings"):
        load_recipe(recipe_file(old=short, new="\n"), short=True)


def test_candidates_need_a_stage_that_selects(recipe_file):
    candidates = "model_name_or_path: models/base\n    select_by: reward"
    file = recipe_file(old="model_name_or_path: models/base", new=candidates)
    with pytest.raises(ConfigError, match="stage 'sft': select_by: expected a reward_model, or a "
                                          "later stage of kind select"):
        load_recipe(file)
    select = """
  - name: best
    kind: select
    model_name_or_path: "@sft"
    reward_model: models/reward
    prompts: [p.jsonl]
"""
    file.write_text(file.read_text() + select)
    assert len(load_recipe(file).stages) == 3


def test_every_setting_that_is_a_path_is_known():
    fields = {name for run in RUN_TYPES.values() for name in run.__dataclass_fields__}
    assert set(PATH_FIELDS) <= fields
    suspicious = {name for name in fields if name.endswith(("_model", "_or_path", "data", "text"))}
    assert suspicious <= set(PATH_FIELDS)


def test_seeds_repeat_every_stage_with_what_it_refers_to(recipe_file):
    recipe = load_recipe(recipe_file(old="seed: 7", new="seeds: [7, 3]"))
    assert recipe.seeds == (7, 3)
    assert [stage.name for stage in recipe.stages] == ["sft-7", "ppo-7", "sft-3", "ppo-3"]
    alone = {seed: load_recipe(recipe_file(old="seed: 7", new=f"seed: {seed}")).stages
             for seed in (7, 3)}
    for stage, same in zip(recipe.stages, alone[7] + alone[3], strict=True):
        seed = stage.name[-1]
        assert stage.config.seed == same.config.seed  # the run of one seed, under another name
        assert stage.config.output_dir == stage.name
        if stage.kind == "ppo":
            assert stage.config.model_name_or_path == f"@sft-{seed}"
            assert stage.config.prompts == (f"@sft-{seed}/prompts.jsonl",)
            assert stage.config.reward_model == "models/reward"
            assert stage.config.sampling == same.config.sampling
    changed = load_recipe(recipe_file(old="seed: 7", new="seeds: [7, 3]"), ["ppo.kl_coef=0.5"])
    assert [s.config.kl_coef for s in changed.stages if s.kind == "ppo"] == [0.5, 0.5]
    one = load_recipe(recipe_file(old="seed: 7", new="seeds: [7, 3]"), ["seed=4"])
    assert [stage.name for stage in one.stages] == ["sft", "ppo"] and one.seeds == (4,)
    several = load_recipe(recipe_file(), ["seeds=[1, 2]"])
    assert [stage.name for stage in several.stages] == ["sft-1", "ppo-1", "sft-2", "ppo-2"]


@pytest.mark.parametrize("new, message", [
    ("seeds: []", "seeds: expected a list of different whole numbers of at least 0, got \\[\\]"),
    ("seeds: 3", "seeds: expected a list"),
    ("seeds: [1, 1]", "seeds: expected a list of different"),
    ("seeds: [1, true]", "seeds: expected a list"),
    ("seeds: [1, -2]", "seeds: expected a list"),
    ("seed: 7\nseeds: [1]", "expected seed or seeds, got both"),
])
def test_seeds_that_cannot_be_meant_are_refused(recipe_file, new, message):
    with pytest.raises(ConfigError, match=f"tiny.yaml: {message}"):
        load_recipe(recipe_file(old="seed: 7", new=new))
