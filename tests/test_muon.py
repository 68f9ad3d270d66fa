"""Muon beside AdamW: against torch's two optimizers, singular values, and a run that is resumed.

`torch.optim.Muon` multiplies in bfloat16, so its private function is replaced by one of this file:
the same polynomial applied to singular values, in float64.  Everything is bit for bit unless a test
says otherwise.
"""

import json
import shutil

import pytest
import torch
import yaml
from torch import nn

import tiny
from eve_vlm.train.checkpoints import checkpoints_in
from eve_vlm.train.muon import MuonAdamW, orthogonal
from eve_vlm.train.parameters import optimizer_groups, parameter_settings, select_trainable
from eve_vlm.train.recipe import load_recipe
from eve_vlm.train.run import train
from eve_vlm.train.sections import StageSection
from eve_vlm.train.trainer import EveTrainer

SHAPES = ((24, 24), (40, 12), (12, 40), (1, 20), (20, 1), (1, 1))
RATE, DECAY = 0.02, 0.1
LOW, HIGH = 0.68, 1.21  # of singular values that were 0.0015 of the norm or more


def polynomial(values):
    """Five times the published quintic, in the type of the values."""
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def by_singular_values(matrix, *_):
    """What Newton-Schulz steps come to, without one."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u * polynomial(s / s.norm().clamp(min=1e-7)) @ v).to(matrix.dtype)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(shapes=SHAPES):
    return [nn.Parameter(random(*shape, seed=place)) for place, shape in enumerate(shapes)]


def set_gradients(params, step):
    for place, parameter in enumerate(params):
        parameter.grad = random(*parameter.shape, seed=1000 + 50 * step + place)


# --- the step -------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, DECAY])
def test_matrices_move_as_by_the_library(monkeypatch, decay):
    """Rounding of float32 (6e-8 of entries below 1) grows 3.4445**5 = 485 times in five products:
    at most 3e-5 of a step, whose entries are below 0.2 * sqrt(40) * 1.21 = 1.6 rates."""
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", by_singular_values)
    ours, theirs = parameters(), parameters()
    made = MuonAdamW([{"params": ours, "muon": True}], lr=RATE, weight_decay=decay)
    expected = torch.optim.Muon(
        theirs, lr=RATE, weight_decay=decay, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(6):
        before = [one.detach().clone() for one in ours]
        for params, optimizer in ((ours, made), (theirs, expected)):
            set_gradients(params, step)
            if step == 2:  # momentum goes on without a gradient of its own
                for parameter in params:
                    parameter.grad.zero_()
            optimizer.step()
        for one, other, start in zip(ours, theirs, before, strict=True):
            one, other = one.detach(), other.detach()
            assert float((one - other).abs().max()) < (step + 1) * RATE * 1.6 * 3e-5
            assert float((one - start).abs().max()) > RATE * 0.05


@pytest.mark.parametrize("fused", [False, True])
def test_all_else_moves_as_by_adamw_alone(fused):
    settings = {"lr": RATE, "betas": (0.9, 0.98), "weight_decay": DECAY, "fused": fused}
    rest_shapes = ((7,), (5, 3), (2, 3, 4, 4), (9, 6))
    matrices, rest, alone = parameters(), parameters(rest_shapes), parameters(rest_shapes)
    made = MuonAdamW(
        [
            {"params": rest[:2], "lr": 0.003},
            {"params": matrices, "muon": True},
            {"params": rest[2:], "weight_decay": 0.0},
        ],
        **settings,
    )
    expected = torch.optim.AdamW(
        [{"params": alone[:2], "lr": 0.003}, {"params": alone[2:], "weight_decay": 0.0}],
        **settings,
    )
    for step in range(5):
        set_gradients(rest, step)
        set_gradients(alone, step)
        set_gradients(matrices, step)
        made.step()
        expected.step()
        # Whoever looks at gradients behind the step finds them.
        assert all(one.grad.equal(random(*one.shape, seed=1000 + 50 * step + place))
                   for place, one in enumerate(matrices))  # fmt: skip
    for one, other in zip(rest, alone, strict=True):
        assert one.equal(other) and made.state[one].keys() == expected.state[other].keys()
    assert all(not one.equal(start) for one, start in zip(matrices, parameters(), strict=True))


def test_without_a_gradient_a_matrix_stays_and_has_no_state():
    one, other, vector = parameters([(6, 4), (6, 4), (5,)])
    start = one.detach().clone()
    made = MuonAdamW(
        [{"params": [one, other], "muon": True}, {"params": [vector]}], lr=RATE, weight_decay=DECAY
    )
    other.grad = random(6, 4)
    made.step()
    assert one.equal(start) and one not in made.state and vector not in made.state
    assert not other.equal(start) and float(made.state[other]["step"]) == 1


def test_a_gradient_of_zeros_only_decays():
    (matrix,) = parameters([(6, 4)])
    start = matrix.detach().clone()
    made = MuonAdamW([{"params": [matrix], "muon": True}], lr=RATE, weight_decay=DECAY)
    for _ in range(3):
        matrix.grad = torch.zeros(6, 4)
        made.step()
    # Three roundings of float32 on either side.
    torch.testing.assert_close(matrix.data, start * (1 - RATE * DECAY) ** 3, rtol=4e-7, atol=0)


def test_rates_of_a_schedule_reach_both():
    """Steps of Muon have singular values of 0.68 to 1.21 times 0.2 * rate * sqrt(side), the first
    of AdamW is the rate in every entry (1e-8 beside gradients of 0.5: 2e-8 of it)."""
    base, factors = {True: 0.01, False: 0.03}, (1.0, 0.5, 0.125, 0.0)
    for number, factor in enumerate(factors):
        (matrix, vector) = parameters([(16, 16), (16,)])
        starts = [one.detach().clone() for one in (matrix, vector)]
        made = MuonAdamW(
            [{"params": [matrix], "muon": True, "lr": base[True]}, {"params": [vector]}],
            **{"lr": base[False], "weight_decay": 0.0},
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: factors[step])
        for _ in range(number):
            made.step()  # no gradients yet
            schedule.step()
        matrix.grad, vector.grad = torch.eye(16) + 0.01 * random(16, 16), torch.full((16,), 0.5)
        made.step()
        moved = torch.linalg.svdvals((starts[0] - matrix.detach()).double())
        unit = 0.2 * base[True] * 16**0.5
        assert float(moved.min()) >= LOW * factor * unit - 1e-6  # float32 beside entries of 3
        assert float(moved.max()) <= HIGH * factor * unit + 1e-6
        wanted = torch.full((16,), base[False] * factor)
        torch.testing.assert_close(starts[1] - vector.detach(), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_a_state_that_is_loaded_goes_on_as_if_nothing_had_happened(tmp_path, fused):
    def made(params):
        groups = [{"params": params[:3], "muon": True}, {"params": params[3:], "lr": 0.004}]
        return MuonAdamW(groups, lr=RATE, weight_decay=DECAY, fused=fused)

    def steps(params, optimizer, numbers):
        for number in numbers:
            set_gradients(params, number)
            optimizer.step()

    shapes = (*SHAPES[:3], (7,), (4, 4))
    whole = parameters(shapes)
    optimizer = made(whole)
    steps(whole, optimizer, range(3))
    torch.save([optimizer.state_dict(), whole], tmp_path / "state.pt")
    steps(whole, optimizer, range(3, 7))
    state, resumed = torch.load(tmp_path / "state.pt", weights_only=True)
    again = made(resumed)
    again.load_state_dict(state)
    steps(resumed, again, range(3, 7))
    assert all(one.equal(other) for one, other in zip(whole, resumed, strict=True))
    for one, other in zip(whole, resumed, strict=True):
        kept, wanted = again.state[other], optimizer.state[one]
        assert kept.keys() == wanted.keys()
        assert all(kept[name].equal(wanted[name]) for name in wanted)
    # One value for each weight of a matrix, where AdamW keeps two.
    assert optimizer.state[whole[0]].keys() == {"step", "momentum"}
    assert optimizer.state[whole[4]].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_of_float16_is_obeyed(fused):
    """Gradients times a power of two are undone without rounding; an infinity moves nothing."""
    shapes = ((6, 4), (5,))
    plain, scaled = parameters(shapes), parameters(shapes)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def made(params):
        groups = [{"params": params[:1], "muon": True}, {"params": params[1:]}]
        return MuonAdamW(groups, lr=RATE, fused=fused)

    expected, optimizer = made(plain), made(scaled)
    set_gradients(plain, 0)
    expected.step()
    scaler.scale(torch.ones(()))  # makes its state
    for bad in (True, False):
        set_gradients(scaled, 0)
        for parameter in scaled:
            parameter.grad *= scaler.get_scale()
        if bad:
            scaled[1].grad[0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert all(one.equal(o) for one, o in zip(scaled, parameters(shapes), strict=True))
    assert all(one.equal(other) for one, other in zip(plain, scaled, strict=True))


def test_what_is_no_matrix_is_refused():
    text = tiny.refused(lambda: MuonAdamW([{"params": parameters([(5,)]), "muon": True}]))
    assert "has shape (5,)" in text
    made = MuonAdamW([{"params": parameters([(5, 2)]), "muon": True}])
    assert "no closure" in tiny.refused(lambda: made.step(lambda: 0.0))


# --- orthogonal -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(32, 32), (96, 24), (24, 96), (1, 50), (50, 1), (1, 1)])
@pytest.mark.parametrize("size", [1e-2, 1.0, 1e4])
def test_orthogonal_keeps_singular_vectors_and_evens_singular_values(shape, size):
    """By an SVD in float64.  The spectrum falls to 0.002 of the norm, where the polynomial still
    reaches 0.68; float32 in five products adds 485 * 6e-8 = 3e-5, and the 1e-7 that keeps zeros
    from being divided by is 1e-5 of the smallest norm, so 1e-4 is allowed."""
    rank = min(shape)
    u, v = (torch.linalg.qr(random(side, rank, seed=side).double())[0] for side in shape)
    falling = torch.logspace(0, -2.4, rank, dtype=torch.float64)
    falling = falling / falling.norm()
    assert float(falling.min()) > 0.0015 or rank == 1
    made = orthogonal((u * (size * falling) @ v.T).float())
    assert made.shape == shape and made.dtype == torch.float32
    values = torch.linalg.svdvals(made.double())
    assert float(values.min()) > LOW and float(values.max()) < HIGH
    inside = u.T @ made.double() @ v
    assert float((inside - torch.diag(polynomial(falling))).abs().max()) < 1e-4
    # Nothing outside the span of the vectors.
    assert float((u @ inside @ v.T - made.double()).abs().max()) < 1e-4


def test_the_bounds_are_those_of_the_polynomial():
    values = polynomial(torch.logspace(-2.82, 0, 1_000_001, dtype=torch.float64))
    assert LOW < float(values.min()) < LOW + 0.01 and HIGH - 0.01 < float(values.max()) < HIGH


def test_orthogonal_of_zeros_is_zeros():
    assert not orthogonal(torch.zeros(4, 6)).any()


# --- which parameters -----------------------------------------------------------------------------


def stage(muon, *, trainable=("*",), rates=None):
    return StageSection(
        name="pretrain",
        trainable=list(trainable),
        learning_rates=rates or {"*": 1e-3},
        weight_decay=0.1,
        muon=list(muon),
        alignment=None,
    )


def moved_by_muon(model, section):
    select_trainable(model, section)
    return {one.name for one in parameter_settings(model, section) if one.muon}


@pytest.mark.parametrize("tied", [False, True])
def test_matrices_of_linear_layers_are_muons_and_nothing_else_is(tied):
    model = tiny.model(tiny.config(aligned=True, tie_word_embeddings=tied))
    linear = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    assert linear == moved_by_muon(model, stage(["*"]))
    assert len(linear) > 7 * tiny.LAYERS  # also of patch embedding, projector and aligner
    kinds = dict(model.named_parameters())
    rest = kinds.keys() - linear
    assert {"model.language_model.embed_tokens.weight", "model.language_model.norm.weight"} < rest
    assert [name for name in rest if kinds[name].ndim == 4]  # the patch convolution
    assert tied or "lm_head.weight" in rest


def test_groups_split_by_muon_and_keep_rates_and_decay():
    model = tiny.model()
    section = stage(
        ["model.language_model.*"], rates={"model.language_model.layers.0.*": 5e-4, "*": 1e-3}
    )
    select_trainable(model, section)
    groups = optimizer_groups(model, section)
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    matrices = [group for group in groups if group["muon"]]
    assert {(group["lr"], group["weight_decay"]) for group in matrices} == {
        (5e-4, 0.1),
        (1e-3, 0.1),
    }
    for group in matrices:
        assert all(name.startswith("model.language_model.layers.") for name in group["names"])
        assert all(("layers.0." in name) == (group["lr"] == 5e-4) for name in group["names"])
    assert sum(len(group["names"]) for group in matrices) == 7 * tiny.LAYERS


def test_globs_that_name_no_matrix_of_muons_are_refused():
    model = tiny.model()
    for glob in ("*.q_prj.*", "*norm.weight", "lm_head.*", "*.embed_tokens.*"):
        text = tiny.refused(lambda glob=glob: moved_by_muon(model, stage(["*", glob])))
        assert f"stage.muon: the glob {glob!r} matches no trainable matrix" in text
        assert "correct or remove it" in text
    frozen = stage(["*.layers.*"], trainable=["model.multi_modal_projector.*"])
    assert "matches no trainable matrix" in tiny.refused(lambda: moved_by_muon(model, frozen))


# --- recipes and runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Of a recipe with Muon, which saves every two steps."""
    folder = tmp_path_factory.mktemp("muon")
    found = tiny.recipe_data(tiny.llava_file(folder / "data"), folder / "unused")
    found["stage"] |= {"muon": ["*"], "weight_decay": 0.1}
    found["training"] |= {
        "save_strategy": "steps",
        "save_steps": 2,
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 2,
    }
    return found


@pytest.fixture
def optimizers(monkeypatch):
    """Those that trainers made."""
    made, plain = [], EveTrainer.create_optimizer

    def noted(self, *arguments):
        made.append(plain(self, *arguments))
        return made[-1]

    monkeypatch.setattr(EveTrainer, "create_optimizer", noted)
    return made


def load(file):
    return torch.load(file, weights_only=True)


@pytest.mark.usefixtures("no_drawings")
def test_a_run_that_is_resumed_ends_as_one_that_was_not(keys, tmp_path, optimizers):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(tiny.recipe(tmp_path / "whole.yaml", keys, f"output_dir={whole}"))
    assert type(optimizers[0]) is MuonAdamW
    shutil.copytree(whole, resumed)
    for file in ("run.json", "model.safetensors"):
        (resumed / file).unlink()
    shutil.rmtree(resumed / "checkpoint-4")
    said = []
    again = tiny.recipe(tmp_path / "resumed.yaml", keys, f"output_dir={resumed}")
    train(again, say=said.append)
    assert "it goes on from step 2." in said[-1]
    names = ["model.safetensors", "checkpoint-4/model.safetensors"]
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in names)
    states = [load(one / "checkpoint-4" / "optimizer.pt") for one in (whole, resumed)]
    assert states[0]["param_groups"] == states[1]["param_groups"]
    assert [group["muon"] for group in states[0]["param_groups"]].count(True) == 1
    counted = set()
    for number, wanted in states[0]["state"].items():
        kept = states[1]["state"][number]
        assert kept.keys() == wanted.keys()
        assert all(kept[name].equal(wanted[name]) for name in wanted)
        counted |= {(len(wanted), float(wanted["step"]))}
    assert counted == {(2, 4.0), (3, 4.0)}
    losses = [
        [entry["loss"] for entry in json.loads((one / "run.json").read_text())["losses"]]
        for one in (whole, resumed)
    ]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
    assert len(checkpoints_in(resumed)) == 2


@pytest.mark.usefixtures("no_drawings")
def test_without_muon_the_optimizer_is_the_plain_one(keys, tmp_path, optimizers):
    recipe = tiny.recipe(
        tmp_path / "r.yaml", keys, f"output_dir={tmp_path / 'run'}", "stage.muon=[]"
    )
    train(recipe)
    assert type(optimizers[0]) is torch.optim.AdamW
    fresh = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], fused=True)
    # A schedule adds the rate that it began with.
    known = fresh.param_groups[0].keys() | {"initial_lr"}
    assert all(group.keys() == known for group in optimizers[0].param_groups)
    (last,) = (tmp_path / "run").glob("checkpoint-4")
    assert all("muon" not in group for group in load(last / "optimizer.pt")["param_groups"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.optim=adafactor", "stands beside training.optim: adafactor; use adamw_torch_"),
        ("training.optim=sgd", "use adamw_torch_fused or adamw_torch there"),
        ("devices.strategy=zero2", "needs whole matrices, which zero2 shares out; take devices."),
        ("devices.strategy=zero3", "which zero3 shares out"),
        ("devices.strategy=fsdp2", "which fsdp2 shares out"),
    ],
)
def test_what_muon_cannot_stand_beside_is_refused(keys, tmp_path, override, words):
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    text = tiny.refused(lambda: load_recipe(file, [override]))
    assert "stage.muon" in text and words in text
    load_recipe(file, [override, "stage.muon=[]"])


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_both_of_torchs_adamw_may_stand_beside_it(keys, tmp_path, optim):
    recipe = tiny.recipe(tmp_path / "recipe.yaml", keys, f"training.optim={optim}")
    assert recipe.stage.muon == ["*"] and recipe.training["optim"] == optim
