"""Which parameters learn: globs, groups, weight decay, and the groups of the published programme.

Learning rates and decays are copied, never computed, so every comparison is exact.
"""

import json
import os
import random
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from eve_vlm.alignment_eve import EveForPreTraining
from eve_vlm.configuration_eve import EveConfig
from eve_vlm.train.parameters import (
    human_count,
    optimizer_groups,
    parameter_settings,
    parameter_table,
    select_trainable,
)
from eve_vlm.train.recipe import load_recipe, stage_recipes
from eve_vlm.train.sections import StageSection


def goldens_folder() -> Path:
    """The folder in EVE_GOLDENS, else the one beside the repository, else the kept subset."""
    if "EVE_GOLDENS" in os.environ:
        return Path(os.environ["EVE_GOLDENS"])
    here = Path(__file__).resolve().parent
    beside = here.parents[1] / "shared" / "goldens"
    return beside if beside.is_dir() else here / "goldens" / "published"


# Published parameter name to ours; digits in brackets are layer numbers.
RENAMES = [
    (r"^model\.(layers|embed_tokens|norm)\b", r"model.language_model.\1"),
    (r"^model\.vision_tower_compressor\.norm_layer\.(\d+)\.0\.", r"aligner.norms.\1."),
    (r"^model\.vision_tower_compressor\.norm_layer\.(\d+)\.1\.", r"aligner.maps.\1."),
    (r"^model\.vision_tower_compressor\.(input|output)_layer\.", r"aligner.\1."),
    (r"^model\.mm_projector\.0\.", r"model.multi_modal_projector.linear_1."),
    (r"^model\.mm_projector\.2\.", r"model.multi_modal_projector.linear_2."),
    (r"\.split_embedding$", r".row_end_embedding"),
    (r"\.vision_tower\.patch_embedding\.", r".vision_tower.patch_projection."),
    (r"\.local_attention\.", r".merge_attention."),
    (r"\.global_attention\.", r".class_attention."),
    (r"_attention\.q\.0\.", r"_attention.query_norm."),
    (r"_attention\.q\.1\.", r"_attention.query."),
    (r"_attention\.kv\.0\.", r"_attention.key_value_norm."),
    (r"_attention\.kv\.1\.", r"_attention.key_value."),
    (r"_attention\.proj\.", r"_attention.output."),
]


def ours(name: str) -> str:
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.query_norm, self.key_value_norm = nn.LayerNorm(4), nn.LayerNorm(4)
        self.query, self.key_value = nn.Linear(4, 4, bias=False), nn.Linear(4, 8, bias=False)
        self.output = nn.Linear(4, 4)


class VisionTower(nn.Module):
    def __init__(self):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(4))
        self.row_end_embedding = nn.Parameter(torch.zeros(4))
        self.patch_projection = nn.Conv2d(3, 4, 2, bias=False)
        self.merge_attention, self.class_attention = Attention(), Attention()


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.self_attn.add_module(name, nn.Linear(4, 4, bias=False))
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.mlp.add_module(name, nn.Linear(4, 4, bias=False))
        self.input_layernorm, self.post_attention_layernorm = LlamaRMSNorm(4), LlamaRMSNorm(4)


class Aligner(nn.Module):
    def __init__(self, maps: int):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(4) for _ in range(maps))
        self.maps = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(maps))
        self.input, self.output = nn.Linear(4, 4), nn.Linear(4, 4)


class Tree(nn.Module):
    """Modules under the names of EveForPreTraining, four wide."""

    def __init__(self, *, layers: int = 2, maps: int = 2, tied: bool = False):
        super().__init__()
        self.model = nn.Module()
        self.model.vision_tower = VisionTower()
        self.model.multi_modal_projector = nn.Module()
        self.model.multi_modal_projector.linear_1 = nn.Linear(4, 4)
        self.model.multi_modal_projector.linear_2 = nn.Linear(4, 4)
        self.model.language_model = nn.Module()
        self.model.language_model.embed_tokens = nn.Embedding(9, 4)
        self.model.language_model.layers = nn.ModuleList(Layer() for _ in range(layers))
        self.model.language_model.norm = LlamaRMSNorm(4)
        self.lm_head = nn.Linear(4, 9, bias=False)
        if tied:
            self.lm_head.weight = self.model.language_model.embed_tokens.weight
        if maps:
            self.aligner = Aligner(maps)


def stage(trainable=("*",), rates=None, *, weight_decay=0.1, no_decay=()) -> StageSection:
    return StageSection(
        name="pretrain",
        trainable=list(trainable),
        learning_rates=rates or {"*": 1e-3},
        weight_decay=weight_decay,
        no_decay=list(no_decay),
        alignment=None,
    )


def published_stage(args: dict) -> StageSection:
    """The rules in goldens/train/README.md as globs."""
    base = args["learning_rate"]
    rates = {}
    if args.get("mm_projector_lr"):  # without it the other special rate is not used either
        rates["model.multi_modal_projector.*"] = args["mm_projector_lr"]
        for glob in ("model.vision_tower.*", "aligner.*")[: 1 + bool(args["requires_cliploss"])]:
            rates[glob] = args.get("vision_tower_lr") or base
    vision = ["model.vision_tower.*", "model.multi_modal_projector.*"]
    vision += ["aligner.*"] * bool(args["requires_cliploss"])
    only_vision = args["tune_vision_tower"]
    if not (only_vision and rates):
        rates["*"] = base
    return stage(vision if only_vision else ["*"], rates, weight_decay=args["weight_decay"])


def test_groups_of_the_published_programme():
    folder = goldens_folder() / "train"
    assert folder.is_dir(), f"{folder} is missing; point EVE_GOLDENS at a folder of goldens"
    files = sorted(folder.glob("*.json"))
    assert files, f"{folder} holds no JSON file"
    for file in files:
        golden = json.loads(file.read_text(encoding="utf-8"))
        args = golden["args"]
        published = [name for group in golden["groups"] for name in group["params"]]
        published += golden["frozen"]
        maps = {match[1] for name in published if (match := re.search(r"norm_layer\.(\d+)", name))}
        tree = Tree(
            layers=args["num_hidden_layers"], maps=len(maps), tied=args["tie_word_embeddings"]
        )
        chosen = published_stage(args)
        select_trainable(tree, chosen)
        found = {
            (group["lr"], group["weight_decay"]): set(group["names"])
            for group in optimizer_groups(tree, chosen)
        }
        wanted: dict[tuple[float, float], set[str]] = {}
        for group in golden["groups"]:
            names = {ours(name) for name in group["params"]}
            wanted.setdefault((group["lr"], group["weight_decay"]), set()).update(names)
        assert found == wanted
        frozen = {name for name, weight in tree.named_parameters() if not weight.requires_grad}
        assert frozen == {ours(name) for name in golden["frozen"] if "clip" not in name}


@pytest.mark.parametrize(
    "file",
    # Those of eve-small have adapters, which this tree has not: tests/test_small_recipes.py.
    [file for name, file in stage_recipes().items() if not name.startswith("eve_small/")],
    ids=lambda file: f"{file.parent.name}/{file.stem}",
)
@pytest.mark.parametrize("tied", [False, True])
def test_every_shipped_recipe_chooses_what_its_stage_says(file, tied):
    recipe = load_recipe(file)
    chosen = recipe.stage
    tree = Tree(tied=tied, maps=2 if chosen.alignment else 0)
    names = select_trainable(tree, chosen)
    tops = {".".join(name.split(".")[:2]) if name.startswith("model.") else name.split(".")[0]
            for name in names}  # fmt: skip
    vision = {"model.vision_tower", "model.multi_modal_projector"}
    vision |= {"aligner"} if chosen.alignment else set()
    # Twins name what learns, because "*" would be their encoder too; their decoder's head is tied.
    head = set() if tied or recipe.model.encoder else {"lm_head"}
    assert (
        tops
        == {
            "language": {"model.language_model"},
            "prealign": vision,
            "pretrain": vision | {"model.language_model"} | head,
            "finetune": vision | {"model.language_model"} | head,
        }[chosen.name]
    )
    assert sum(len(group["names"]) for group in optimizer_groups(tree, chosen)) == len(names)


def test_groups_partition_the_trainable_parameters_for_random_globs():
    for seed in range(60):
        generator = random.Random(seed)
        tree = Tree(tied=generator.random() < 0.5)
        names = [name for name, _ in tree.named_parameters()]
        globs = []
        for name in generator.sample(names, generator.randint(1, 6)):
            steps = name.split(".")
            cut = generator.randint(1, len(steps))
            globs.append(".".join(steps[:cut] + ["*"] * (cut < len(steps))))
        trainable = select_trainable(tree, stage(globs))
        ordered = sorted(set(generator.sample(trainable, min(3, len(trainable)))))
        rates = {name: 10.0**-index for index, name in enumerate(ordered, 1)}
        if len(ordered) < len(trainable):
            rates["*"] = 1.0
        groups = optimizer_groups(tree, stage(globs, rates))
        grouped = [name for group in groups for name in group["names"]]
        assert sorted(grouped) == sorted(trainable) and len(set(grouped)) == len(grouped)
        by_name = dict(tree.named_parameters())
        for group in groups:
            assert [id(by_name[name]) for name in group["names"]] == list(map(id, group["params"]))
            for name in group["names"]:
                assert group["lr"] == rates.get(name, 1.0)
        torch.optim.AdamW(groups)  # refuses a parameter that stands in two groups


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("1_prealign", 29_982_720 + 43_067_392),  # patch embedding with projector, and aligner
        ("2_pretrain", 6_768_398_336 + 43_067_392),
        ("3_finetune", 6_768_398_336 + 43_067_392),
        ("3_finetune_hd", 6_768_398_336 + 43_067_392),
    ],
)
def test_trainable_parameters_of_the_real_model(name, count):
    text = {"model_type": "llama", "vocab_size": 32000, "hidden_size": 4096}
    text |= {"intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    with torch.device("meta"):
        model = EveForPreTraining(
            EveConfig(text_config=text, vision_config={}, alignment_config={})
        )
    chosen = load_recipe(f"eve_7b/{name}").stage
    names = select_trainable(model, chosen)
    weights = dict(model.named_parameters())
    assert sum(weights[each].numel() for each in names) == count
    tree = dict(Tree(layers=32, maps=9).named_parameters())
    assert set(tree) == set(weights)  # so that the tests above speak of the real names
    assert f"{count:,} trained" in parameter_table(model, chosen)


def test_selecting_again_freezes_what_the_stage_before_trained():
    tree = Tree()
    select_trainable(tree, stage())
    names = select_trainable(tree, stage(["lm_head.*"]))
    assert names == ["lm_head.weight"]
    assert [name for name, weight in tree.named_parameters() if weight.requires_grad] == names


def test_tied_weights_are_one_parameter_under_either_name():
    for glob in ("lm_head.*", "model.language_model.embed_tokens.*"):
        tree = Tree(tied=True)
        chosen = stage([glob], {glob: 1e-4})
        assert select_trainable(tree, chosen) == ["model.language_model.embed_tokens.weight"]
        (group,) = optimizer_groups(tree, chosen)
        assert len(group["params"]) == 1
    tree = Tree(tied=True)
    chosen = stage(["*"], {"lm_head.*": 1e-4, "model.language_model.*": 1e-5, "*": 1e-6})
    select_trainable(tree, chosen)
    rates = {setting.name: setting.learning_rate for setting in parameter_settings(tree, chosen)}
    assert rates["model.language_model.embed_tokens.weight"] == 1e-4  # the first line decides
    other_way = stage(["*"], {"model.language_model.*": 1e-5, "lm_head.*": 1e-4, "*": 1e-6})
    rates = {item.name: item.learning_rate for item in parameter_settings(tree, other_way)}
    assert rates["model.language_model.embed_tokens.weight"] == 1e-5


def test_first_matching_glob_decides():
    tree = Tree()
    rates = {"model.vision_tower.class_*": 1e-1, "model.vision_tower.*": 1e-2, "*": 1e-3}
    found = {item.name: item.learning_rate for item in parameter_settings(tree, stage(rates=rates))}
    assert found["model.vision_tower.class_embedding"] == 1e-1
    assert found["model.vision_tower.row_end_embedding"] == 1e-2
    assert found["lm_head.weight"] == 1e-3


class NormedLinear(nn.Linear):
    """Only its name has to do with a normalisation layer."""


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))


def test_weight_decay_spares_biases_and_every_kind_of_norm():
    model = nn.Module()
    model.linear, model.normed = nn.Linear(4, 4), NormedLinear(4, 4)
    model.kinds = nn.ModuleList(
        [
            nn.LayerNorm((2, 4)),
            nn.RMSNorm(4),
            nn.GroupNorm(2, 4),
            nn.BatchNorm1d(4),
            LlamaRMSNorm(4),
            OwnRMSNorm(),
        ]
    )
    model.attention = nn.MultiheadAttention(4, 1)
    decayed = {item.name for item in parameter_settings(model, stage()) if item.weight_decay}
    weights = {"linear.weight", "normed.weight"}
    assert decayed == weights | {"attention.in_proj_weight", "attention.out_proj.weight"}


def test_no_decay_names_further_parameters():
    tree = Tree()
    chosen = stage(no_decay=["*.class_embedding", "*.embed_tokens.*"])
    spared = {item.name for item in parameter_settings(tree, chosen) if not item.weight_decay}
    assert {
        "model.vision_tower.class_embedding",
        "model.language_model.embed_tokens.weight",
    } <= spared
    assert "model.vision_tower.row_end_embedding" not in spared


def refused(action, *arguments) -> str:
    with pytest.raises(ValueError) as caught:
        action(*arguments)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_glob_that_matches_nothing_names_the_nearest():
    text = refused(select_trainable, Tree(), stage(["model.vision_towr.*"]))
    assert "stage.trainable: the glob 'model.vision_towr.*' matches no parameter" in text
    assert "the nearest names are model.vision_tower.*" in text
    text = refused(optimizer_groups, Tree(), stage(rates={"alinger.*": 1e-3, "*": 1e-3}))
    assert "stage.learning_rates: the glob 'alinger.*'" in text and "aligner.*" in text
    text = refused(optimizer_groups, Tree(), stage(no_decay=["*.clas_embedding"]))
    assert "stage.no_decay: the glob '*.clas_embedding'" in text and "class_embedding" in text
    text = refused(select_trainable, Tree(), stage(["MODEL.*"]))  # case counts on every system
    assert "matches no parameter" in text


def test_a_learning_rate_for_frozen_parameters_is_refused():
    tree, chosen = Tree(), stage(["aligner.*"], {"aligner.*": 1e-3, "lm_head.*": 1e-4})
    select_trainable(tree, chosen)
    assert "the glob 'lm_head.*' matches no trainable parameter" in refused(
        optimizer_groups, tree, chosen
    )


def test_a_trainable_parameter_without_learning_rate_is_refused():
    text = refused(optimizer_groups, Tree(), stage(rates={"model.*": 1e-3}))
    assert "no glob matches the trainable parameter 'lm_head.weight'" in text and "'*'" in text


def test_an_idle_glob_is_refused():
    text = refused(optimizer_groups, Tree(), stage(rates={"*": 1e-3, "lm_head.*": 1e-4}))
    assert "the glob 'lm_head.*' is idle" in text and "move it up" in text


def test_parameter_table():
    tree = Tree()
    rates = {"model.vision_tower.*": 4e-4, "model.multi_modal_projector.*": 2e-4}
    chosen = stage(list(rates), rates)
    select_trainable(tree, chosen)
    lines = parameter_table(tree, chosen).splitlines()
    heads = ["part", "tensors", "parameters", "trained", "learning rate", "weight decay"]
    assert lines[0].split() == " ".join(heads).split(" ")
    rows = [line.split() for line in lines[2:-1]]
    assert ["model.vision_tower", "9", "184", "yes", "4.00e-04", "0.1"] in rows
    assert ["model.multi_modal_projector", "2", "8", "yes", "2.00e-04", "0"] in rows
    assert ["lm_head", "1", "36", "no", "-", "-"] in rows
    total = sum(weight.numel() for weight in tree.parameters())
    learning = sum(weight.numel() for weight in tree.parameters() if weight.requires_grad)
    assert lines[-1].startswith(f"{total:,} parameters: {learning:,} trained")
    assert f"{total - learning:,} frozen" in lines[-1]
    assert len({len(line) for line in lines[:-1]}) == 1


def test_human_count():
    numbers = [0, 999, 1_024, 29_982_720, 6_768_398_336]
    assert [human_count(number) for number in numbers] == [
        "0",
        "999",
        "1.02 K",
        "29.98 M",
        "6.77 B",
    ]
