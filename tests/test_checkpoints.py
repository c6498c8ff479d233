"""What a resumed training goes on with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, RandGaussianNoise
from monai.utils import set_determinism

from monai_rl_reg import checkpoints
from monai_rl_reg.checkpoints import load_checkpoint, load_critic, setting_in, structures_in, voxel_size_in
from monai_rl_reg.errors import InputError
from monai_rl_reg.networks import TwinCritic
from monai_rl_reg.policy_bundle import PolicyBundle
from monai_rl_reg.resuming import (
    RandomState,
    ResumeTraining,
    SafeCheckpointSaver,
    StartFrom,
    latest_checkpoint,
    prepare_output,
)


def test_random_states_come_back_whatever_device_a_checkpoint_is_loaded_to(tmp_path: Path) -> None:
    torch.save(RandomState().state_dict(), tmp_path / "random.pt")
    drawn = torch.rand(3)
    state = torch.load(tmp_path / "random.pt", weights_only=True)
    state["numpy"][1] = NotHere(state["numpy"][1])
    RandomState().load_state_dict(state)
    torch.testing.assert_close(torch.rand(3), drawn)


class NotHere(torch.Tensor):
    """A tensor as on CUDA: numpy takes it only by way of the CPU."""

    def numpy(self, *, force: bool = False) -> object:
        """Refuse."""
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def cpu(self, *args: object, **kwargs: object) -> torch.Tensor:
        """Return it as it would be there."""
        return self.as_subclass(torch.Tensor)


def test_critics_are_kept_with_the_policy_that_they_judge(trained: Path) -> None:
    policy = PolicyBundle(ckpt=trained / "model.pt", device="cpu")
    assert policy.critic is not None
    weights = load_checkpoint(str(trained / "model.pt"))["critic"]
    assert torch.equal(policy.critic.critics[1].value[0].weight, weights["critics.1.value.0.weight"])
    assert PolicyBundle(device="cpu").critic is None  # weights without
    with pytest.raises(InputError, match="found another architecture"):
        load_critic(TwinCritic(3, (16, 32, 64, 32), 64), str(trained / "model.pt"))


def test_a_resumed_training_does_not_repeat_the_augmentation_of_its_beginning(tmp_path: Path) -> None:
    def run(folder: Path) -> list[torch.Tensor]:
        set_determinism(0)
        transform = Compose([RandGaussianNoise(prob=1.0)])
        loader = DataLoader(Dataset([torch.zeros(4)], transform), num_workers=0)
        engine = Engine(lambda engine, batch: batch)
        engine.data_loader = loader  # type: ignore[attr-defined]
        seen: list[torch.Tensor] = []
        resume = ResumeTraining(str(folder), {"random": RandomState()})
        resume.attach(engine)
        engine.add_event_handler("EPOCH_COMPLETED", lambda: seen.append(torch.as_tensor(engine.state.output)))
        engine.run(loader, max_epochs=2)
        return seen

    first = run(tmp_path)
    again = run(tmp_path)
    assert torch.equal(first[0], again[0])
    done = Engine(lambda engine, batch: None)
    done.run([0], max_epochs=1)
    torch.save({"random": RandomState().state_dict(), "trainer": done.state_dict()}, tmp_path / "checkpoint_epoch=1.pt")
    resumed = run(tmp_path)
    assert not any(torch.equal(resumed[0], x) for x in first)
    set_determinism(None)


@pytest.mark.parametrize(("first", "second", "found"), [(True, True, 8.0), (False, True, 65536.0), (True, False, 1.0)])
def test_a_resumed_training_scales_gradients_as_before(first: bool, second: bool, found: float, tmp_path: Path) -> None:
    def run(enabled: bool, scale: float | None) -> float:
        engine = Engine(lambda engine, batch: None)
        engine.data_loader = DataLoader(Dataset([0]), num_workers=0)  # type: ignore[attr-defined]
        scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        engine.scaler = scaler  # type: ignore[attr-defined]
        ResumeTraining(str(tmp_path), {"random": RandomState()}).attach(engine)
        saver = SafeCheckpointSaver(str(tmp_path), {"random": RandomState()}, save_interval=1)
        saver.attach(engine)
        if scale is not None and enabled:
            scaler.load_state_dict(scaler.state_dict() | {"scale": scale})
        engine.run([0], max_epochs=1 if scale is not None else 2)
        return float(scaler.get_scale())

    run(first, 8.0)
    assert run(second, None) == found


def test_newest_checkpoint_and_leftovers_go_by_names_and_content(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("tmp_notes.txt", "tmpl.nii.gz", "tmp0a_b9zx3"):
        (tmp_path / name).touch()
    (tmp_path / "tmp").mkdir()
    final = {"trainer": {"iteration": 95, "epoch_length": 10}}
    for name in ("epoch=10", "epoch=8", "final", "epoch=9"):  # the order in which a copy may have been written
        torch.save(final if name == "final" else {}, tmp_path / f"checkpoint_{name}.pt")
    prepare_output(str(tmp_path), resume=True)
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"tmp_notes.txt", "tmpl.nii.gz", "tmp"} | {
        f"checkpoint_{n}.pt" for n in ("epoch=10", "epoch=9", "final")
    }
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint_epoch=10.pt")
    final["trainer"]["iteration"] = 104
    torch.save(final, tmp_path / "checkpoint_final.pt")
    torch.save(torch.zeros(2), tmp_path / "checkpoint_best.pt")
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint_final.pt")
    (tmp_path / "checkpoint_final.pt").write_bytes(b"cut off")
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint_epoch=10.pt")
    (tmp_path / "checkpoint_epoch=10.pt").write_bytes(b"")
    assert latest_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint_epoch=9.pt")
    assert "Passing over a damaged file: checkpoint" in capsys.readouterr().out


def test_resuming_with_another_configuration_is_one_sentence(tmp_path: Path) -> None:
    saved = {"network": torch.nn.Linear(2, 2).state_dict(), "trainer": {"iteration": 1, "epoch_length": 1}}
    torch.save(saved, tmp_path / "checkpoint_epoch=1.pt")
    engine = Engine(lambda engine, batch: None)
    ResumeTraining(str(tmp_path), {"network": torch.nn.Linear(3, 2)}).attach(engine)
    with pytest.raises(InputError, match="expected one of a training with this configuration, found another"):
        engine.run([0], max_epochs=2, epoch_length=1)


def test_start_from_weights_that_do_not_fit_is_one_sentence(tmp_path: Path) -> None:
    def start(name: str, content: object) -> torch.nn.Module:
        torch.save(content, tmp_path / name)
        module = torch.nn.Linear(2, 2)
        engine = Engine(lambda engine, batch: None)
        StartFrom(str(tmp_path / name), module).attach(engine)
        engine.run([0])
        return module

    weights = torch.nn.Linear(2, 2).state_dict()
    for content in (weights, {"network": weights}):
        torch.testing.assert_close(start("model.pt", content).state_dict(), weights)
    with pytest.raises(InputError, match=r"other\.pt: expected the weights of this configuration's network"):
        start("other.pt", {"network": torch.nn.Linear(3, 2).state_dict()})


def test_two_trainings_do_not_write_into_one_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    program = f"from monai_rl_reg.resuming import prepare_output; prepare_output({str(folder)!r}); print(); input()"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as first:
        assert first.stdin is not None
        assert first.stdout is not None
        first.stdout.readline()
        first.stdout.readline()
        (folder / "checkpoint_final.pt").write_text("")
        for resume in (False, True):
            with pytest.raises(InputError, match="no other training is writing to"):
                prepare_output(str(folder), resume=resume)
        assert (folder / "checkpoint_final.pt").exists()
        first.stdin.write("\n")
    prepare_output(str(folder), resume=True)
    prepare_output(str(folder), resume=True)  # the same process may
    prepare_output(str(folder))
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_checkpoint_says_is_read_once_for_every_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, real, loads = str(tmp_path / "model.pt"), checkpoints.load_checkpoint, []
    monkeypatch.setattr(checkpoints, "load_checkpoint", lambda name: (loads.append(name), real(name))[1])
    torch.save({"network": {}, "settings": {"hole": 0.5}}, path)
    found = [setting_in(path, "hole"), setting_in(path, "views", 2), structures_in(path), voxel_size_in(path)]
    assert (found, len(loads)) == ([0.5, 2, 0, None], 1)
    torch.save({"network": {}, "settings": {"hole": 0.25, "views": 4}}, path)
    assert (setting_in(path, "hole"), setting_in(path, "views", 2), len(loads)) == (0.25, 4, 2)
    assert setting_in(str(tmp_path / "none.pt"), "hole", 1.0) == 1.0
