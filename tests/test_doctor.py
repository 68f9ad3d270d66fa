"""`eve doctor` on forged machines, and its self-test on this one and on deliberately broken ones.

The self-test's own tolerances are in `self_test.tolerance`; here it is shown that a healthy machine
is well within them and that a broken one is not. One thing a reader would get wrong: a fake package
whose import fails is put on the path of another process, because in this one the real libraries are
imported already.
"""

import ast
import json
import os
import subprocess
import sys
import time
import urllib.error
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from huggingface_hub import constants
from PIL import Image
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import eve_vlm_command
from eve_vlm import pooled_attention_eve
from eve_vlm.cli import app
from eve_vlm.doctor import checkup as doctor
from eve_vlm.doctor import facts as doctor_facts
from eve_vlm.doctor import findings as doctor_findings
from eve_vlm.doctor import known as doctor_known
from eve_vlm.doctor.facts import Facts
from eve_vlm.doctor.self_test import run_self_test, tolerance
from eve_vlm.doctor.self_test_model import NUMBERS, Bench, formula_numbers, formula_weight
from goldens import make_self_test
from oracle import decoder
from tiny import refused

SOURCE = Path(doctor.__file__).parent
GPU = {
    "name": "Some GPU",
    "free": 70 * 2**30,
    "total": 80 * 2**30,
    "capability": [9, 0],
    "bfloat16": True,
}
TORCH = {
    "version": "2.13.0",
    "cuda_build": None,
    "hip_build": None,
    "threads": 4,
    "mps": False,
    "cuda": False,
    "cuda_warning": "",
    "architectures": [],
    "gpus": [],
    "bfloat16_ratio": 0.6,
}
HEALTHY = Facts(
    versions={
        "eve-vlm": "0.1.0",
        "torch": "2.13.0+cpu",
        "transformers": "5.23.0",
        "pillow": "13.0",
    },
    own=["torch>=2.11", "transformers<6,>=5.17", "pillow>=10"],
    torch=TORCH,
    cores=4,
    memory=(16 * 2**30, 8 * 2**30),
    shared=8 * 2**30,
    disks={"cache folder": 2**36, "working folder": 2**36},
    hub="offline",
)


def with_torch(facts=HEALTHY, **changes):
    return replace(facts, torch=facts.torch | changes)


def with_package(name, version, *, error="", wants=()):
    return replace(
        HEALTHY,
        versions=HEALTHY.versions | {name: version},
        import_errors={name: error} if error else {},
        wants={name: list(wants)},
    )


# --- the self-test on this machine ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_healthy_machine_passes(dtype):
    rows = run_self_test("cpu", dtype, progress=False)
    assert len(rows) == 15
    for row in rows:
        assert row.passed, row
        # Room for kernels of other machines: at most a quarter of what is allowed.
        assert row.difference <= 0.25 * row.tolerance, row


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_healthy_gpu_passes(dtype):
    failed = [row for row in run_self_test("cuda:0", dtype, progress=False) if not row.passed]
    assert not failed, failed


def test_the_patch_embedding_is_float32_in_every_dtype():
    exact, half = (
        next(row for row in run_self_test("cpu", dtype, progress=False) if row.what == what)
        for dtype in ("float32", "bfloat16")
        for what in ("patch embedding",)
    )
    assert half.difference == exact.difference and half.tolerance == exact.tolerance < 1e-5


def test_tolerances_follow_from_the_bits():
    assert tolerance(torch.float32, 0, 0) == (0.0, "whole numbers")
    assert (
        tolerance(torch.bfloat16, 0, 1)[0] == 4 * 2**-8
        and "8 bits" in tolerance(torch.bfloat16, 0, 1)[1]
    )
    assert tolerance(torch.bfloat16, 0, 100)[0] == 10 * tolerance(torch.bfloat16, 0, 1)[0]
    assert tolerance(torch.float32, 300, 144)[0] < 3e-5  # TF32 alone is 2**-11 away


# --- where its numbers come from ------------------------------------------------------------------


def test_both_formulas_make_the_same_model():
    """The package's and the generator's, for every weight; and the generator knows every weight."""
    bench = Bench("cpu", torch.float32)
    shapes = {name: tuple(weight.shape) for name, weight in bench.model.named_parameters()}
    assert shapes == make_self_test.shapes()
    for name, shape in shapes.items():
        expected = make_self_test.weight(name, shape).float()
        assert torch.equal(formula_weight(name, shape), expected), name
        assert torch.equal(expected.bfloat16().float(), expected), f"{name} rounds in bfloat16"
        assert torch.equal(bench.model.get_parameter(name).detach(), expected), name
    assert formula_numbers("x", 50).tolist() == make_self_test.whole_numbers("x", 50)
    for index, picture in enumerate(bench.pictures):
        assert picture.tobytes() == make_self_test.picture(index).tobytes()


def test_the_file_is_small_and_holds_the_case():
    assert NUMBERS.stat().st_size <= make_self_test.LIMIT_BYTES
    stored = json.loads(NUMBERS.read_text(encoding="utf-8"))
    assert stored["case"]["text"] == make_self_test.TEXT
    assert [tuple(words) for words in stored["case"]["words"]] == make_self_test.WORDS
    assert len(stored["expected"]["gradients"]) == len(make_self_test.GRADIENTS)


@pytest.mark.slow
def test_the_file_is_what_the_slow_loops_make():
    """Equal but for the ninth digit, which another torch may round otherwise."""

    def same(one, other):
        if isinstance(one, dict):
            return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
        if isinstance(one, (list, tuple)):
            return len(one) == len(other) and all(map(same, one, other))
        if isinstance(one, str):
            return one == other
        return one == pytest.approx(other, rel=1e-7, abs=1e-9)

    assert same(make_self_test.make(), json.loads(NUMBERS.read_text(encoding="utf-8")))


def test_the_slow_decoder_is_a_llama():
    """Against the library's, whose norms and angles are float32 in any dtype: 1e-6 is theirs."""
    text = make_self_test.TEXT | {"num_hidden_layers": 2}
    rope = {"rope_type": "default", "rope_theta": text["rope_theta"]}
    settings = {name: value for name, value in text.items() if name != "rope_theta"}
    config = LlamaConfig(**settings, rope_parameters=rope, attn_implementation="eager")
    model = LlamaForCausalLM(config).double().eval()
    weights = {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(make_self_test.weight(name, weight.shape))
            weights[name] = weight.detach()
        embeds = make_self_test.weight("text", (7, 32))
        made = decoder.decode(embeds, text, weights)
        expected = model(inputs_embeds=embeds[None], output_hidden_states=True)
    for one, other in zip(made.hidden, expected.hidden_states, strict=True):
        assert float((one - other[0]).abs().max()) < 1e-6 * max(1, float(other.abs().max()))
    assert float((made.logits - expected.logits[0]).abs().max()) < 1e-5


def test_the_slow_optimizer_is_adamw():
    """In float64, where only the order of a few operations differs."""
    weight = make_self_test.weight("a", (6, 5)).requires_grad_()
    weight.grad = make_self_test.weight("b", (6, 5))
    expected = decoder.adamw(weight.detach().clone(), weight.grad, make_self_test.ADAMW)
    torch.optim.AdamW([weight], **make_self_test.ADAMW).step()
    assert float((weight - expected).detach().abs().max()) < 1e-12


# --- broken machines ------------------------------------------------------------------------------


def wrong_scale(monkeypatch):
    """Of a head's width instead of the full one."""
    right = pooled_attention_eve.EvePooledAttention.queries
    monkeypatch.setattr(
        pooled_attention_eve.EvePooledAttention,
        "queries",
        lambda self, pooled: right(self, pooled) * self.num_heads**0.5,
    )


def wrong_resize(monkeypatch):
    """Another filter than the one asked for."""
    right = Image.Image.resize
    monkeypatch.setattr(
        Image.Image,
        "resize",
        lambda self, size, resample=None: right(self, size, Image.Resampling.BILINEAR),
    )


def ten_bits(monkeypatch):
    """Products that read 10 bits of their factors, as TF32 does."""
    right = F.linear

    def rounded(x):
        return x.half().to(x.dtype) if x.dtype == torch.float32 else x

    monkeypatch.setattr(
        F, "linear", lambda x, weight, bias=None: right(rounded(x), rounded(weight), bias)
    )


def approximate_gelu(monkeypatch):
    """The tanh form, up to 5e-4 away."""
    right = F.gelu
    monkeypatch.setattr(F, "gelu", lambda x, approximate="none": right(x, approximate="tanh"))


def kernel_without_mask(monkeypatch):
    """A fused attention kernel that forgets the padding."""
    right = F.scaled_dot_product_attention

    def forgetful(query, key, value, attn_mask=None, **settings):
        if attn_mask is not None:
            settings["is_causal"] = query.shape[2] > 1
        return right(query, key, value, **settings)

    monkeypatch.setattr(F, "scaled_dot_product_attention", forgetful)


def cache_of_zeros(monkeypatch):
    """A cache that loses what it was given."""
    right = DynamicCache.update

    def update(self, key, value, *arguments, **settings):
        keys, values = right(self, key, value, *arguments, **settings)
        return (keys, values * 0) if key.shape[2] == 1 else (keys, values)

    monkeypatch.setattr(DynamicCache, "update", update)


def optimizer_without_decay(monkeypatch):
    right = torch.optim.AdamW

    def without(parameters, weight_decay, **settings):
        return right(parameters, weight_decay=0.0, **settings)

    monkeypatch.setattr(torch.optim, "AdamW", without)


def not_a_number(monkeypatch):
    right = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda *arguments: right(*arguments) * torch.nan)


@pytest.mark.parametrize(
    ("spoil", "failing", "passing"),
    [
        (wrong_scale, "patch embedding", "resized pictures, grey levels"),
        (wrong_resize, "resized pictures, grey levels", "grids and token counts"),
        (ten_bits, "patch embedding", "greedy tokens that differ"),
        (approximate_gelu, "words and pictures", "patch embedding"),
        (kernel_without_mask, "batch == single, left padding", "logits"),
        (cache_of_zeros, "without cache == with cache", "logits"),
        (optimizer_without_decay, "weights after an AdamW step", "gradients of 12 weights"),
        (not_a_number, "logits", "grids and token counts"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_broken_machine_fails(monkeypatch, spoil, failing, passing):
    spoil(monkeypatch)
    rows = {row.what: row for row in run_self_test("cpu", "float32", progress=False)}
    assert not rows[failing].passed
    assert rows[passing].passed


def test_wrong_scale_fails_in_bfloat16_too(monkeypatch):
    wrong_scale(monkeypatch)
    rows = {row.what: row for row in run_self_test("cpu", "bfloat16", progress=False)}
    assert not rows["patch embedding"].passed


def test_a_kernel_that_raises_is_a_failed_line(monkeypatch):
    def raising(*arguments, **settings):
        raise RuntimeError("CUDA error: no kernel image is available\nsecond line")

    monkeypatch.setattr(F, "linear", raising)
    rows = run_self_test("cpu", "float32", progress=False)
    broken = [row for row in rows if row.difference is None]
    assert len(broken) >= 10 and not any(row.passed for row in broken)
    assert broken[0].why == "RuntimeError: CUDA error: no kernel image is available"
    text = doctor.as_text([], {("cpu", "float32"): rows})
    assert "did not run" in text and "second line" not in text
    assert doctor.is_bad([], {("cpu", "float32"): rows})


# --- findings on forged machines ------------------------------------------------------------------


def finding(check, facts):
    found = check(facts)
    return found if isinstance(found, doctor_findings.Finding) else list(found)


def test_a_healthy_forged_machine_is_all_well():
    found = doctor.examine(HEALTHY)
    assert {one.state for one in found} == {"ok"} and not doctor.is_bad(found, {})
    assert len({one.name for one in found if one.group == doctor_known.GROUP}) == 15


@pytest.mark.parametrize(
    ("check", "facts", "state", "parts"),
    [
        (
            doctor_known.torchvision,
            with_package(
                "torchvision",
                "0.26.0",
                error="RuntimeError: operator torchvision::nms does not exist",
                wants=["numpy", "torch (==2.11.0)"],
            ),
            "bad",
            ("nms does not exist", "built for torch 2.11.0", "here is 2.13.0+cpu"),
        ),
        (
            doctor_known.torchvision,
            with_package("torchvision", "0.26.0", wants=["torch==2.11.0"]),
            "warn",
            ("built for torch 2.11.0",),
        ),
        (
            doctor_known.torchvision,
            with_package("torchvision", "0.28.0", wants=["torch==2.13.0"]),
            "ok",
            ("can be imported",),
        ),
        (
            doctor_known.flash_attention,
            with_package("flash-attn", "2.8.3", error="ImportError: undefined symbol: _ZN3c10"),
            "bad",
            ("undefined symbol: _ZN3c10",),
        ),
        (
            doctor_known.deepspeed,
            with_torch(with_package("deepspeed", "0.19.8"), cuda_build="13.0"),
            "warn",
            ("without the CUDA toolkit",),
        ),
        (
            doctor_known.deepspeed,
            with_package("deepspeed", "0.19.8", error="MissingCUDAException: CUDA_HOME"),
            "bad",
            ("CUDA_HOME",),
        ),
        (
            doctor_known.unused_gpu,
            replace(HEALTHY, driver="570.86.10"),
            "warn",
            ("CPU build", "570.86.10"),
        ),
        (
            doctor_known.unused_gpu,
            with_torch(
                replace(HEALTHY, driver="470.1"), cuda_build="13.0", cuda_warning="driver too old"
            ),
            "warn",
            ("CUDA 13.0", "driver too old"),
        ),
        (
            doctor_known.unused_gpu,
            replace(HEALTHY, driver="570.1", environment={"CUDA_VISIBLE_DEVICES": ""}),
            "ok",
            ("hidden",),
        ),
        (
            doctor_known.gpu_architectures,
            with_torch(gpus=[GPU | {"capability": [6, 1]}], architectures=["sm_75", "sm_90"]),
            "bad",
            ("sm_75, sm_90", "Some GPU (6.1)"),
        ),
        (
            doctor_known.gpu_architectures,
            with_torch(gpus=[GPU | {"capability": [8, 9]}], architectures=["sm_80"]),
            "ok",
            (),
        ),
        (
            doctor_known.gpu_architectures,
            with_torch(gpus=[GPU | {"capability": [12, 0]}], architectures=["sm_90", "compute_90"]),
            "ok",
            (),
        ),
        (
            doctor_known.gpu_bfloat16,
            with_torch(gpus=[GPU | {"bfloat16": False}]),
            "warn",
            ("Some GPU only emulates",),
        ),
        (doctor_known.cpu_bfloat16, with_torch(bfloat16_ratio=25.2), "warn", ("25 times",)),
        (doctor_known.cpu_bfloat16, with_torch(bfloat16_ratio=25.2, gpus=[GPU]), "ok", ()),
        (doctor_known.float16, HEALTHY, "ok", ("float32 in every dtype",)),
        (
            doctor_known.tensor_float32,
            replace(with_torch(gpus=[GPU]), environment={"TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1"}),
            "warn",
            ("10 bits",),
        ),
        (doctor_known.threads, with_torch(threads=64), "warn", ("64 threads", "4 cores")),
        (doctor_known.threads, replace(HEALTHY, limit=1.5), "warn", ("1.5 cores",)),
        (doctor_known.shared_memory, replace(HEALTHY, shared=2**26), "warn", ("0.1 GiB",)),
        (
            doctor_known.assistant_mask,
            replace(HEALTHY, versions={"transformers": "5.17.0"}),
            "warn",
            ("5.17.0",),
        ),
        (
            doctor_known.adapters,
            replace(HEALTHY, versions={"transformers": "5.24.0", "peft": "0.21.2"}),
            "ok",
            ("0.21.2", "asks for 0.22", "PEFT's own"),
        ),
        *(
            (
                doctor_known.adapters,
                replace(HEALTHY, versions=versions),
                "ok",
                ("not installed, or",),
            )
            for versions in (
                {"transformers": "5.24.0"},
                {"transformers": "5.23.0", "peft": "0.21.2"},
                {"transformers": "5.24.0", "peft": "0.22.0"},
            )
        ),
        (
            doctor_known.package_import,
            replace(HEALTHY, import_errors={"eve-vlm": "in torchvision: RuntimeError: nms"}),
            "bad",
            ("in torchvision",),
        ),
    ],
)
def test_known_trouble(check, facts, state, parts):
    found = check(facts)
    assert found.state == state, found
    for part in parts:
        assert part in found.found
    if state != "ok":
        assert found.mend


@pytest.mark.parametrize(
    ("versions", "name", "parts"),
    [
        ({"transformers": "5.16.2"}, "transformers", ("5.16.2", ">=5.17,<6")),
        ({"transformers": "6.0.0"}, "transformers", ("6.0.0",)),
        ({"torch": "2.9.0+cu128"}, "torch", ("2.9.0+cu128", ">=2.11")),
    ],
)
def test_versions_out_of_range(versions, name, parts):
    facts = replace(HEALTHY, versions=HEALTHY.versions | versions)
    (bad,) = [one for one in doctor_findings.versions(facts) if one.state == "bad"]
    assert bad.name == name and bad.mend.startswith(f"pip install '{name}>=")
    for part in parts:
        assert part in bad.found


def test_a_missing_package_and_a_folder_that_is_not_installed():
    lacking = {name: version for name, version in HEALTHY.versions.items() if name != "pillow"}
    (bad,) = [
        one
        for one in doctor_findings.versions(replace(HEALTHY, versions=lacking))
        if one.state == "bad"
    ]
    assert (bad.name, bad.found) == ("pillow", "not installed")
    loose = replace(HEALTHY, own=[], versions={"torch": "2.13.0"})
    states = {one.name: one.state for one in doctor_findings.versions(loose)}
    assert states["eve-vlm"] == "warn" and "bad" not in states.values()


def test_extras_name_what_is_missing():
    own = [
        "torch>=2.11",
        'peft>=0.17; extra == "lora"',
        'matplotlib>=3.9; extra == "demo"',
        'pillow>=10.1; extra == "demo"',
        "deepspeed>=0.17; (sys_platform == 'no such system') and extra == 'train'",
    ]
    versions = HEALTHY.versions | {"matplotlib": "3.2"}
    found = {
        one.name: one
        for one in doctor_findings.extras(replace(HEALTHY, own=own, versions=versions))
    }
    assert found.keys() == {"lora", "demo"}  # nothing of `train` is for this system
    assert found["lora"].mend == "pip install 'peft>=0.17'"
    assert found["demo"].found == "1 missing" and "matplotlib>=3.9" in found["demo"].mend
    complete = replace(HEALTHY, own=own, versions=versions | {"peft": "0.21", "matplotlib": "3.10"})
    assert {one.found.split()[0] for one in doctor_findings.extras(complete)} == {"complete"}


def test_devices_and_disks():
    facts = replace(
        with_torch(gpus=[GPU]),
        driver="570.1",
        disks={"cache folder": None, "working folder": 2**30},
    )
    found = {one.name: one for one in doctor_findings.devices(facts)}
    assert "80.0 GiB" in found["GPU 0"].found and "9.0" in found["GPU 0"].found
    assert "driver 570.1" in found["GPU 0"].found
    assert found["cache folder"].state == "bad" and "EVE_CACHE" in found["cache folder"].mend
    assert found["working folder"].state == "warn"


def test_broken_torch_is_told_and_not_tested():
    facts = replace(HEALTHY, torch={}, import_errors={"torch": "OSError: libcudart.so.13: no"})
    found = doctor.examine(facts)
    assert any("libcudart" in one.found for one in found if one.state == "bad")
    assert doctor.self_tests(facts, [("cpu", "float32")]) == {}


def test_where_the_self_test_runs():
    gpu = with_torch(gpus=[GPU])
    assert doctor.places(HEALTHY, None, []) == [("cpu", "float32")]
    assert doctor.places(gpu, None, []) == [("cuda:0", "float32"), ("cuda:0", "bfloat16")]
    assert doctor.places(gpu, "cpu", ["bfloat16"]) == [("cpu", "bfloat16")]
    assert doctor.places(gpu, "cuda", ["float16"]) == [("cuda:0", "float16")]
    assert doctor.places(with_torch(mps=True), None, [])[0] == ("mps", "float32")
    old = with_torch(gpus=[GPU | {"bfloat16": False}])
    assert doctor.places(old, None, []) == [("cuda:0", "float32")]
    assert "one of cpu" in refused(lambda: doctor.places(HEALTHY, "cuda:3", []))
    flash = replace(gpu, versions=gpu.versions | {"flash-attn": "2.8.3"})
    assert doctor.kernels(flash, "cuda:0", "bfloat16", []) == ["eager", "flash_attention_2"]
    assert doctor.kernels(flash, "cuda:0", "float32", []) == ["eager"]
    assert doctor.kernels(gpu, "cpu", "float32", ["flex_attention"]) == ["eager", "flex_attention"]


# --- asking the machine ---------------------------------------------------------------------------


def test_limits_of_a_control_group(tmp_path):
    assert doctor_facts.cpu_limit(tmp_path) is None and doctor_facts.memory_limit(tmp_path) is None
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("-1\n")
    (tmp_path / "cpu" / "cpu.cfs_period_us").write_text("100000\n")
    assert doctor_facts.cpu_limit(tmp_path) is None
    (tmp_path / "cpu" / "cpu.cfs_quota_us").write_text("250000\n")
    assert doctor_facts.cpu_limit(tmp_path) == 2.5
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert doctor_facts.cpu_limit(tmp_path) is None
    (tmp_path / "cpu.max").write_text("150000 100000\n")
    assert doctor_facts.cpu_limit(tmp_path) == 1.5
    (tmp_path / "memory.max").write_text("max\n")
    assert doctor_facts.memory_limit(tmp_path) is None
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert doctor_facts.memory_limit(tmp_path) == 2**30


def test_the_driver_is_read_from_the_kernel(tmp_path):
    file = tmp_path / "version"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release\n")
    assert doctor_facts.nvidia_driver(file) == "570.86.10"


def test_folders_that_can_be_written_to(tmp_path, monkeypatch):
    assert doctor_facts.free_disk(tmp_path / "not" / "there") > 0
    assert list(tmp_path.iterdir()) == []

    def refuse(self):
        raise PermissionError(13, "no")

    monkeypatch.setattr(Path, "touch", refuse)
    assert doctor_facts.free_disk(tmp_path) is None


def test_the_hub_is_never_waited_for(monkeypatch):
    assert doctor_facts.ask_hub(offline=True) == "not asked"
    assert doctor_facts.ask_hub() == "offline"  # HF_HUB_OFFLINE is set for the tests
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)

    def slow(request, timeout):
        time.sleep(2 * doctor_facts.HUB_PATIENCE)
        raise OSError("too late")

    monkeypatch.setattr("urllib.request.urlopen", slow)
    start = time.monotonic()
    assert doctor_facts.ask_hub() == "not reachable"
    assert time.monotonic() - start < doctor_facts.HUB_PATIENCE + 2  # and a busy machine's delay

    def refusing(request, timeout):
        raise urllib.error.HTTPError(request.full_url, 403, "no", None, None)

    monkeypatch.setattr("urllib.request.urlopen", refusing)
    assert doctor_facts.ask_hub() == "reachable"


def test_the_error_in_a_traceback():
    text = (
        'Traceback (most recent call last):\n  File "a.py", line 1\n'
        "RuntimeError: operator torchvision::nms does not exist\n"
    )
    assert doctor_facts.error_of(text) == "RuntimeError: operator torchvision::nms does not exist"
    assert doctor_facts.error_of("Segmentation fault") == "Segmentation fault"
    assert doctor_facts.error_of("") == "it ended without a word"
    home = str(Path.home())
    assert doctor_facts.error_of(f"OSError: {home}/lib/x.so") == "OSError: ~/lib/x.so"


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def forged(monkeypatch):
    """Calls `eve doctor` on a forged machine."""

    def call(facts, *arguments):
        monkeypatch.setattr(doctor_facts, "gather", lambda **settings: facts)
        return CliRunner().invoke(app, ["doctor", *arguments])

    return call


def test_exit_codes_and_report(forged):
    done = forged(HEALTHY)
    assert done.exit_code == 0, done.output
    assert "Self-test on cpu in float32" in done.output and "all 15 lines" in done.output
    warned = forged(with_torch(threads=64), "--no-self-test")
    assert warned.exit_code == 0 and "export OMP_NUM_THREADS=4" in warned.output
    assert "0 bad, 1 to know about; the self-test did not run." in warned.output
    bad = forged(replace(HEALTHY, disks={"cache folder": None}), "--no-self-test")
    assert bad.exit_code == 1 and "  BAD   cache folder" in bad.output


def test_a_failed_self_test_is_exit_code_1(forged, monkeypatch):
    wrong_scale(monkeypatch)
    done = forged(HEALTHY)
    assert done.exit_code == 1 and "  BAD   patch embedding" in done.output
    assert "please report it" in " ".join(done.output.split())


def test_json_and_verbose(forged, monkeypatch):
    data = json.loads(forged(HEALTHY, "--json", "--dtype", "bfloat16").stdout)
    assert data["bad"] is False
    assert {row["dtype"] for row in data["self_test"]} == {"bfloat16"}
    assert {one["state"] for one in data["findings"]} == {"ok"}
    assert "Pillow" not in forged(HEALTHY, "--no-self-test").output
    assert "Pillow" in forged(HEALTHY, "--no-self-test", "--verbose").output
    not_a_number(monkeypatch)
    spoilt = json.loads(forged(HEALTHY, "--json").stdout)
    assert spoilt["bad"] and None in [row["difference"] for row in spoilt["self_test"]]


def test_the_report_names_nobody(forged):
    """On the real facts of this machine."""
    facts = doctor_facts.gather(offline=True)
    text = forged(facts, "--no-self-test", "--verbose").output
    for private in (str(Path.home()), os.uname().nodename, str(Path.cwd())):
        assert len(private) < 6 or private not in text
    assert facts.torch["threads"] >= 1 and facts.versions["torch"] == torch.__version__


# --- where the libraries cannot be imported -------------------------------------------------------


def test_the_doctor_imports_nothing_that_may_be_broken():
    files = [path for path in SOURCE.glob("*.py") if not path.stem.startswith("self_test")]
    for path in [*files, Path(eve_vlm_command.__file__)]:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert name.split(".")[0] in sys.stdlib_module_names or "doctor" in name


def fake(folder, name, version, code, requires=""):
    """A package whose import runs `code`, with the metadata of an installed one."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code, encoding="utf-8")
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    (info / "METADATA").write_text(text, encoding="utf-8")


def eve(folder, *arguments):
    path = os.pathsep.join([str(folder), str(SOURCE.parent)])
    return subprocess.run(
        [sys.executable, "-m", "eve_vlm_command", *arguments],
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,  # seconds; far above the twenty that a busy machine takes
    )


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """A torchvision and a flash-attn that were built for another torch."""
    folder = tmp_path_factory.mktemp("broken")
    nms = 'raise RuntimeError("operator torchvision::nms does not exist")\n'
    fake(folder, "torchvision", "0.26.0", nms, "Requires-Dist: torch (==2.11.0)\n")
    symbol = 'raise ImportError("flash_attn_2_cuda.so: undefined symbol: _ZN3c105Error")\n'
    fake(folder, "flash_attn", "2.8.3", symbol)
    return folder


def test_doctor_survives_what_breaks_transformers(broken):
    done = eve(broken, "doctor", "--offline", "--json")
    assert done.returncode == 1, done.stderr
    found = {one["name"]: one for one in json.loads(done.stdout)["findings"]}
    assert "operator torchvision::nms does not exist" in found["import of eve_vlm"]["found"]
    assert "built for torch 2.11.0" in found["torchvision"]["found"]
    assert "undefined symbol: _ZN3c105Error" in found["flash-attn"]["found"]
    assert json.loads(done.stdout)["self_test"] == []


def test_other_commands_say_the_culprit_in_one_sentence(broken):
    done = eve(broken, "ask", "What is this?")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("eve: ") and "torchvision::nms" in line and "`eve doctor`" in line


def test_the_command_line_starts_without_torch():
    """All its files, with torch and transformers forbidden."""
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None)\n"
        "import eve_vlm_command; eve_vlm_command.without_model('why')\n"
        "import eve_vlm.cli; print(sys.modules['eve_vlm'].import_error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(SOURCE.parent)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout == "why\n", done.stderr


def test_explaining_names_the_first_cause():
    try:
        try:
            raise RuntimeError("operator torchvision::nms does not exist\nmore")
        except RuntimeError as cause:
            raise ModuleNotFoundError("Could not import module 'AutoProcessor'") from cause
    except ModuleNotFoundError as error:
        text = eve_vlm_command.explain(error)
    assert text.endswith("RuntimeError: operator torchvision::nms does not exist")


def test_the_started_command_is_the_same(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eve", "--version"])
    with pytest.raises(SystemExit) as stop:
        eve_vlm_command.main()
    assert not stop.value.code and capsys.readouterr().out.startswith("eve-vlm ")
