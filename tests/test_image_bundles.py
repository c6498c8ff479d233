"""The bundles of the image tasks: MONAI's own checks, and their commands on a few tiny pictures."""

from __future__ import annotations

import csv
import functools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import monai.bundle
import numpy as np
import pytest
import torch
from conftest import ROOT
from monai.bundle import ConfigParser, ConfigWorkflow, ckpt_export, verify_metadata, verify_net_in_out

from monai_rl_reg import drawings
from monai_rl_reg.checkpoints import load_policy
from monai_rl_reg.errors import find_input_error
from monai_rl_reg.pictures import list_pictures, read_picture
from monai_rl_reg.video import VideoFrames

image_module = pytest.importorskip("PIL.Image")
models = pytest.importorskip("torchvision.models")

PICTURES, HELD_BACK = 10, 2
SIZE = 32
SMALL = {
    "max_epochs": 2,
    "epoch_length": 3,
    "val_interval": 1,
    "batch_size": 2,
    "steps": 2,
    "val_steps": 2,
    "updates": 1,
    "update_batch_size": 2,
    "image_size": SIZE,
    "hold_back": HELD_BACK,
}
STYLE = {"crop_size": SIZE, "style_size": SIZE, "feature_network": "squeezenet1_0"}


@dataclass(frozen=True)
class Bundle:
    """What differs between the bundles."""

    name: str
    channels: tuple[int, int]
    figures: tuple[str, ...]
    result: str
    settings: dict[str, Any]
    wide: int = 1  # pictures side by side in a file

    def configs(self, *names: str) -> list[str]:
        return [str(ROOT / "bundles" / self.name / "configs" / f"{name}.json") for name in names]


BUNDLES = [
    Bundle("rl_inpainting", (3, 3), ("psnr", "ssim", "lpips"), "filled", {}),
    Bundle("rl_photo", (6, 3), ("psnr", "ssim", "lpips"), "photo", {}, wide=2),
    Bundle("rl_style", (9, 3), ("content", "style"), "stylised", STYLE),
    Bundle("rl_video_style", (11, 5), ("content", "style"), "stylised", STYLE),
]
IMAGES, VIDEO = BUNDLES[:3], BUNDLES[3]


def named(bundles: list[Bundle]) -> Any:
    return pytest.mark.parametrize("bundle", bundles, ids=lambda bundle: bundle.name)


def run(bundle: Bundle, run_id: str, *configs: str, **overrides: object) -> None:
    """Run a command of the bundle in this process."""
    settings = {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    monai.bundle.run(run_id, config_file=bundle.configs(*configs), logging_file=False, **settings)


def failure(bundle: Bundle, run_id: str, *configs: str, **overrides: object) -> str:
    """Return the sentence that a command of the bundle ends with."""
    with pytest.raises(Exception) as raised:  # noqa: PT011 - MONAI wraps what its transforms and configs raise
        run(bundle, run_id, *configs, **overrides)
    error = find_input_error(raised.value)
    assert error is not None, repr(raised.value)
    assert "\n" not in str(error)
    return str(error)


def parsed(bundle: Bundle, config: str, key: str) -> Any:
    """Return one part of a configuration."""
    return ConfigParser(ConfigParser.load_config_file(bundle.configs(config)[0])).get_parsed_content(key)


@pytest.fixture(autouse=True)
def global_settings() -> Iterator[None]:
    """Take back what a bundle's run sets for the whole process."""
    hook, deterministic = sys.excepthook, torch.are_deterministic_algorithms_enabled()
    yield
    sys.excepthook = hook
    monai.utils.set_determinism(None)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session")
def feature_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights of SqueezeNet in a file: no download."""
    torch.manual_seed(0)
    file = tmp_path_factory.mktemp("weights") / "squeezenet.pt"
    torch.save(models.squeezenet1_0(weights=None).state_dict(), file)
    return file


@pytest.fixture
def weights(bundle: Bundle, feature_weights: Path) -> dict[str, object]:
    """Setting of the feature network's weights, of the bundles that have one."""
    return {"feature_weights": feature_weights} if bundle.settings else {}


@pytest.fixture
def features(bundle: Bundle, weights: dict[str, object]) -> dict[str, object]:
    """Settings of the feature network, for the training of the bundles that have one."""
    return bundle.settings | weights


def make_pictures(folder: Path, wide: int) -> Path:
    """Write gradients and discs of random colours, no two of one size."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for number in range(PICTURES):
        height, width = 36 + number, 44
        rows, columns = np.mgrid[:height, : wide * width] / 40
        pixels = np.stack([rows, columns % 1.1, 0 * rows], -1) * random.random(3)
        pixels[(rows - 0.4) ** 2 + (columns % 1.1 - 0.5) ** 2 < 0.06] = random.random(3)
        image_module.fromarray((255 * pixels.clip(0, 1)).astype(np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of single pictures, and of two side by side."""
    root = tmp_path_factory.mktemp("pictures")
    return {wide: make_pictures(root / str(wide), wide) for wide in (1, 2)}


@pytest.fixture(scope="session")
def models_of(tmp_path_factory: pytest.TempPathFactory, folders: dict[int, Path], feature_weights: Path) -> Any:
    """Train each bundle once when it is first asked for; return the output folder."""

    @functools.cache
    def train(name: str) -> Path:
        bundle = next(bundle for bundle in BUNDLES if bundle.name == name)
        output = tmp_path_factory.mktemp(name) / "run"
        settings = SMALL | bundle.settings | ({"feature_weights": feature_weights} if bundle.settings else {})
        run(bundle, "training", "train", dataset_dir=folders[bundle.wide], output_dir=output, **settings)
        return output

    return train


@pytest.fixture
def trained(bundle: Bundle, models_of: Any) -> Path:
    """The output folder of a short training of the bundle."""
    return models_of(bundle.name)  # type: ignore[no-any-return]


@named(BUNDLES)
def test_training_leaves_checkpoints_weights_and_logs(bundle: Bundle, trained: Path) -> None:
    names = {path.name for path in trained.iterdir()}
    assert {"checkpoint_epoch=2.pt", "checkpoint_final.pt", "model.pt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    saved = torch.load(trained / "checkpoint_final.pt", weights_only=True)
    assert saved["trainer"]["iteration"] == 6
    assert int(saved["loss"]["updates"]) == 4  # after two iterations of warm-up
    assert not any("squeeze" in key or "features" in key for key in saved["loss"])


@named(BUNDLES)
def test_training_of_the_control_on_what_the_package_draws(
    bundle: Bundle,
    features: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for draw, options in (("draw_faces", {"count": 8}), ("draw_facades", {"count": 8}), ("packaged_style", {})):
        small = functools.partial(getattr(drawings, draw), size=SIZE, **options)
        monkeypatch.setattr(drawings, draw, small)
    output = tmp_path / "run"
    control = {"reinforcement": "false", "steps": 1, "val_steps": 1, "max_epochs": 1, "epoch_length": 4}
    run(bundle, "run", "train", output_dir=output, **SMALL | features | control)
    printed = capsys.readouterr().out
    assert "No data given: using the " in printed
    figures = bundle.figures[:2]
    assert f"validation: {figures[0]} " in printed
    assert f", {figures[1]} " in printed
    network = parsed(bundle, "inference", "network_def")
    load_policy(network, str(output / "model.pt"))
    assert torch.load(output / "checkpoint_final.pt", weights_only=True)["loss"]["updates"] == 2


@named(BUNDLES[2:])
def test_a_policy_without_guide_needs_no_feature_network_in_inference(
    bundle: Bundle, features: dict[str, object], folders: Any, clip: Path, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    short = {"max_epochs": 1, "guided": "false", "dataset_dir": folders[1], "output_dir": output}
    run(bundle, "training", "train", **SMALL | features | short)
    content = {"video": clip} if bundle is VIDEO else {"image": list_pictures(folders[1])[0]}
    settings = content | {"ckpt": output / "model.pt", "steps": 1, "feature_weights": tmp_path / "none.pt"}
    run(bundle, "run", "inference", output_dir=tmp_path / "out", guided="false", **settings)
    assert any((tmp_path / "out").glob("stylised.*"))
    assert "another architecture" in failure(bundle, "run", "inference", output_dir=tmp_path / "not", **settings)


@named(BUNDLES)
def test_training_resumes(
    bundle: Bundle,
    trained: Path,
    features: dict[str, object],
    tmp_path: Path,
    folders: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "checkpoint_final.pt").write_bytes((trained / "checkpoint_final.pt").read_bytes())
    settings = SMALL | features | {"max_epochs": 3, "resume": "true", "dataset_dir": folders[bundle.wide]}
    run(bundle, "training", "train", output_dir=output, **settings)
    assert f"Resuming from {output}" in capsys.readouterr().out
    before, after = (torch.load(folder / "checkpoint_final.pt", weights_only=True) for folder in (trained, output))
    assert after["trainer"]["iteration"] == 9
    assert after["time"]["epoch"] == 3
    assert after["time"]["elapsed"] > before["time"]["elapsed"]


@named(IMAGES)
def test_evaluating_writes_policy_and_control(
    bundle: Bundle, trained: Path, folders: Any, feature_weights: Path, tmp_path: Path
) -> None:
    settings = SMALL | bundle.settings | {"feature_weights": feature_weights, "val_steps": 3}
    settings |= {"ckpt": trained / "model.pt", "control_ckpt": trained / "model.pt"}
    if bundle.settings:  # the control is the same network here
        settings |= {"action_bound": 0.1, "control_action_bound": 0.1}
    run(bundle, "evaluating", "train", "evaluate", dataset_dir=folders[bundle.wide], output_dir=tmp_path, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {"metrics.csv", "summary.json", "examples.png"}
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["image", "model", "steps", *bundle.figures, "seconds"]
    expected = {(name, "policy", str(step)) for name in ("8", "9") for step in range(4)}
    expected |= {(name, "control", str(step)) for name in ("8", "9") for step in range(2)}
    assert {(row["image"], row["model"], row["steps"]) for row in rows} == expected
    assert len(rows) == len(expected)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["images"] == 2
    for figure in bundle.figures:
        last = [float(row[figure]) for row in rows if (row["model"], row["steps"]) == ("policy", "3")]
        assert summary["policy"][figure][3] == pytest.approx(sum(last) / 2, rel=1e-4)
        assert len(set(summary["policy"][figure])) == 4, "every step changes it"
        assert summary["control"][figure] == pytest.approx(summary["policy"][figure][:2], rel=1e-4)


@named(IMAGES)
def test_evaluating_without_a_control(
    bundle: Bundle, trained: Path, folders: Any, feature_weights: Path, tmp_path: Path
) -> None:
    settings = SMALL | bundle.settings | {"feature_weights": feature_weights, "ckpt": trained / "model.pt"}
    run(bundle, "run", "train", "evaluate", dataset_dir=folders[bundle.wide], output_dir=tmp_path, **settings)
    assert set(json.loads((tmp_path / "summary.json").read_text())) == {"images", "policy"}


def sizes(bundle: Bundle) -> dict[str, object]:
    return {} if bundle.settings else {"image_size": SIZE}


@named(IMAGES)
def test_inference_writes_the_result_and_its_steps(
    bundle: Bundle, trained: Path, folders: Any, weights: dict[str, object], tmp_path: Path
) -> None:
    image = list_pictures(folders[bundle.wide])[3]
    settings = {"ckpt": trained / "model.pt", "steps": 3, **sizes(bundle), **weights}
    run(bundle, "run", "inference", image=image, output_dir=tmp_path, **settings)
    assert {path.name for path in tmp_path.iterdir()} == {f"{bundle.result}.png", "steps.png"}
    result, strip = (read_picture(tmp_path / f"{name}.png") for name in (bundle.result, "steps"))
    height, width = (39, 44) if bundle.settings else (SIZE, SIZE)
    assert result.shape == (3, height, width)
    assert strip.shape[2] == 4 * width + 3 * 2
    assert torch.equal(strip[:, -height:, -width:], result)
    assert not torch.equal(strip[:, -height:, :width], result)


@named(IMAGES)
def test_inference_takes_the_last_picture_of_a_folder(
    bundle: Bundle, trained: Path, folders: Any, weights: dict[str, object], tmp_path: Path
) -> None:
    folder = folders[bundle.wide]
    settings = {"ckpt": trained / "model.pt", "steps": 1, **sizes(bundle), **weights}
    for name, chosen in {"folder": {"dataset_dir": folder}, "file": {"image": list_pictures(folder)[-1]}}.items():
        run(bundle, "run", "inference", output_dir=tmp_path / name, **settings, **chosen)
    results = [read_picture(tmp_path / name / f"{bundle.result}.png") for name in ("folder", "file")]
    assert torch.equal(results[0], results[1])


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of four frames: a pan over a picture of an odd size."""
    folder = tmp_path_factory.mktemp("clips") / "pan"
    folder.mkdir()
    rows, columns = np.mgrid[:49, :80] / 10
    pixels = np.stack([np.sin(3 * rows + 2 * columns), np.sin(4 * columns), np.cos(rows * columns)], -1)
    for number in range(4):
        view = 255 * (0.5 + 0.4 * pixels[:, 2 * number : 2 * number + 66])
        image_module.fromarray(view.astype(np.uint8)).save(folder / f"{number}.png")
    return folder


def test_video_inference_writes_a_clip_of_the_same_frames(
    models_of: Any, clip: Path, feature_weights: Path, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    settings = {"ckpt": models_of(VIDEO.name) / "model.pt", "feature_weights": feature_weights}
    for name, steps in (("start", 0), ("end", 3)):
        run(VIDEO, "run", "inference", video=clip, steps=steps, output_dir=tmp_path / name, **settings)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["stylised.mp4"]
    start, end = (VideoFrames(tmp_path / name / "stylised.mp4") for name in ("start", "end"))
    assert len(start) == len(end) == 4
    assert start.size == end.size == (49, 66)
    shown = read_picture(clip / "2.png")
    assert float((start[2]["image"] - shown).abs().mean()) < 0.05, "no step leaves the frame as it was"
    assert not torch.equal(end[2]["image"], start[2]["image"])


def test_video_evaluating_writes_policy_and_control(
    models_of: Any, clip: Path, folders: Any, feature_weights: Path, tmp_path: Path
) -> None:
    pytest.importorskip("av")
    pytest.importorskip("cv2")
    settings = SMALL | STYLE | {"feature_weights": feature_weights, "ckpt": models_of(VIDEO.name) / "model.pt"}
    settings |= {
        "control_ckpt": models_of("rl_style") / "model.pt",
        "clips_dir": clip.parent,
        "dataset_dir": folders[1],
    }
    run(VIDEO, "run", "train", "evaluate", output_dir=tmp_path, steps_tried=[1, 3], frames=3, **settings)
    with open(tmp_path / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["clip", "model", "steps", "style", "content", "temporal", "seconds_per_frame"]
    found = [(row["clip"], row["model"], row["steps"]) for row in rows]
    assert found == [("pan", model, steps) for model in ("policy", "control", "frame by frame") for steps in ("1", "3")]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["clips"] == 1
    for row in rows:
        figures = summary[row["model"]][row["steps"]]
        for name in ("style", "content", "temporal"):
            assert figures[name] == pytest.approx(float(row[name]), rel=1e-4)
    assert len({row["style"] for row in rows}) == 6


def test_bad_video_is_named(models_of: Any, feature_weights: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    text, output = tmp_path / "text.mp4", tmp_path / "out"
    text.write_text("no video")
    settings = {"ckpt": models_of(VIDEO.name) / "model.pt", "feature_weights": feature_weights}
    for file, message in ((text, "expected a video that can be read"), (tmp_path / "missing.mp4", "found none")):
        sentence = failure(VIDEO, "run", "inference", video=file, output_dir=output, **settings)
        assert sentence.startswith(f"video {file}: ")
        assert message in sentence
    assert not output.exists()


def test_inpainting_changes_the_hole_alone(models_of: Any, folders: Any, tmp_path: Path) -> None:
    bundle = BUNDLES[0]
    image = read_picture(list_pictures(folders[1])[3])[:, 1:37, 4:40]  # the square in the middle
    file = tmp_path / "square.png"
    image_module.fromarray((255 * image).round().byte().movedim(0, -1).numpy()).save(file)
    settings = {"ckpt": models_of(bundle.name) / "model.pt", "image_size": 36}
    run(bundle, "run", "inference", image=file, output_dir=tmp_path / "out", **settings)
    changed = (read_picture(tmp_path / "out" / "filled.png") - image).abs().amax(0) > 0.003
    assert changed[9:27, 9:27].any()
    changed[9:27, 9:27] = False
    assert not changed.any()


def test_photo_is_made_of_a_label_map_alone(models_of: Any, folders: Any, tmp_path: Path) -> None:
    """Cut out of the picture beforehand it gives the same photograph."""
    bundle = BUNDLES[1]
    both = list_pictures(folders[2])[3]
    with image_module.open(both) as picture:
        picture.crop((picture.width // 2, 0, picture.width, picture.height)).save(tmp_path / "label.png")
    settings = {"ckpt": models_of(bundle.name) / "model.pt", **sizes(bundle)}
    run(bundle, "run", "inference", image=both, output_dir=tmp_path / "both", **settings)
    run(
        bundle,
        "run",
        "inference",
        image=tmp_path / "label.png",
        output_dir=tmp_path / "alone",
        **settings,
        label_side="none",
    )
    results = [read_picture(tmp_path / name / "photo.png") for name in ("both", "alone")]
    assert torch.equal(results[0], results[1])


@named(BUNDLES)
@pytest.mark.parametrize(("config", "kind"), [("train", "train"), ("inference", "infer")])
def test_monai_finds_the_properties_it_requires(
    bundle: Bundle, config: str, kind: str, folders: Any, features: dict[str, object], tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"dataset_dir": str(folders[bundle.wide]), "output_dir": str(tmp_path / "out")}
    if kind == "train":
        settings |= {key: str(value) if isinstance(value, Path) else value for key, value in features.items()}
    workflow = ConfigWorkflow(bundle.configs(config)[0], workflow_type=kind, logging_file=False, **settings)
    workflow.parser["initialize"] = []
    workflow.initialize()
    assert workflow.check_properties() == []


@named(BUNDLES)
def test_documented_defaults_are_those_of_the_configuration(bundle: Bundle) -> None:
    page = (ROOT / "bundles" / bundle.name / "docs" / "README.md").read_text()
    rows = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (.*?) \| (.*) \|$", page, flags=re.MULTILINE)
    compared = 0
    for keys, defaults, meaning in rows:
        file = re.search(r"in `(evaluate|inference)\.json`:", meaning)
        config = json.loads(Path(bundle.configs(file[1] if file else "train")[0]).read_text())
        names = re.findall(r"\w+", keys)
        assert set(names) <= set(config), names
        values = [defaults] if defaults.startswith("`[") else defaults.split(", ")
        if len(values) == len(names):
            for name, value in zip(names, values, strict=True):
                if not str(config[name]).startswith("$"):
                    text = value.strip("`")
                    assert config[name] == (text if isinstance(config[name], str) else json.loads(text)), name
                    compared += 1
    assert compared > 15


@named(BUNDLES)
def test_monai_verifies_the_metadata(bundle: Bundle, tmp_path: Path) -> None:
    # the schema lives on the network: what it requires, as of 20240725
    required = ["version", "monai_version", "pytorch_version", "numpy_version", "required_packages_version", "task"]
    required += ["description", "authors", "copyright", "network_data_format"]
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps({"type": "object", "required": required}))
    pytest.importorskip("jsonschema")
    metadata = bundle.configs("metadata")[0]
    verify_metadata(meta_file=metadata, filepath=str(schema), create_dir=False)
    content = json.loads(Path(metadata).read_text())
    assert content["version"] in content["changelog"]
    for side, channels in zip(("inputs", "outputs"), bundle.channels, strict=True):
        (tensor,) = content["network_data_format"][side].values()
        assert tensor["num_channels"] == len(tensor["channel_def"]) == channels
    network = parsed(bundle, "inference", "network_def")
    bound = max(getattr(network, "policy", network).actor.action_bound, 1.0 if bundle is VIDEO else 0.0)  # memories
    assert content["network_data_format"]["outputs"]["pred"]["value_range"] == [-bound, bound]


@named(BUNDLES)
def test_monai_verifies_and_exports_the_network(bundle: Bundle, trained: Path, tmp_path: Path) -> None:
    files = {"meta_file": bundle.configs("metadata")[0], "config_file": bundle.configs("inference")[0]}
    verify_net_in_out(net_id="network_def", device="cpu", any=40, n=10, **files)
    exported, ckpt = tmp_path / "model.ts", str(trained / "model.pt")
    ckpt_export(net_id="network_def", filepath=str(exported), ckpt_file=ckpt, key_in_ckpt="network", **files)
    received, given = bundle.channels
    assert torch.jit.load(exported)(torch.rand(1, received, 40, 32)).shape == (1, given, 40, 32)


@named(BUNDLES)
def test_training_and_inference_have_one_architecture(bundle: Bundle) -> None:
    networks = [parsed(bundle, name, "network_def") for name in ("train", "inference")]
    networks[1].load_state_dict(networks[0].state_dict())
    observation = torch.rand(1, bundle.channels[0], 32, 40)
    assert torch.equal(networks[0](observation), networks[1](observation))


@named(BUNDLES)
def test_bad_data_is_refused_in_one_sentence(bundle: Bundle, features: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "one").mkdir()
    image_module.new("RGB", (64, 48)).save(tmp_path / "one" / "0.png")
    cases = [
        ("missing", "expected a folder of pictures, found none"),
        ("empty", "expected pictures ("),
        ("one", "expected more pictures than the 2 to hold back for validation, found 1"),
    ]
    for name, message in cases:
        folder, output = tmp_path / name, tmp_path / "out"
        sentence = failure(bundle, "training", "train", dataset_dir=folder, output_dir=output, **SMALL | features)
        assert sentence.startswith(f"dataset {folder}: {message}"), sentence
        assert not output.exists()


@named(BUNDLES)
def test_bad_picture_is_named(bundle: Bundle, features: dict[str, object], tmp_path: Path) -> None:
    folder = make_pictures(tmp_path / "pictures", bundle.wide)
    (folder / "4.png").write_text("no picture")
    sentence = failure(bundle, "training", "train", dataset_dir=folder, output_dir=tmp_path / "out", **SMALL | features)
    assert f"{folder / '4.png'}: expected a picture that can be read, found 10 bytes" in sentence


@named(IMAGES)
def test_bad_image_and_checkpoint_of_inference_are_named(
    bundle: Bundle, trained: Path, folders: Any, weights: dict[str, object], tmp_path: Path
) -> None:
    text, output = tmp_path / "text.png", tmp_path / "out"
    text.write_text("no picture")
    good = {"image": list_pictures(folders[bundle.wide])[0], "ckpt": trained / "model.pt", **weights}
    torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pt")
    cases = [
        ("image", text, "expected a picture that can be read"),
        ("image", tmp_path / "missing.png", "expected a file, found none"),
        ("ckpt", tmp_path / "missing.pt", "expected a file, found none"),
        ("ckpt", tmp_path / "other.pt", "found another architecture"),
    ]
    for role, file, message in cases:
        sentence = failure(bundle, "run", "inference", output_dir=output, **good | {role: file})
        assert str(file) in sentence
        assert message in sentence
    assert not output.exists()


def test_photo_of_odd_width_is_refused(models_of: Any, tmp_path: Path) -> None:
    file = tmp_path / "odd" / "odd.png"
    file.parent.mkdir()
    for name in ("0.png", "1.png", "2.png", "odd.png"):
        image_module.new("RGB", (63 if name == "odd.png" else 64, 32)).save(file.parent / name)
    message = f"picture {file}: expected a photograph and a label map side by side, thus an even width, found 63"
    bundle, output = BUNDLES[1], tmp_path / "out"
    training = failure(bundle, "training", "train", dataset_dir=file.parent, output_dir=output, **SMALL)
    ckpt = models_of(bundle.name) / "model.pt"
    inference = failure(bundle, "run", "inference", image=file, ckpt=ckpt, output_dir=output)
    assert training.startswith(message)
    assert inference.startswith(message)


@named(BUNDLES[2:])
def test_bad_style_is_named(bundle: Bundle, features: dict[str, object], folders: Any, tmp_path: Path) -> None:
    settings = SMALL | features | {"dataset_dir": folders[1], "output_dir": tmp_path / "out"}
    style = tmp_path / "style.png"
    assert f"{style}: expected a file, found none" in failure(bundle, "run", "train", style_image=style, **settings)
    weights = tmp_path / "weights.pt"
    sentence = failure(bundle, "run", "train", **settings | {"feature_weights": weights})
    assert sentence == f"feature weights {weights}: expected a file, found none"


@named(BUNDLES[:1])
def test_the_command_line_shows_the_sentence_alone(bundle: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", bundle.configs("train")[0]]
    command += ["--dataset_dir", str(tmp_path / "missing"), "--output_dir", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", timeout=600)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last == f"error: dataset {tmp_path / 'missing'}: expected a folder of pictures, found none"
    assert "Traceback" not in result.stderr
