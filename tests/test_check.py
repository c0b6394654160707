"""What is said at the start and by --check, each message provoked by a stand-in; what a step is forecast to take, by hand."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import command

import gpu
import train
from data_types import UpdateStats
from harness import card, check, forecast, run
from harness import plan as planning
from harness.config import load_config
from harness.console import PhaseWatch
from harness.forecast import PROMPT_TOKENS, decoding
from harness.made_up import random_episodes
from harness.plan import GIB, find_shape, make_plan

ROOT = Path(__file__).parent.parent
FEW = [
    "training.batch_size=8",
    "training.num_questions_per_batch=2",
    "training.max_gen_len=24",
    "training.micro_batch_tokens=300",
]


pytestmark = pytest.mark.usefixtures("own_signals", "one_thread")


@pytest.fixture
def a_card(monkeypatch, tmp_path):
    """A40, by what PyTorch would say of it."""
    stands = SimpleNamespace(
        name="NVIDIA A40", capability=(8, 6), free=44.0 * GIB, total=44.5 * GIB
    )
    for name, stand_in in (
        ("is_available", lambda: True),
        ("device_count", lambda: 1),
        ("get_device_name", lambda: stands.name),
        ("get_device_capability", lambda: stands.capability),
        ("mem_get_info", lambda device=None: (int(stands.free), int(stands.total))),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(card, "free_bytes", lambda device: 60 * GIB)
    monkeypatch.setattr(card, "CONTAINER_LIMIT", tmp_path / "nowhere")
    return stands


# ---------------------------------------------------------------- the start


DRIVER_TEXT = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Sat Aug 19 01:15:15 UTC 2023\nGCC version:  gcc version 12.3.0\n"
NO_CARD = "model.device=cuda, but no CUDA device is here"


@pytest.mark.parametrize(
    ("built_for", "driver", "said", "unsaid"),
    [
        (
            "13.2",
            "535.104.05",
            [
                "the NVIDIA driver 535.104.05 is too old for PyTorch",
                "built for CUDA 13.2, which needs driver 580 or "
                "newer; update the driver, or install a build for CUDA 12.6: UV_TORCH_BACKEND=cu126 uv pip install",
            ],
            NO_CARD,
        ),
        (
            "12.6",
            "470.82.01",
            ["driver 470.82.01 is too old", "which needs driver 525 or newer; update the driver"],
            "UV_TORCH",
        ),
        ("12.6", "535.104.05", [NO_CARD], "too old"),
        ("13.0", "580.65.06", [NO_CARD], "too old"),
        ("13.0", "", [NO_CARD], "too old"),
        (None, "535.104.05", [NO_CARD + " for PyTorch", "built without CUDA"], "too old"),
    ],
)
def test_a_driver_too_old_is_named_with_both_versions(
    built_for, driver, said, unsaid, base_model, tmp_path, monkeypatch, capsys
):
    # Catches, seen: `>= oldest` -> `<= oldest`; CUDA 12 and 13 exchanged; the way out always offered.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", built_for)
    monkeypatch.setattr(card, "DRIVER", tmp_path / "version")
    if driver:
        card.DRIVER.write_text(DRIVER_TEXT.format(driver))
    for arguments in (
        command(tmp_path / "run", base_model),
        ["--check", "--config", str(ROOT / "config.yaml")],
    ):
        assert train.main([*arguments, "model.device=cuda"]) == 2
        error = capsys.readouterr().err
        assert all(words in error for words in said), error
        assert unsaid not in error
    assert card.driver_version() == driver


def test_the_driver_is_read_of_both_kernel_modules(tmp_path, monkeypatch):
    monkeypatch.setattr(card, "DRIVER", tmp_path / "version")
    card.DRIVER.write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build  (root@x86)\n"
    )
    assert card.driver_version() == "580.65.06"


LACKS = {
    "capability": (
        "config.yaml",
        {"capability": (7, 5), "name": "Tesla T4"},
        "model.dtype=bfloat16, but the Tesla T4 has compute capability 7.5, and bfloat16 takes 8.0 (A100, RTX 30); "
        "set model.dtype=float32",
    ),
    "memory": (
        "config.yaml",
        {"free": 23.1 * GIB, "total": 23.6 * GIB, "name": "RTX 4090"},
        "GiB of the card (model.memory_gib=42.5), but of the 23.6 GiB of the RTX 4090 23.1 are free; set model.memory_gib="
        "null",
    ),
    "used by others": (
        "config.yaml",
        {"free": 30 * GIB},
        "but of the 44.5 GiB of the NVIDIA A40 30.0 are free",
    ),
    "nothing": ("config.yaml", {}, ""),
    "nothing, offloaded": ("config_24GB.yaml", {}, ""),
}


@pytest.mark.parametrize("lack", LACKS)
def test_what_a_card_lacks_is_named_before_anything_is_loaded(lack, a_card, monkeypatch, capsys):
    # Catches, seen: `< (8, 0)` -> `< (7, 5)`; the plan compared with the whole of the card instead of with what is free.
    config, changes, said = LACKS[lack]
    vars(a_card).update(changes)
    monkeypatch.setattr(run, "check", lambda *args, **kwargs: "")
    monkeypatch.setattr("harness.card.page_lock", lambda tensor: None)
    assert train.main(["--check", "--config", str(ROOT / config)]) == (2 if said else 0)
    assert said in capsys.readouterr().err


def test_a_run_asks_as_much_of_the_card_as_the_check(
    a_card, base_model, tmp_path, monkeypatch, capsys
):
    # Catches, seen: check_card not called by a run.
    a_card.capability = (7, 5)
    monkeypatch.setattr(
        train.Transformer, "from_pretrained", lambda *args, **kwargs: pytest.fail("loaded")
    )
    assert (
        train.main(
            [*command(tmp_path / "run", base_model), "model.device=cuda", "model.dtype=bfloat16"]
        )
        == 2
    )
    assert "compute capability 7.5" in capsys.readouterr().err


def offloaded_plan():
    config = load_config(ROOT / "config_24GB.yaml")
    return config, make_plan(config, find_shape("Qwen2.5-3B"))


def test_too_little_host_memory_for_offload(a_card, tmp_path, monkeypatch):
    # Catches, seen: one process counted where several share the machine; the container's limit not looked at.
    config, plan = offloaded_plan()
    monkeypatch.setattr("harness.card.page_lock", lambda tensor: None)
    card.check_card(config, plan)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(
        ValueError,
        match=r"optimizer.offload=true keeps 86\.2 GiB .* of which 60\.0 GiB are free; .*offload=false",
    ):
        card.check_card(config, plan)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    (tmp_path / "limit").write_text(f"{20 * GIB}\n")
    monkeypatch.setattr(card, "CONTAINER_LIMIT", tmp_path / "limit")
    with pytest.raises(ValueError, match=r"keeps 28\.7 GiB .* of which 20\.0 GiB are free"):
        card.check_card(config, plan)
    (tmp_path / "limit").write_text("max\n")
    card.check_card(config, plan)


def test_ulimit_is_an_error_only_where_the_driver_heeds_it(a_card, monkeypatch):
    # Catches, seen: every machine with a small limit refused; the limit not looked at.
    config, plan = offloaded_plan()
    locked, cudart = (
        [],
        SimpleNamespace(
            cudaHostRegister=lambda pointer, size, flags: locked.append(size) or 0,
            cudaHostUnregister=lambda pointer: None,
        ),
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    for limit in (-1, 64 * GIB):
        monkeypatch.setattr(card.resource, "getrlimit", lambda kind, limit=limit: (limit, limit))
        card.check_card(config, plan)
    assert locked == []
    monkeypatch.setattr(card.resource, "getrlimit", lambda kind: (2**23, 2**23))
    card.check_card(config, plan)
    assert locked == [2**23 + 2**20]
    cudart.cudaHostRegister = lambda pointer, size, flags: 2
    with pytest.raises(
        ValueError,
        match=r"page-locks 28\.7 GiB .* `ulimit -l` allows 0\.01 GiB .* \(ulimit -l unlimited\)",
    ):
        card.check_card(config, plan)


def test_memory_that_cannot_be_locked_is_an_error_that_a_user_can_mend(monkeypatch):
    # Catches, seen: RuntimeError instead of OSError, which is shown as a fault of the program, with a traceback.
    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lambda *args: 2)
    )
    with pytest.raises(
        OSError,
        match=r"28 bytes of CPU memory could not be page-locked .*ulimit -l.*optimizer\.offload=false",
    ):
        gpu.page_lock(torch.zeros(7))


NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("name", ["", *NAMES])
def test_the_cards_memory_grows_in_place_unless_the_user_has_said_something(
    name, a_card, monkeypatch
):
    # Catches, seen: the older name not looked at; not set before CUDA is asked for the first time; set for a CPU, too.
    for known in NAMES:
        monkeypatch.setenv(known, "")  # and taken back in the end
        monkeypatch.delenv(known)
    monkeypatch.setattr(run, "check", lambda *args, **kwargs: "")
    assert train.main(["--check", "--config", str(ROOT / "config_tiny.yaml")]) == 0
    assert not os.environ.keys() & set(NAMES)
    if name:
        monkeypatch.setenv(name, "max_split_size_mb:64")
    seen = []
    monkeypatch.setattr(
        torch.cuda,
        "is_available",
        lambda: seen.append({n: os.environ.get(n) for n in NAMES}) or True,
    )
    assert train.main(["--check", "--config", str(ROOT / "config.yaml")]) == 0
    wanted = (
        {name: "max_split_size_mb:64"}
        if name
        else {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
    )
    assert seen[0] == dict.fromkeys(NAMES) | wanted


def test_the_setting_reaches_pytorch_after_its_import():
    # Catches, seen: `expandable_segment:True`, which PyTorch refuses.
    source = "import torch, gpu; gpu.prepare_process(); print(torch._C._accelerator_getAllocatorSettings())"
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", source],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "expandable_segments:True"


# ---------------------------------------------------------------- later


FULL = {
    "PyTorch's own": torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"
    ),
    "while a graph is recorded": RuntimeError(
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"
    ),
    "of the driver": torch.AcceleratorError("CUDA error: out of memory"),
    "cuBLAS": RuntimeError(
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    ),
    "a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
    ),
}


@pytest.mark.parametrize("kind", FULL)
@pytest.mark.parametrize("phase", ["rollout", "update"])
def test_out_of_memory_names_phase_plan_and_setting(
    kind, phase, base_model, tmp_path, monkeypatch, capsys
):
    # Catches, seen: only torch.OutOfMemoryError explained; the plan left out; the phase not noted.
    def fill(*args, **kwargs):
        if phase == "update" or kwargs["num_answers"] > 1:
            raise FULL[kind]
        return rollout(*args, **kwargs)

    rollout = train.rollout
    monkeypatch.setattr(train, "update_policy" if phase == "update" else "rollout", fill)
    assert train.main(command(tmp_path / "run", base_model)) == 1
    error = capsys.readouterr().err
    first_line = str(FULL[kind]).split("\n")[0]
    assert error.startswith(
        f"error: memory is full in the {phase} ({first_line}); lower model.memory_gib below 4.0"
    )
    assert "KV cache, 12 of 12 rows at once" in error
    assert "Traceback" not in error


def test_another_fault_is_not_taken_for_a_full_memory(base_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        train,
        "rollout",
        lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("size mismatch")),
    )
    with pytest.raises(RuntimeError, match="size mismatch"):
        train.main(command(tmp_path / "run", base_model))


def test_the_cost_report_names_the_card_as_a_whole(a_card, monkeypatch, capsys):
    # Catches, seen: what is free taken for what is used; the last part's figure instead of the largest.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    watches = {}
    for phase, free in (("rollout", 4.0), ("update", 2.5)):
        watches[phase] = PhaseWatch(phase)
        watches[phase].peak_bytes = 38 * GIB
        for a_card.free in (free * GIB, (free + 30) * GIB):
            with watches[phase].part("decode", 1):
                pass
    ours = SimpleNamespace(
        recent=[{"seconds": 7.0}] * 3,
        watches=watches,
        plan=make_plan(load_config(ROOT / "config.yaml"), find_shape("Qwen2.5-3B")),
        config=load_config(ROOT / "config.yaml"),
    )
    run.Run._report_cost(ours, 10)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("; ")[1] for line in lines[1:]] == [
        f"{used} in use on the card as a whole" for used in ("40.50", "42.00")
    ]
    assert all("38.00 GiB at the peak" in line and "planned" in line for line in lines[1:])


# ---------------------------------------------------------------- --check


@pytest.fixture
def bare(base_model, tmp_path):
    """--check of a model of which only the shape is known; no data, no tokenizer."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_bytes((base_model / "config.json").read_bytes())
    return [
        "--check",
        "--config",
        str(ROOT / "config_tiny.yaml"),
        *FEW,
        f"model.path={tmp_path}/model",
        "data.path=nowhere",
        f"output_dir={tmp_path}/runs/new",
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_machine_that_agrees_gets_a_verdict_and_leaves_nothing(dtype, bare, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert train.main([*bare, f"model.dtype={dtype}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("check: all agrees; about ")
    assert "s a step" in lines[-1]
    assert "for 50 steps" in lines[-1]
    assert sum("agrees" in line for line in lines[:-1]) == (7 if dtype == "float32" else 8)
    assert sorted(tmp_path.rglob("*")) == before


def spoil_state(monkeypatch):
    def read(path):
        place, state = check_read(path)
        return place, state | {"exp_avg": state["exp_avg"] * 1.001}

    check_read = check.read_checkpoint
    monkeypatch.setattr(check, "read_checkpoint", read)


def spoil_steps(monkeypatch):
    def read(path):
        place, state = check_read(path)
        return place.model_copy(update={"optimizer_steps": 0}), state

    check_read = check.read_checkpoint
    monkeypatch.setattr(check, "read_checkpoint", read)


def spoil_sampler(monkeypatch):
    def sample(*args, **kwargs):
        return [
            replace(e, response_logprobs=[p + 0.2 for p in e.response_logprobs])
            for e in check_rollout(*args, **kwargs)
        ]

    check_rollout = check.rollout
    monkeypatch.setattr(check, "rollout", sample)


def spoil_trainer(monkeypatch):
    def loss(model, row, *args, **kwargs):
        is_ours = model.head_weight_VE.dtype == torch.float32
        return plain(
            model, replace(row, targets_P=row.targets_P ^ 1) if is_ours else row, *args, **kwargs
        )

    plain = check.row_loss
    monkeypatch.setattr(check, "row_loss", loss)


def spoil_update(monkeypatch):
    monkeypatch.setattr(
        check,
        "update_policy",
        lambda *args, **kwargs: UpdateStats(0.0, 0.0, 0, logprob_diff_mean=float("nan")),
    )


SPOILT = {
    spoil_state: ["exp_avg, resumed against unbroken"],
    spoil_steps: ["weights, resumed against unbroken"],
    spoil_sampler: [
        "log-probabilities of the sampler against the CPU's",
        "log-probabilities of sampler and trainer",
    ],
    spoil_trainer: [
        "log-probabilities of the trainer against the CPU's",
        "gradient against the CPU's",
    ],
    spoil_update: [
        "log-probabilities of sampler and trainer (nan",
        "exp_avg, resumed against unbroken (nan",
    ],
}


@pytest.mark.parametrize("spoil", SPOILT)
def test_what_does_not_agree_is_named_and_the_exit_code_is_1(spoil, bare, monkeypatch, capsys):
    # Catches, seen: `found <= bound` -> `not found > bound`, by which nan agrees; a comparison that is not made.
    spoil(monkeypatch)
    assert train.main(bare) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: check: what must agree does not: ")
    assert all(name in error for name in SPOILT[spoil]), error
    assert "Traceback" not in error


def test_on_a_card_steps_are_taken_with_and_without_graphs(a_card, bare, monkeypatch, capsys):
    # Catches, seen: graphs not turned off, or not on again; a recording that failed passed over.
    def on_cpu(function):
        return lambda *args, device, **kwargs: function(*args, device="cpu", **kwargs)

    monkeypatch.setattr(check, "random_model", on_cpu(check.random_model))
    monkeypatch.setattr(forecast, "random_model", on_cpu(forecast.random_model))
    monkeypatch.setattr(
        check.Transformer, "from_pretrained", on_cpu(check.Transformer.from_pretrained)
    )
    monkeypatch.setattr(gpu.GraphedStep, "works", True)
    monkeypatch.setattr("harness.card.driver_version", lambda: "580.65.06")
    asked, rollout = [], check.rollout
    monkeypatch.setattr(
        check,
        "rollout",
        lambda *args, **kwargs: asked.append(gpu.GraphedStep.works) or rollout(*args, **kwargs),
    )
    arguments = [*bare, "model.device=cuda", "optimizer.offload=true"]
    assert train.main(arguments) == 0
    assert asked == [True, False, True]
    output = capsys.readouterr().out
    assert "driver 580.65.06; NVIDIA A40, 60.0 of 44.5 GiB free" in output
    for kind in ("", "with CUDA graphs: "):
        assert f"\n{kind}weights, resumed against unbroken: 0, at most 0.01: agrees" in output
    assert "CUDA graphs that could not be recorded: 0, at most 0: agrees" in output

    def fails(*args, **kwargs):
        gpu.GraphedStep.works = False
        return rollout(*args, **kwargs)

    monkeypatch.setattr(check, "rollout", fails)
    assert train.main(arguments) == 1
    assert "CUDA graphs that could not be recorded (1, at most 0)" in capsys.readouterr().err


def test_where_memory_is_short_the_check_refuses(bare, monkeypatch, capsys):
    # Catches, seen: either question left out.
    monkeypatch.setattr(check, "free_bytes", lambda device: 2**10)
    assert train.main(bare) == 2
    assert "GiB of CPU memory to save and resume; free some" in capsys.readouterr().err
    monkeypatch.setattr(planning, "free_bytes", lambda device: GIB + 2**10)
    assert train.main(bare) == 2
    error = capsys.readouterr().err
    assert error.startswith(
        "error: --check runs 1 layers, and for these, too, memory is short: the run does not fit into 0.00 GiB"
    )


def test_where_the_disk_is_full_the_check_says_so(bare, monkeypatch, capsys):
    monkeypatch.setattr(
        "harness.checkpoint.shutil.disk_usage", lambda path: SimpleNamespace(free=10**6)
    )
    assert train.main(bare) == 2
    assert "no room: 0.00 GB are free" in capsys.readouterr().err


# ---------------------------------------------------------------- what a step will take


@pytest.mark.parametrize(
    ("lengths", "slots", "expected"),
    [
        ([3, 1, 2], 2, (6 / 3, (0 + 2 * 1 + 2 * 2) / 6)),  # the third takes the second's slot
        ([2, 4], 5, (6 / 4, (0 + 2 * 1 + 2 + 3) / 6)),
        ([5], 1, (1.0, 10 / 5)),
    ],
)
def test_a_rollout_is_counted_as_by_hand(lengths, slots, expected):
    # Catches, seen: `end > step` -> `end >= step`; a slot given away only when all are free.
    assert decoding(lengths, slots) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("few", "many", "layers", "plan", "expected"),
    [
        (
            {"decode": 5.0, "gradient": 10.0},
            {"decode": 7.0, "gradient": 16.0},
            [2, 4],
            (36, 9),
            {"decode": 3 + 36, "gradient": 4 + 3 * (36 + 9 / 3)},
        ),  # head 3 and 4, a layer 1 and 3
        ({"decode": 5.0}, {"decode": 5.0}, [1, 1], (1, 0), {"decode": 5.0}),
        (
            {"decode": 7.0},
            {"decode": 5.0},
            [2, 4],
            (36, 0),
            {"decode": 5.0},
        ),  # noise: a layer takes no less than nothing
    ],
)
def test_a_layer_is_the_difference_and_the_head_what_is_left(
    few, many, layers, plan, expected, monkeypatch
):
    # Catches, seen: `/ 3` left out; the layers measured counted twice; a layer that takes less than nothing.
    measured = {layers[0]: few | {"optimizer": 6.0}, layers[1]: many | {"optimizer": 6.0}}
    monkeypatch.setattr(
        forecast, "measure", lambda config, shape, plan, cards: measured[shape.num_hidden_layers]
    )
    shape = replace(find_shape("Qwen2.5-3B"), num_hidden_layers=plan[0])
    parts = forecast.seconds_of_a_step(
        None, shape, layers, SimpleNamespace(checkpoint_layers=plan[1]), cards=2
    )
    assert parts == pytest.approx(expected | {"optimizer": 3.0})


@pytest.fixture
def token_a_second(monkeypatch):
    """Where every token takes a second, the seconds of a step are the tokens of all its work. Returns what is measured."""
    asked = SimpleNamespace()

    def take_a_step(config, shape, row, *, prompt_len, slots, steps):
        asked.row, asked.prompt_len, asked.slots, asked.steps = row, prompt_len, slots, steps
        seconds = {
            "prefill": prompt_len,
            "decode": slots * steps,
            "gradient": tokens_of(row),
            "optimizer": 7,
        }
        return SimpleNamespace(seconds=seconds, counts={"tokens_run": tokens_of(row)})

    monkeypatch.setattr(forecast, "take_a_step", take_a_step)
    return asked


def tokens_of(episodes):
    prompts = {e.question_id: len(e.prompt_token_ids) for e in episodes}
    return sum(prompts.values()) + sum(len(e.response_token_ids) for e in episodes)


def lengths_of_answers(questions, longest):
    episodes = random_episodes(
        questions, 8, PROMPT_TOKENS, longest, mean=longest // 2, vocab_size=101
    )
    return [len(e.response_token_ids) for e in episodes]


def afford(monkeypatch, shape, tokens):
    monkeypatch.setattr(
        forecast.cpu,
        "operations_per_second",
        lambda dtype: tokens * 8 * planning.num_weights(shape) / forecast.CPU_SECONDS,
    )


@pytest.mark.parametrize(("affordable", "cards"), [(150, 1), (10**9, 1), (10**9, 4)])
def test_the_work_is_that_of_the_configured_step(affordable, cards, token_a_second, monkeypatch):
    # Catches, seen: tokens of the answers alone; answers of all cards; the share that is measured taken for the whole.
    config, shape = (
        load_config(ROOT / "config_tiny.yaml", ["training.max_gen_len=1024"]),
        find_shape(str(ROOT / "models/tiny")),
    )
    afford(monkeypatch, shape, affordable)
    plan = replace(make_plan(config, shape), cache_rows=256 // cards)
    parts = forecast.measure(config, shape, plan, cards)
    questions, lengths = 32 // cards, lengths_of_answers(32 // cards, 1024)
    assert len(lengths) == 256 // cards
    assert 950 < max(lengths) <= 1024
    assert 430 < sum(lengths) / len(lengths) < 450  # a half less what is cut off
    assert parts["prefill"] == pytest.approx(questions * PROMPT_TOKENS)
    assert parts["decode"] == pytest.approx(sum(lengths))
    fewest = sum(lengths) + questions * PROMPT_TOKENS
    assert fewest <= parts["gradient"] < 1.1 * (fewest + questions * PROMPT_TOKENS)
    assert parts["optimizer"] == 7
    assert token_a_second.slots * token_a_second.steps <= 2 * affordable


@pytest.mark.parametrize("rows", [256, 16])
def test_decoding_is_measured_in_the_middle_of_a_rollout(rows, token_a_second, monkeypatch):
    # Catches, seen: as many slots as the cache has; the prompt alone read.
    config, shape = load_config(ROOT / "config_tiny.yaml"), find_shape(str(ROOT / "models/tiny"))
    afford(monkeypatch, shape, 10**9)
    forecast.measure(config, shape, replace(make_plan(config, shape), cache_rows=rows), 1)
    slots, columns = decoding(lengths_of_answers(32, 448), rows)
    assert token_a_second.slots == round(slots) <= rows
    assert token_a_second.prompt_len + token_a_second.steps / 2 == pytest.approx(
        PROMPT_TOKENS + columns, abs=1
    )
    assert token_a_second.steps == forecast.STEPS


@pytest.mark.parametrize("affordable", [200, 10**6])
def test_the_measured_row_has_as_many_response_tokens_as_the_runs(
    affordable, token_a_second, monkeypatch
):
    # Catches, seen: the prompts as long as they are in a row that is cut short; a row longer than can be afforded.
    config, shape = load_config(ROOT / "config_tiny.yaml"), find_shape(str(ROOT / "models/tiny"))
    afford(monkeypatch, shape, affordable)
    parts = forecast.measure(config, shape, make_plan(config, shape), 1)
    responses = sum(len(e.response_token_ids) for e in token_a_second.row)
    assert tokens_of(token_a_second.row) == pytest.approx(
        min(affordable, config.training.micro_batch_tokens), rel=0.3
    )
    assert responses / tokens_of(token_a_second.row) == pytest.approx(
        parts["decode"] / parts["gradient"], abs=0.02
    )
    assert len(token_a_second.row) >= 2


@pytest.mark.slow
@pytest.mark.parametrize("model", ["models/tiny", "Qwen2.5-0.5B"])
def test_the_check_of_the_shipped_config_takes_less_than_a_minute(model, tmp_path, capsys):
    changes = [
        f"model.path={ROOT / model}",
        "model.memory_gib=12.0",
        "model.device=cpu",
        "model.dtype=float32",
    ]
    config = ROOT / ("config_tiny.yaml" if model == "models/tiny" else "config.yaml")
    clock = time.process_time()  # of one thread; others may be at work on this machine
    assert (
        train.main(["--check", "--config", str(config), *changes, f"output_dir={tmp_path}/new"])
        == 0
    )
    assert time.process_time() - clock < 60
    assert "check: all agrees; about " in capsys.readouterr().out


@pytest.mark.slow
def test_the_report_of_a_card_is_written_without_one(tmp_path):
    command = [
        sys.executable,
        "bench/card.py",
        "--device",
        "cpu",
        "--shape",
        "tiny",
        "--out",
        str(tmp_path / "card.md"),
    ]
    result = subprocess.run(
        [*command, "--scratch", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"GRPO_ZERO": "echo the seed system"},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    report = (tmp_path / "card.md").read_text()
    assert report.count("exit code 0") >= 2 * 11
    assert "killed, as planned" in report
    assert "45 of 45 lines are equal" in report
    assert "the seed system" in report
