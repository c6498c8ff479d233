"""An annotator's day with a real MONAI Label server, over REST.

MONAI Label needs an environment of its own. ``MONAI_LABEL_PYTHON`` names the Python of one that has the package with
its ``label`` extra; without it, one is made (a download of some minutes).
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from conftest import DATA, ROOT

from monai_rl_reg.phantoms import make_cohort

pytestmark = pytest.mark.slow

CLIENT = """
import json, sys
from monailabel.client import MONAILabelClient
for line in sys.stdin:
    address, name, arguments = json.loads(line)
    client = MONAILabelClient(address, tmpdir=arguments.pop("tmpdir", None))
    print(json.dumps(getattr(client, name)(**arguments)), flush=True)
"""
PATIENCE = 1800
"""Seconds to wait for anything, on a machine that has other work."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has MONAI Label and this package."""
    named = os.environ.get("MONAI_LABEL_PYTHON")
    if named is not None:
        return named
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=True)
    own = str(folder / "bin" / "python")
    made = subprocess.run([own, "-m", "pip", "install", "-e", f"{ROOT}[label]"], capture_output=True, encoding="utf-8")
    if made.returncode:
        pytest.skip(f"MONAI Label cannot be installed here: {made.stderr[-500:]}")
    return own


class Studies:
    """A folder of unlabelled images, and the truth about them.

    Attributes:
        folder: what the server is given.
        truth: label map of each image id.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        source = DATA / "Task04_Hippocampus"
        numbers = (287, 290, 292, 295, 296, 297, 301, 305)
        names = [f"hippocampus_{number}" for number in numbers]
        self.real = source.is_dir()
        if not self.real:
            source = make_cohort(folder.parent / "phantoms", count=8, size=24)
            names = [f"phantom_{i:03d}" for i in range(8)]
        self.truth = {name: source / "labelsTr" / f"{name}.nii.gz" for name in names}
        for name in names:
            shutil.copy(source / "imagesTr" / f"{name}.nii.gz", folder)

    def dice(self, name: str, draft: str | Path) -> float:
        """Mean Dice of a draft over the labels of an image."""
        a, b = (np.asarray(nib.load(path).dataobj) for path in (draft, self.truth[name]))
        return float(
            np.mean(
                [
                    2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum())
                    for v in range(1, int(b.max()) + 1)
                ]
            )
        )


class Server:
    """A server, and requests to it as MONAI Label's own client and curl make them."""

    def __init__(self, python: str, studies: Path, log: Path) -> None:
        self.python, self.studies, self.log = python, studies, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None
        self.caller: subprocess.Popen[str] | None = None

    def start(self) -> None:
        environment = os.environ | {"MONAI_LABEL_AUTO_UPDATE_SCORING": "false", "PYTHONIOENCODING": "utf-8"}
        app = subprocess.run(
            [self.python, "-m", "monai_rl_reg", "label-app"], capture_output=True, encoding="utf-8", check=True
        ).stdout.strip()
        command = [self.python, "-m", "monailabel.main", "start_server", "--app", app, "--studies", str(self.studies)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=self.log.parent,
            )
        self.wait(lambda: self.get("/info/") is not None)

    def stop(self) -> None:
        assert self.process is not None
        self.process.terminate()
        self.process.wait(PATIENCE)
        if self.caller is not None:
            self.caller.kill()
            self.caller.wait()

    def wait(self, done: Callable[[], bool], seconds: float = PATIENCE) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text(encoding="utf-8")[-3000:]
            try:
                if done():
                    return
            except OSError:
                pass
            time.sleep(1)
        raise TimeoutError(self.log.read_text(encoding="utf-8")[-3000:])

    def request(self, method: str, path: str, body: Any = None, form: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Return status and JSON; ``form`` has fields, and files as paths."""
        data, headers = (
            (None, {}) if body is None else (json.dumps(body).encode(), {"content-type": "application/json"})
        )
        if form is not None:
            limit, data = "limit-of-the-form", b""
            for key, value in form.items():
                named = f'; filename="{value.name}"' if isinstance(value, Path) else ""
                data += f'--{limit}\r\nContent-Disposition: form-data; name="{key}"{named}\r\n\r\n'.encode()
                data += (value.read_bytes() if isinstance(value, Path) else str(value).encode()) + b"\r\n"
            data += f"--{limit}--\r\n".encode()
            headers = {"content-type": f"multipart/form-data; boundary={limit}"}
        asked = urllib.request.Request(self.address + path, data=data, headers=headers, method=method)
        try:
            with urllib.request.urlopen(asked, timeout=PATIENCE) as answer:
                return answer.status, json.loads(answer.read() or b"null")
        except urllib.error.HTTPError as error:
            text = error.read().decode()
            return error.code, json.loads(text) if text.startswith("{") else text

    def get(self, path: str) -> Any:
        status, answer = self.request("GET", path)
        assert status == 200, answer
        return answer

    def infer(self, model: str, image: str, **params: Any) -> tuple[int, Any]:
        path = f"/infer/{model}?image={image}&output=json"
        return self.request("POST", path, form={"params": json.dumps(params)})

    def client(self, name: str, **arguments: Any) -> Any:
        """Call a method of ``monailabel.client.MONAILabelClient``, in a process that has it."""
        if self.caller is None or self.caller.poll() is not None:
            command = [self.python, "-W", "ignore", "-c", CLIENT]
            pipe = subprocess.PIPE
            self.caller = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8")
        assert self.caller.stdin is not None
        assert self.caller.stdout is not None
        assert self.caller.stderr is not None
        self.caller.stdin.write(json.dumps([self.address, name, arguments]) + "\n")
        self.caller.stdin.flush()
        answer = self.caller.stdout.readline()
        assert answer, self.caller.stderr.read()[-2000:]
        return json.loads(answer)

    def task(self, path: str, status: str = "DONE") -> Any:
        """Wait for a task in the background."""
        self.wait(lambda: self.get(path)["status"] not in ("SUBMITTED", "RUNNING"))
        found = self.get(path)
        assert found["status"] == status, "\n".join(found["details"])
        return found


@pytest.fixture(scope="module")
def studies(tmp_path_factory: pytest.TempPathFactory) -> Studies:
    return Studies(tmp_path_factory.mktemp("day") / "studies")


@pytest.fixture(scope="module")
def server(python: str, studies: Studies, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(python, studies.folder, tmp_path_factory.mktemp("server") / "server.log")
    server.start()
    yield server
    server.stop()


def refused(answer: tuple[int, Any], status: int, words: str) -> None:
    """The answer is an HTTP error of one sentence with these words."""
    assert answer[0] == status, answer
    assert words in answer[1]["detail"]
    assert "\n" not in answer[1]["detail"]


def test_before_anything_is_labelled(server: Server, studies: Studies) -> None:
    info = server.client("info")
    assert {name: model["type"] for name, model in info["models"].items()} == {
        "label_propagation": "segmentation",
        "registration": "others",
    }
    for model in info["models"].values():  # 3D Slicer fills its lists with strings alone
        assert all(isinstance(v, str) for value in model["config"].values() if isinstance(value, list) for v in value)
    assert set(info["trainers"]) == {"rl_reg"}
    assert set(info["strategies"]) == {"registration_disagreement", "random"}
    first = next(iter(studies.truth))
    refused(server.infer("label_propagation", first), 400, "expected a labelled case besides the image itself")
    refused(server.infer("label_propagation", "nobody"), 404, "image nobody")
    refused(server.infer("nothing", first), 404, "model nothing")
    assert server.client("next_sample", strategy="registration_disagreement", params={})["id"] in studies.truth


def test_the_first_label_becomes_drafts_of_the_others(server: Server, studies: Studies, tmp_path: Path) -> None:
    first, second, third, *_ = studies.truth
    wrong = server.request("PUT", f"/datastore/label?image={first}", form={"label": studies.truth[second]})
    if studies.real:
        refused(wrong, 400, "expected the grid of its image")
    (tmp_path / "noise.nii.gz").write_bytes(b"noise")
    refused(
        server.request("PUT", f"/datastore/label?image={first}", form={"label": tmp_path / "noise.nii.gz"}), 400, ""
    )
    refused(server.request("PUT", "/datastore/label?image=no", form={"label": studies.truth[first]}), 404, "image no")
    assert server.get("/datastore/")["completed"] == 0 or not studies.real
    names = [{"name": "anterior", "idx": 1}, {"name": "posterior", "idx": 2}] if studies.real else []
    server.client("save_label", image_id=first, label_in=str(studies.truth[first]), params={"label_info": names})
    info = server.get("/info/")
    if studies.real:
        assert info["models"]["label_propagation"]["labels"] == {"anterior": 1, "posterior": 2}
    assert first in info["models"]["label_propagation"]["config"]["atlas"]
    file, params = server.client(
        "infer", model="label_propagation", image_id=second, params={"atlas": first}, tmpdir=str(tmp_path)
    )
    assert params["atlases"] == [first]
    assert params["label_names"] == info["models"]["label_propagation"]["labels"]
    assert 0 <= params["ncc_before"] <= 1
    assert params["folded_percent"] < 1
    assert all(Path(path).is_file() for path in params["files"].values())
    assert studies.dice(second, file) > (0.75 if studies.real else 0.3)
    image, draft = nib.load(studies.folder / f"{second}.nii.gz"), nib.load(file)
    np.testing.assert_allclose(draft.affine, image.affine, atol=1e-4)
    assert draft.shape == image.shape
    label = list(params["label_names"])[-1]
    asked = {"label": label, "result_dtype": "uint8"}
    file, one = server.client("infer", model="label_propagation", image_id=second, params=asked, tmpdir=str(tmp_path))
    assert one["label_names"] == {label: 1}
    assert np.unique(np.asarray(nib.load(file).dataobj)).tolist() == [0, 1], "as 3D Slicer takes it"
    refused(server.infer("label_propagation", second, label="liver"), 400, "label liver: expected one of all")
    refused(server.infer("label_propagation", second, atlas=third), 400, f"atlas {third}: expected auto or another")
    refused(server.infer("label_propagation", second, atlases="many"), 400, "atlases: expected a number")
    refused(server.infer("label_propagation", first), 400, "expected a labelled case besides")


def test_ohif_and_slicer_ask_for_other_formats(server: Server, studies: Studies, tmp_path: Path) -> None:
    second = list(studies.truth)[1]
    wanted = {"result_extension": ".nrrd", "result_dtype": "uint16", "result_compress": False}
    file, _ = server.client("infer", model="label_propagation", image_id=second, params=wanted, tmpdir=str(tmp_path))
    assert file.endswith(".nrrd")
    assert Path(file).read_bytes().startswith(b"NRRD")
    assert b"type: unsigned short" in Path(file).read_bytes()[:400]
    config = server.get("/info/")["models"]["label_propagation"]["config"]  # 3D Slicer sends all of it back
    chosen = {key: value[0] if isinstance(value, list) else value for key, value in config.items()}
    assert server.infer("label_propagation", second, **chosen)[0] == 200
    assert server.infer("label_propagation", second, **config)[0] == 200


def test_two_images_are_registered_for_a_script(server: Server, studies: Studies) -> None:
    _first, second, third, *_ = studies.truth
    status, quality = server.infer("registration", third, moving=second)
    assert status == 200
    assert {"moved", "displacement", "inverse_displacement", "transform", "quality"} <= quality["files"].keys()
    refused(server.infer("registration", third), 400, "image `moving`: expected the id of an image")
    refused(server.infer("registration", third, moving="nobody"), 400, "image nobody")


def test_bad_uploads(server: Server, studies: Studies, tmp_path: Path) -> None:
    (tmp_path / "noise.nii.gz").write_bytes(b"noise")
    refused(
        server.request("PUT", "/datastore/image?image=noise", form={"file": tmp_path / "noise.nii.gz"}), 400, "noise"
    )
    assert server.get("/datastore/")["total"] == len(studies.truth)
    form = {"params": "{}", "file": tmp_path / "noise.nii.gz"}
    refused(server.request("POST", "/infer/label_propagation?output=json", form=form), 400, "can be read")
    elsewhere = tmp_path / "elsewhere"
    params = json.dumps({"image_id": str(elsewhere)})  # a client cannot say where results go
    good = {"params": params, "file": studies.folder / f"{next(iter(studies.truth))}.nii.gz"}
    assert server.request("POST", "/infer/label_propagation?output=json", form=good)[0] == 200
    assert not elsewhere.exists()


def test_more_labels_a_choice_and_a_score(server: Server, studies: Studies, tmp_path: Path) -> None:
    _first, *others = studies.truth
    one, _ = server.client("infer", model="label_propagation", image_id=others[-1], params={}, tmpdir=str(tmp_path))
    alone = studies.dice(others[-1], one)
    for name in others[:3]:  # by a client that numbers labels its own way
        values = nib.load(studies.truth[name])
        swapped = np.asarray(values.dataobj).copy()
        names = {}
        if studies.real:
            swapped = np.select([swapped == 1, swapped == 2], [2, 1]).astype(np.uint8)
            names = {"label_info": [{"name": "posterior", "idx": 1}, {"name": "anterior", "idx": 2}]}
        nib.save(nib.Nifti1Image(swapped, values.affine), tmp_path / f"{name}.nii.gz")
        server.client("save_label", image_id=name, label_in=str(tmp_path / f"{name}.nii.gz"), params=names)
    file, params = server.client(
        "infer", model="label_propagation", image_id=others[-1], params={"atlases": 3}, tmpdir=str(tmp_path)
    )
    assert len(params["atlases"]) == 3
    assert 0 < params["disagreement"] < 1
    assert studies.dice(others[-1], file) > (max(0.75, alone - 0.03) if studies.real else 0.3)
    chosen = server.client("next_sample", strategy="registration_disagreement", params={"seconds": PATIENCE})
    assert chosen["id"] in others[3:]
    assert chosen["weight"] > 0
    noted = {name: server.get(f"/datastore/image/info?image={name}") for name in others[3:]}
    doubts = {name: info["registration_disagreement"]["value"] for name, info in noted.items()}
    assert doubts[chosen["id"]] == max(doubts.values())
    assert server.client("next_sample", strategy="random", params={})["id"] in others[3:]


def test_two_infers_at_once(server: Server, studies: Studies) -> None:
    names = list(studies.truth)[4:6]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda name: server.infer("label_propagation", name, atlases=1), names))
    assert [status for status, _ in answers] == [200, 200]
    assert {Path(answer["files"]["moved"]).parent.name for _, answer in answers} == set(names)


def test_training_and_back_again(server: Server, studies: Studies) -> None:
    target = list(studies.truth)[-1]
    shipped = ROOT / "bundles" / "rl_reg" / "models" / "model.pt"
    before, when = shipped.read_bytes(), shipped.stat().st_mtime_ns
    server.client("train_start", model="rl_reg", params={"minutes": 1.0})
    server.wait(lambda: server.client("train_status", check_if_running=True))  # it is submitted first, then runs
    refused(server.request("POST", "/train/rl_reg", {}), 429, "Already Running")
    assert server.infer("label_propagation", target)[0] == 200  # the server goes on meanwhile
    done = server.task("/train/")
    assert any("dice" in line and "epoch" in line for line in done["details"])
    stats = server.get("/info/")["train_stats"]["rl_reg"]
    assert (stats["images"], stats["labelled"], stats["learnt_from_labels"]) == (len(studies.truth), 4, True)
    assert 0 < stats["best_metric"] <= 1
    assert stats["epoch"] == stats["total_epochs"]
    weights = server.get("/info/")["models"]["label_propagation"]["config"]["weights"]
    assert len(weights) == 3
    _, latest = server.infer("label_propagation", target)
    assert Path(latest["ckpt"]).parent.name == weights[1]
    _, back = server.infer("label_propagation", target, weights="shipped")
    assert Path(back["ckpt"]) == shipped
    assert (shipped.read_bytes(), shipped.stat().st_mtime_ns) == (before, when)


def test_a_stopped_training_and_a_restart_lose_nothing(server: Server, studies: Studies) -> None:
    server.client("train_start", model="rl_reg", params={"minutes": 30.0, "start": "scratch"})
    known = server.get("/info/")["models"]["label_propagation"]["config"]["weights"]

    def begun() -> bool:
        return len(server.get("/info/")["models"]["label_propagation"]["config"]["weights"]) > len(known)

    server.wait(begun)
    assert server.client("train_status", check_if_running=True)
    assert server.client("train_stop")["status"] == "STOPPED"
    assert not server.client("train_status", check_if_running=True)
    target = list(studies.truth)[-1]
    assert server.infer("label_propagation", target)[0] == 200
    before = server.get("/info/"), server.get("/datastore/?output=all")
    server.stop()
    server.start()
    after = server.get("/info/"), server.get("/datastore/?output=all")
    assert after[0]["models"] == before[0]["models"]
    assert after[0]["train_stats"] == before[0]["train_stats"]
    assert after[1] == before[1]
    assert server.infer("label_propagation", target)[0] == 200


def test_drafts_of_all_unlabelled_images_and_their_scores(server: Server, studies: Studies) -> None:
    options = {"multi_gpu": False, "max_workers": 1, "device": "cpu", "atlases": 3, "weights": "shipped"}
    status, _ = server.request("POST", "/batch/infer/label_propagation?images=unlabeled", options)
    assert status == 200
    server.task("/batch/infer")
    server.wait(lambda: server.get("/datastore/")["label_tags"].get("original") == len(studies.truth) - 4)
    target = list(studies.truth)[-1]
    server.client("save_label", image_id=target, label_in=str(studies.truth[target]))
    for method in ("dice", "registration_disagreement"):
        assert server.request("POST", f"/scoring/{method}", {})[0] == 200
        server.task("/scoring/")
    server.wait(lambda: "dice" in server.get(f"/datastore/image/info?image={target}"))
    draft = server.get(f"/datastore/image/info?image={target}")["dice"]
    assert draft > (0.75 if studies.real else 0.3)


def test_a_datastore_of_one_image(python: str, studies: Studies, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    shutil.copy(studies.folder / f"{next(iter(studies.truth))}.nii.gz", tmp_path / "one")
    server = Server(python, tmp_path / "one", tmp_path / "server.log")
    server.start()
    try:
        only = next(iter(studies.truth))
        refused(
            server.request("POST", "/train/rl_reg", {}), 400, "expected at least two images in the datastore, found 1"
        )
        refused(server.infer("label_propagation", only), 400, "expected a labelled case besides the image itself")
        assert server.client("next_sample", strategy="registration_disagreement", params={})["id"] == only
        assert server.get("/info/")["datastore"]["total"] == 1
    finally:
        server.stop()
