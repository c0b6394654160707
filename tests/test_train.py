"""The run as a whole: it resumes exactly, survives what happens to it, and says what the user can mend."""

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from data_types import Reward
from harness import checkpoint
from qwen2_model import Transformer
from tests import letters_task

ROOT = Path(__file__).parent.parent
SMALL = [
    "warm_start.hidden_size=32", "warm_start.num_layers=1", "warm_start.num_heads=2", "warm_start.steps=4",
    "warm_start.batch_size=8",
    "training.batch_size=12", "training.num_questions_per_batch=4", "training.max_gen_len=24", "training.max_steps=6",
    "training.eval_interval=3", "training.ckpt_save_interval=2", "training.micro_batch_tokens=300", "training.max_skipped_steps=2",
    "training.skip_unfinished_episodes=false", "data.test_size=5", "task=tests.letters_task",
]  # fmt: skip


@pytest.fixture(scope="session")
def base_model(tmp_path_factory):
    """A barely trained model: its answers differ, so every step has something to learn."""
    directory = tmp_path_factory.mktemp("base")
    arguments = command(directory / "unused", directory / "model", "training.max_steps=1")
    assert train.main(arguments) == 0
    return directory / "model"


@pytest.fixture(autouse=True)
def keep_signal_handlers():
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def command(output_dir, model, *overrides) -> list[str]:
    return ["--config", str(ROOT / "config_tiny.yaml"), f"output_dir={output_dir}", f"model.path={model}", *SMALL, *overrides]


def start(output_dir, model, *overrides) -> subprocess.Popen:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen([sys.executable, "train.py", *command(output_dir, model, *overrides)], cwd=ROOT, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)  # fmt: skip


def assert_same_run(directory: Path, reference: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (directory / name).read_bytes() == (reference / name).read_bytes(), name
    last = sorted((reference / "checkpoints").glob("step-*"))[-1].name
    ours, theirs = directory / "checkpoints" / last, reference / "checkpoints" / last
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    states = [checkpoint.load_trainer_state(path)["optimizer"] for path in (ours, theirs)]
    assert states[0]["steps"] == states[1]["steps"]
    assert torch.equal(states[0]["exp_avg"], states[1]["exp_avg"])
    assert torch.equal(states[0]["exp_avg_sq"], states[1]["exp_avg_sq"])


@pytest.fixture(scope="session")
def unbroken(base_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    process = start(directory, base_model)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    return directory


def kill_and_resume(directory: Path, base_model: Path, kills: int, longest: float) -> None:
    rng = random.Random(kills)
    resume = []
    for _ in range(kills):
        process = start(directory, base_model, *resume)
        try:
            process.wait(timeout=rng.uniform(0.3, 1.0) * longest)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        resume = ["--resume"] if (directory / "config.yaml").exists() else []
    process = start(directory, base_model, *resume)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output


def test_a_killed_run_equals_an_unbroken_one(base_model, unbroken, tmp_path):
    # caught: saving the checkpoint after the evaluation; drawing evaluation from the rollout's generator
    kill_and_resume(tmp_path / "run", base_model, kills=3, longest=4)
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.slow
def test_twenty_kills(base_model, tmp_path):
    longer = ["training.max_steps=60", "training.ckpt_save_interval=1", "training.eval_interval=2"]
    reference, broken = tmp_path / "reference", tmp_path / "run"
    process = start(reference, base_model, *longer)
    clock = time.monotonic()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    whole = time.monotonic() - clock
    SMALL.extend(longer)
    try:
        kill_and_resume(broken, base_model, kills=20, longest=0.5 * whole)
    finally:
        del SMALL[-len(longer) :]
    assert_same_run(broken, reference)


def test_sigterm_saves_says_how_to_resume_and_nothing_is_doubled(base_model, unbroken, tmp_path):
    with start(tmp_path / "run", base_model, "training.ckpt_save_interval=100") as process:
        for line in process.stdout:
            if line.split()[:1] == ["3"]:
                process.send_signal(signal.SIGTERM)
                break
        output = process.stdout.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert "--resume" in output
    saved = sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir())
    assert len(saved) == 1
    assert saved[0] in ("step-000003", "step-000004", "step-000005")
    process = start(tmp_path / "run", base_model, "--resume")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "note: training.ckpt_save_interval changes from 100 to 2" in output
    assert_same_run(tmp_path / "run", unbroken)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [event.step for event in board.Scalars("metrics/reward")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("eval/success")] == [0, 3, 6]


def test_a_second_signal_ends_at_once():
    watch = train.SignalWatch()
    watch.check()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(train.Interrupted):
        watch.check()
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL


@pytest.fixture
def two_steps(base_model, tmp_path):
    """A run that has ended at step 4 with checkpoints 2 and 4, and the arguments that would go on with it to step 6."""
    directory = tmp_path / "run"
    assert train.main(command(directory, base_model, "training.max_steps=4")) == 0
    return directory, [*command(directory, base_model), "--resume"]


def test_a_truncated_checkpoint_is_passed_over(two_steps, capsys):
    directory, arguments = two_steps
    weights = directory / "checkpoints/step-000004/model.safetensors"
    os.truncate(weights, 1000)
    assert train.main(arguments) == 0
    output = capsys.readouterr().out
    assert "passing over" in output
    assert "resuming from" in output
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "reward" in r] == [1, 2, 3, 4, 5, 6]


def test_a_damaged_checkpoint_is_written_anew(two_steps, capsys):
    # caught: saving only where nothing stands yet
    directory, arguments = two_steps
    for step, size in ((2, 1000), (4, 1000)):
        os.truncate(directory / f"checkpoints/step-{step:06d}/model.safetensors", size)
    assert train.main(arguments) == 2
    assert "every checkpoint" in capsys.readouterr().err
    shutil.rmtree(directory / "checkpoints/step-000002")
    shutil.copytree(directory / "checkpoints/step-000004", directory / "kept")
    shutil.rmtree(directory / "checkpoints/step-000004")
    assert train.main([*arguments, "training.max_steps=4"]) == 0  # from the beginning
    os.truncate(directory / "checkpoints/step-000004/trainer.pt", 1000)
    assert train.main([*arguments, "training.max_steps=4", "training.keep_checkpoints=1"]) == 0  # from step 2
    assert checkpoint.find_damage(directory / "checkpoints/step-000004") == ""


def test_damage_that_keeps_the_size_is_named(two_steps, capsys):
    directory, arguments = two_steps
    trainer = directory / "checkpoints/step-000004/trainer.pt"
    trainer.write_bytes(bytes(trainer.stat().st_size))
    assert train.main(arguments) == 2
    assert "trainer.pt is damaged" in capsys.readouterr().err


def test_a_full_disk_keeps_the_last_checkpoint(two_steps, monkeypatch, capsys):
    directory, arguments = two_steps

    def no_space(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint.torch, "save", no_space)
    assert train.main(arguments) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert [p.name for p in sorted((directory / "checkpoints").iterdir())] == ["step-000002", "step-000004"]
    assert checkpoint.find_damage(directory / "checkpoints/step-000004") == ""


def test_room_is_checked_before_writing(two_steps, monkeypatch, capsys):
    _, arguments = two_steps
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    assert train.main(arguments) == 1
    assert "no room for the checkpoint of step 6" in capsys.readouterr().err


def test_half_written_checkpoints_are_cleaned_up(two_steps):
    directory, arguments = two_steps
    (directory / "checkpoints/.partial-000005").mkdir()
    assert train.main(arguments) == 0
    assert [p.name for p in sorted((directory / "checkpoints").iterdir())] == ["step-000004", "step-000006"]


def test_two_runs_cannot_share_a_directory(two_steps, capsys):
    directory, arguments = two_steps
    with checkpoint.lock_directory(directory):  # the kernel ends it too when a process dies
        assert train.main(arguments) == 2
    assert "in use by another run" in capsys.readouterr().err
    assert train.main(arguments) == 0


def test_a_run_is_never_overwritten(two_steps, base_model, capsys):
    directory, _ = two_steps
    assert train.main(command(directory, base_model)) == 2
    assert "--resume" in capsys.readouterr().err
    assert train.main([*command(directory / "elsewhere", base_model), "--resume"]) == 2
    assert "no run to resume" in capsys.readouterr().err


@pytest.mark.parametrize("change", ["data.max_number=9", "training.seed=2", "training.batch_size=16", "task=examples.gsm8k_task"])
def test_what_may_not_change_is_refused_by_name(two_steps, change, capsys):
    _, arguments = two_steps
    assert train.main([*arguments, change]) == 2
    assert change.split("=")[0] in capsys.readouterr().err


@pytest.mark.skipif(torch.get_num_threads() < 2, reason="one thread adds in one order anyhow")
def test_two_runs_of_one_seed_are_equal_whatever_the_threads_do(tmp_path):
    # Catches: `set_deterministic_debug_mode` dropped: at this size several threads add to one place in the order they come.
    results = []
    for name in ("one", "other"):
        directory = tmp_path / name
        settings = ["warm_start.steps=12", "training.max_steps=1", "data.test_size=16", "training.max_gen_len=64"]
        subprocess.run([sys.executable, "train.py", "--config", "config_tiny.yaml", f"output_dir={directory}/run",
                        f"model.path={directory}/base", *settings], cwd=ROOT, check=True, capture_output=True)  # fmt: skip
        results.append((directory / "base" / "model.safetensors").read_bytes() + (directory / "run" / "metrics.jsonl").read_bytes())
    assert results[0] == results[1]


# ---------------------------------------------------------------- numbers that go wrong


def run_with(base_model, directory, *overrides) -> tuple[int, list[dict]]:
    code = train.main(command(directory, base_model, "training.max_steps=4", *overrides))
    records = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    weights = load_file(sorted((directory / "checkpoints").glob("step-*"))[-1] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    return code, [r for r in records if "reward" in r]


class Planted:
    """Calls a function, and spoils its result at the calls asked for."""

    def __init__(self, function, spoil, calls):
        self.function, self.spoil, self.calls, self.count = function, spoil, calls, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        result = self.function(*args, **kwargs)
        return self.spoil(result) if self.count in self.calls else result


def test_a_nan_reward_skips_the_step_and_names_the_question(base_model, tmp_path, monkeypatch):
    planted = Planted(letters_task.reward_function, lambda r: Reward(math.nan, r.parts), [5 + 12 + 7])
    monkeypatch.setattr(letters_task, "reward_function", planted)  # 5 evaluations, 12 answers of step 1, 7th of step 2
    code, steps = run_with(base_model, tmp_path / "run")
    assert code == 0
    assert steps[1]["skipped"] == "a reward or a sampled log-probability is not finite"
    assert steps[1]["skipped_questions"] == [2]
    assert all("not finite" not in s.get("skipped", "") for s in (steps[0], *steps[2:]))


def test_a_nan_logit_skips_the_step(base_model, tmp_path, monkeypatch):
    def spoil(logits):
        logits[0, 3] = math.nan
        return logits

    calls = 0
    plain = Transformer.logits

    def logits(self, hidden):
        nonlocal calls
        calls += 1
        return spoil(plain(self, hidden)) if calls == 40 else plain(self, hidden)

    monkeypatch.setattr(Transformer, "logits", logits)
    code, steps = run_with(base_model, tmp_path / "run")
    assert code == 0
    assert sum("not finite" in s.get("skipped", "") for s in steps) == 1


def test_a_nan_gradient_skips_the_step_and_five_end_the_run(base_model, tmp_path, monkeypatch, capsys):
    plain = train.AdamW

    def with_hook(params, **kwargs):
        params = list(params)
        params[3].register_hook(lambda grad: grad * math.nan)
        return plain(params, **kwargs)

    monkeypatch.setattr(train, "AdamW", with_hook)
    code, steps = run_with(base_model, tmp_path / "run")
    assert code == 1
    assert len(steps) == 2  # training.max_skipped_steps
    assert all(s["skipped"] == "the loss or the gradient is not finite" and s["skipped_questions"] for s in steps)
    assert "2 steps in a row were skipped" in capsys.readouterr().err


def test_a_reward_that_sleeps_is_cut_off(base_model, tmp_path, monkeypatch, capsys):
    planted = Planted(letters_task.reward_function, lambda r: time.sleep(1000), [20])
    monkeypatch.setattr(letters_task, "reward_function", planted)
    assert train.main(command(tmp_path / "run", base_model, "training.reward_timeout=0.2")) == 2
    message = capsys.readouterr().err
    assert "took over 0.2 s" in message
    assert "numbers" in message
    planted.count = 0
    code, steps = run_with(base_model, tmp_path / "zero", "training.reward_timeout=0.2", "training.reward_errors=zero")
    assert code == 0
    assert sum(s.get("rewards/error", 0.0) for s in steps) == pytest.approx(1 / 12)


# ---------------------------------------------------------------- damaged input


def damage_weights(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


NORM = "model.norm.weight"
MODEL_DAMAGE = {
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors"),
    "truncated weights": (lambda p: os.truncate(p / "model.safetensors", 3000), "model.safetensors"),
    "garbage weights": (lambda p: (p / "model.safetensors").write_bytes(b"garbage" * 100), "model.safetensors"),
    "missing tensor": (lambda p: damage_weights(p, lambda t: t.pop(NORM)), NORM),
    "unexpected tensor": (lambda p: damage_weights(p, lambda t: t.update(extra=torch.zeros(2))), "extra"),
    "wrong shape": (lambda p: damage_weights(p, lambda t: t.update({NORM: torch.zeros(3)})), NORM),
    "missing shard": (lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}'),
                      "model-2.safetensors"),
    "broken index": (lambda p: (p / "model.safetensors.index.json").write_text("[]"), "index.json"),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json"),
    "truncated config": (lambda p: os.truncate(p / "config.json", 40), "config.json"),
    "other model": (lambda p: edit_json(p / "config.json", model_type="llama"), "model_type"),
    "config of a larger model": (lambda p: edit_json(p / "config.json", vocab_size=9999), "embed_tokens"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json"),
    "truncated tokenizer": (lambda p: os.truncate(p / "tokenizer.json", 100), "tokenizer.json"),
    "hostile template": (lambda p: edit_json(p / "tokenizer_config.json", chat_template="{{ ''.__class__.__mro__ }}"), "template"),
    "unknown stop id": (lambda p: edit_json(p / "generation_config.json", eos_token_id=[99999]), "stop ids"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MODEL_DAMAGE)
def test_a_damaged_model_is_a_one_line_error(kind, base_model, tmp_path, capsys):
    damage, named = MODEL_DAMAGE[kind]
    model = tmp_path / "model"
    shutil.copytree(base_model, model)
    damage(model)
    assert train.main(command(tmp_path / "run", model)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert named in error
    assert str(model) in error


DATA_DAMAGE = {
    "not there": (None, "hf download"),
    "empty": ("", "no problems"),
    "not JSON": ('{"nums": [1, 2], "target": 3}\n{"nums": [1', "line 2"),
    "other keys": ('{"numbers": [1, 2], "goal": 3}', "nums"),
    "floats": ('{"nums": [1.5, 2], "target": 3}', "line 1"),
    "too few": ('{"nums": [1, 2], "target": 3}', "data.test_size"),
}


@pytest.mark.parametrize("kind", DATA_DAMAGE)
def test_a_damaged_dataset_is_an_error_without_traceback(kind, base_model, tmp_path, capsys):
    text, named = DATA_DAMAGE[kind]
    path = tmp_path / "data.jsonl"
    if text is not None:
        path.write_text(text)
    assert train.main(command(tmp_path / "run", base_model, f"data.path={path}")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert named in error
    assert str(path) in error


def test_what_is_missing_names_the_way_out(tmp_path, capsys):
    nowhere = [*command(tmp_path / "run", tmp_path / "Qwen2.5-3B-Instruct"), "warm_start=null"]
    assert train.main(nowhere) == 2
    error = capsys.readouterr().err
    assert "hf download" in error
    assert "config_tiny.yaml" in error
    if not torch.cuda.is_available():
        assert train.main([*nowhere, "model.device=cuda"]) == 2
        assert "config_tiny.yaml" in capsys.readouterr().err


def test_answers_longer_than_the_model_are_refused_before_training(base_model, tmp_path, capsys):
    assert train.main(command(tmp_path / "run", base_model, "training.max_gen_len=2040")) == 2
    assert "max_position_embeddings" in capsys.readouterr().err
    assert not (tmp_path / "run/config.yaml").exists()


@pytest.mark.parametrize(("config", "limit"), [("config.yaml", 44), ("config_24GB.yaml", 23)])
def test_the_shipped_plans_fit_their_cards(config, limit, capsys):
    assert train.main(["--config", str(ROOT / config), "--plan"]) == 0
    totals = next(line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.startswith("total"))
    assert all(float(total) < limit for total in totals)


def test_a_plan_that_does_not_fit_says_what_would(capsys):
    assert train.main(["--config", str(ROOT / "config.yaml"), "--plan", "training.micro_batch_tokens=60000"]) == 2
    assert "set training.micro_batch_tokens=" in capsys.readouterr().err
    assert train.main(["--config", str(ROOT / "config.yaml"), "--plan", "model.memory_gib=23"]) == 2
    assert "set optimizer.offload=true" in capsys.readouterr().err
